"""`fate chat`: what is said and remembered, what is printed where, and how it is stopped."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TextStreamer

import fate
from cli_support import FAMILY, Cli, Refuse, Result, copied
from fate.cli import conversation, generation
from tiny import tiny_store

NEW = 8
Chat = Callable[..., Result]


class Typed(io.TextIOWrapper):
    """Standard input; `watched`: as if it were a terminal."""

    watched = False

    def isatty(self) -> bool:
        return self.watched


@pytest.fixture
def store() -> Path:
    return tiny_store(FAMILY, eos_token_id=None)


@pytest.fixture
def chat(cli: Cli, monkeypatch: pytest.MonkeyPatch, store: Path) -> Chat:
    """Runs `fate chat` with the given lines as standard input."""

    def run(*lines: str | bytes, options: tuple[object, ...] = (), new: int = NEW, watched: bool = False) -> Result:
        encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
        typed = Typed(io.BytesIO(b"".join(line + b"\n" for line in encoded)), encoding="utf-8")
        typed.watched = watched
        monkeypatch.setattr(sys, "stdin", typed)
        return cli("chat", store, "--max-new-tokens", new, *options)

    return run


def figures(text: str) -> list[dict[str, tuple[str, str]]]:
    """Each `/stats` table of standard error: name -> (last answer, session)."""
    tables = []
    for line in text.splitlines():
        if line.split() == ["last", "answer", "session"]:
            tables.append({})
        elif tables and (found := re.fullmatch(r"(\S.*?) {2,}(\S+(?: \S+)?) {2,}(\S+(?: \S+)?)", line)):
            tables[-1][found[1]] = (found[2], found[3])
    return tables


def by_hand(store: Path, messages: list[str], system_prompt: str | None = None) -> str:
    """What `fate chat` is to print: each prompt prefilled as a whole."""
    tokenizer = AutoTokenizer.from_pretrained(store)
    history = [{"role": "system", "content": system_prompt}] if system_prompt else []
    printed = ""
    with fate.load(store) as model:
        for message in messages:
            history.append({"role": "user", "content": message})
            encoded = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt")
            ids = encoded["input_ids"]
            new = model.generate(**encoded, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            text = tokenizer.decode(new, skip_special_tokens=True)
            history.append({"role": "assistant", "content": text.strip()})
            printed += text.lstrip() + "\n"
    return printed


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_a_conversation_is_the_template_over_all_that_was_said(
    chat: Chat, store: Path, system_prompt: str | None
) -> None:
    messages = ["Hello", "And then?", "Why"]
    quiet = ("-q", "--system", "load-on-demand")  # which has nothing to decide, and so to say
    options = (*quiet, *(("--system-prompt", system_prompt) if system_prompt else ()))
    result = chat(*messages, "", options=options)
    assert (result.code, result.err) == (0, "")
    assert result.out == by_hand(store, messages, system_prompt)


def test_only_answers_are_on_standard_output(chat: Chat, store: Path) -> None:
    result = chat("Hello", "/stats", "/help", "/nonsense", "/reset", "/exit", "never asked")
    assert result.out == by_hand(store, ["Hello"])
    assert re.match(r"system \S+\nruntime ", result.err)
    assert "/reset   forget what was said" in result.err
    assert "error: /nonsense is no command: /help lists them" in result.err
    assert result.err.splitlines()[-1] == "forgotten: everything that was said"


def test_stats_of_the_last_answer_and_of_the_session(chat: Chat) -> None:
    result = chat("/stats", "Hello", "/stats", "Hi", "/stats", options=("-q", "--experts", "50%"))
    assert result.err.startswith("nothing was answered yet\n")
    first, second = figures(result.err)
    assert first["prompt tokens"] == (str(len("user: Hello\nassistant:")),) * 2
    assert first["new tokens"] == (str(NEW),) * 2
    assert second["new tokens"] == (str(NEW), str(2 * NEW))
    last, session = map(int, second["prompt tokens"])
    assert session == last + int(first["prompt tokens"][0])
    assert first["of these computed before"] == ("0", "0")
    assert int(second["of these computed before"][0]) >= len("user: Hello\nassistant:"), "the KV cache goes on"
    for name, shape in (("tok/s", r"[\d.]+"), ("hit rate", r"[\d.]+%"), ("stall", r"[\d.]+%")):
        assert all(re.fullmatch(shape, value) for value in second[name]), second
    assert re.fullmatch(r"[\d.]+ (B|[KM]iB)", second["read per token"][1])
    assert second["read per token"][1] != "0 B", "half of the experts are not in memory"


def test_after_a_reset_nothing_is_remembered(chat: Chat, store: Path) -> None:
    result = chat("Hello", "/reset", "Hello", "/stats", options=("-q",))
    assert result.out == 2 * by_hand(store, ["Hello"])
    assert figures(result.err)[0]["prompt tokens"] == ("22", "44")
    assert figures(result.err)[0]["of these computed before"][0] == "21", "all but the one whose logits are wanted"


def test_the_oldest_turns_are_forgotten_where_the_context_ends(
    chat: Chat, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real, tokenizer = [], generation.generate, AutoTokenizer.from_pretrained(store)

    def recorded(model: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(tokenizer.decode(ids[0]))
        return real(model, ids, *args, **kwargs)

    monkeypatch.setattr(conversation, "generate", recorded)
    messages = [str(at) * 20 for at in range(6)]
    lines = [line for message in messages for line in (message, "/stats")]
    result = chat(*lines, options=("-q", "--max-context", 128))
    assert result.code == 0
    prompts = [int(table["prompt tokens"][0]) for table in figures(result.err)]
    assert len(prompts) == 6, "every message was answered"
    assert max(prompts) <= 128 - NEW
    assert [message in asked[-1] for message in messages] == [False] * 4 + [True] * 2
    assert "error" not in result.err
    assert result.err.count("forgotten to stay within the context: the oldest turn\n") >= 2


def test_a_message_that_is_too_long_is_refused_and_forgotten(chat: Chat, store: Path) -> None:
    result = chat("Hello", "x" * 200, b"\xff\xfe", "And then?", options=("-q", "--max-context", 128))
    assert result.out == by_hand(store, ["Hello", "And then?"])
    tokens = len("user: \nassistant:") + 200
    too_long, not_text = result.err.splitlines()
    assert too_long.startswith(f"error: the message is too long: {tokens} tokens with the template, and at most 120 ")
    assert not_text == "error: the message is not UTF-8 text: write it in UTF-8"


def test_an_answer_does_not_begin_with_white_space(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(store)
    streamer = generation.TimedStreamer(tokenizer, strip_start=True)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in tokenizer(" \n Yes, I do").input_ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == "Yes, I do\n"
    assert tokenizer.decode(streamer.tokens) == " \n Yes, I do"
    assert len(streamer.times) == len(streamer.tokens)


def test_an_answer_takes_what_the_prompt_leaves(chat: Chat) -> None:
    prompt = len("user: Hello\nassistant:")
    result = chat("Hello", "/stats", options=("-q", "--max-context", 50), new=100)
    assert figures(result.err)[0]["new tokens"][0] == str(50 - prompt)


def press(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> None:
    """Ctrl-C comes when the streamer is given its `at`-th value, the prompt being the first."""
    real, values = TextStreamer.put, []

    def put(self: TextStreamer, value: Any) -> None:
        values.append(value)
        real(self, value)
        if len(values) == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("transformers.TextStreamer.put", put)


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    press(monkeypatch, at=1 + 3)
    result = chat("Hello", "/stats", "Hi", "/stats", options=("-q",))
    assert result.code == 0
    assert result.err.startswith("stopped\n")
    first, second = figures(result.err)
    assert first["new tokens"][0] == "3"
    assert second["new tokens"] == (str(NEW), str(3 + NEW))
    assert int(second["of these computed before"][0]) >= len("user: Hello\nassistant:")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_answer_is_remembered_as_far_as_it_came(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    press(monkeypatch, at=1 + 3)
    result = chat("Hello", "Hi", "/stats", options=("-q",))
    tokenizer = AutoTokenizer.from_pretrained(store)
    with fate.load(store) as model:
        ids = tokenizer("user: Hello\nassistant:", return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = tokenizer.decode(new).strip()
    history = f"user: Hello\nassistant: {text}\nuser: Hi\nassistant:"
    assert figures(result.err)[0]["prompt tokens"][0] == str(len(tokenizer(history).input_ids))


def test_ctrl_c_before_the_first_word_takes_the_message_back(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    press(monkeypatch, at=1)
    result = chat("Never asked", "Hello", options=("-q",))
    assert result.err == "stopped before the first word: not asked\n"
    assert result.out == "\n" + by_hand(store, ["Hello"])


def test_ctrl_c_twice_leaves(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    press(monkeypatch, at=1 + 3, times=2)
    result = chat("Hello", "Hi", options=("-q",))
    assert result.code == 130
    assert result.out.count("\n") == 1


def test_ctrl_c_at_the_prompt_leaves_quietly(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    result = chat("Hello", options=("-q",))
    assert (result.code, result.out, result.err) == (0, "", "")


def test_a_terminal_is_prompted_on_standard_error(chat: Chat, store: Path) -> None:
    result = chat("Hello", watched=True)
    assert result.out == by_hand(store, ["Hello"])
    assert result.err.endswith("\n/help lists the commands, Ctrl-D leaves\n> > \n")


def test_a_seed_makes_a_conversation_reproducible(chat: Chat) -> None:
    def out(seed: int) -> str:
        return chat("Hello", "Why?", options=("-q", "--temperature", 1, "--seed", seed)).out

    assert out(1) == out(1) != out(2)


def test_a_model_without_a_template(refuse: Refuse, tmp_path: Path) -> None:
    plain = copied(tiny_store(FAMILY), tmp_path / "store")
    (plain / "chat_template.jinja").unlink()
    line = refuse(2, "chat", plain, stores=1)
    assert line == "error: this model has no chat template: use fate run, which continues a text as it is\n"


def test_a_template_without_a_system_prompt(refuse: Refuse, tmp_path: Path) -> None:
    strict = copied(tiny_store(FAMILY), tmp_path / "store")
    template = strict / "chat_template.jinja"
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template.write_text(check + template.read_text())
    line = refuse(2, "chat", strict, "--system-prompt", "Be brief.", stores=1)
    assert "refuses messages of system, user (System role not supported): leave out --system-prompt" in line


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--max-context", 40, "--system-prompt", "x" * 50],
            r"the system prompt take \d+ tokens; at most 20 of a context",
        ),
        (["--system-prompt", "a\udcffb"], r"the system prompt is not UTF-8 text"),
        (["--temperature", "-1"], r"temperature -1\.0 is not valid: give 0"),
        (["--system", "fast"], r"unknown system 'fast': choose one of"),
        (["--memory", "20MiB"], r"a budget of 20\.00 MiB is too small"),
        (["--experts", "0"], r"experts '0' is not valid"),
    ],
)
def test_a_conversation_that_cannot_be(refuse: Refuse, argv: list[object], words: str) -> None:
    line = refuse(2, "chat", tiny_store(FAMILY), *argv)
    assert re.search(words, line), line
