"""A conversation within the plan's context: what was said, as far as it fits, and an answer to what is said next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from fate.cli.generation import Generation, Sampling, TimedStreamer, encode_chat, generate, total
from fate.cli.interrupt import AnswerInterrupt
from fate.engine.prefix_cache import PrefixCache
from fate.engine.session import FateModel
from fate.errors import UsageError

Message = dict[str, str]


class Prompts:
    """Messages to token ids in the model's chat template, always after the same system prompt (None: none).

    Raises UsageError where the model has no template, or one that takes no system prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> None:
        self.tokenizer = tokenizer
        example = {"role": "user", "content": "x"}
        encode_chat(tokenizer, [example], "use fate run, which continues a text as it is")
        self._start = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._shortest = len(encode_chat(tokenizer, [*self._start, example], "leave out --system-prompt"))

    def encode(self, messages: list[Message]) -> list[int]:
        return encode_chat(self.tokenizer, [*self._start, *messages], "say it in other words")

    def check_fits(self, max_context: int, max_new_tokens: int) -> None:
        """Raise UsageError where not even one letter could be asked."""
        if self._shortest > (limit := prompt_limit(max_context, max_new_tokens)):
            raise UsageError(
                f"the template and the system prompt take {self._shortest} tokens; at most {limit} of a context of "
                f"{max_context} leave room for an answer: shorten the system prompt or give a larger --max-context"
            )


def prompt_limit(max_context: int, max_new_tokens: int) -> int:
    """Most tokens of a prompt: the rest is the answer's, max_new_tokens but no more than half of the context."""
    return max_context - min(max_new_tokens, max_context // 2)


class Conversation:
    """Answers messages with `model`, streaming to standard output; `notice` is told, after the answer, what the engine
    decided meanwhile, and before it what is forgotten.

    `generations`: how each answer went.
    """

    def __init__(self, model: FateModel, prompts: Prompts, sampling: Sampling, notice: Callable[[str], None]) -> None:
        self.generations: list[Generation] = []
        self._model = model
        self._prompts = prompts
        self._sampling = sampling
        self._notice = notice
        self._turns: list[tuple[Message, Message]] = []
        self._prefix = PrefixCache(model)

    def ask(self, message: str) -> Generation:
        """Answer `message`; both become history, an interrupted answer as far as it came.

        Raises UsageError, the history as it was, for a message that leaves no room for an answer even alone; and
        KeyboardInterrupt when Ctrl-C comes twice.
        """
        question = {"role": "user", "content": message}
        tokens = self._fit(question)
        generation, new = self._answer(tokens)
        self._prefix.keep([*tokens, *new])
        self.generations.append(generation)
        for note in generation.notes:
            self._notice(note)
        if new:
            text = self._prompts.tokenizer.decode(new, skip_special_tokens=True)
            self._turns.append((question, {"role": "assistant", "content": str(text).strip()}))
        return generation

    def total(self) -> Generation:
        """All answers so far as one."""
        return total(self.generations, self._model.fate.stats())

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self._turns.clear()

    def _answer(self, tokens: list[int]) -> tuple[Generation, list[int]]:
        """How it went, and the new tokens."""
        streamer = TimedStreamer(self._prompts.tokenizer, strip_start=True)
        room = self._model.fate.envelope.max_context - len(tokens)
        with AnswerInterrupt(self._model) as interrupt:
            generation = generate(
                self._model,
                torch.tensor([tokens]),
                streamer,
                self._sampling,
                max_new_tokens=min(self._sampling.max_new_tokens, room),
                cache=self._prefix.cache_for(tokens),
            )
        if interrupt.insisted:
            raise KeyboardInterrupt
        return generation, streamer.tokens

    def _fit(self, question: Message) -> list[int]:
        """The prompt's tokens, the oldest turns forgotten where not all fit."""
        limit = prompt_limit(self._model.fate.envelope.max_context, self._sampling.max_new_tokens)
        alone = len(self._prompts.encode([question]))
        if alone > limit:
            raise UsageError(
                f"the message is too long: {alone} tokens with the template, and at most {limit} leave room for an "
                "answer: shorten it or start with a larger --max-context"
            )
        before = len(self._turns)
        while len(tokens := self._prompts.encode([*(m for turn in self._turns for m in turn), question])) > limit:
            del self._turns[0]
        if forgotten := before - len(self._turns):
            turns = "turn" if forgotten == 1 else f"{forgotten} turns"
            self._notice(f"forgotten to stay within the context: the oldest {turns}")
        return tokens
