"""Requests from files of prompts: any text, or jsonl as GSM8K's and HumanEval's.

A request is `prompt_tokens` tokens to prefill and `new_tokens` to decode. From jsonl, the prompt ends where an item's
question ends, earlier items fill it up from the left, and the item's own answer (then the next items) is decoded. From
plain text, requests follow one another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fate.errors import UsageError
from fate.tools.evaluate import read_text

PROMPT_FIELDS = ("prompt", "question", "text")
ANSWER_FIELDS = ("answer", "canonical_solution")
_BETWEEN_ITEMS = "\n\n"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Item:
    """A prompt and, where the file has one, its answer (else "")."""

    prompt: str
    answer: str = ""


@dataclass(frozen=True)
class Prompts:
    """What one file holds: `items` of a .jsonl file, one item that is all of any other."""

    file: Path
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Request:
    """ids: [1, prompt_tokens + new_tokens] int64. file: the name of the one it comes from."""

    file: str
    ids: torch.Tensor
    prompt_tokens: int

    @property
    def new_tokens(self) -> int:
        return int(self.ids.shape[1]) - self.prompt_tokens


def read_prompts(file: Path) -> Prompts:
    """Raises UsageError for a file that is missing, not UTF-8 or empty, and for jsonl without a known field."""
    text = read_text(file)
    if file.suffix != ".jsonl":
        return Prompts(file, (Item(text),))
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return Prompts(file, tuple(_item(file, number, line) for number, line in lines))


def _item(file: Path, number: int, line: str) -> Item:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise UsageError(f"{file} line {number} is not a JSON object: give jsonl, or text in a file not called .jsonl")
    texts = {name: value for name, value in fields.items() if isinstance(value, str) and value.strip()}
    prompt = next((texts[name] for name in PROMPT_FIELDS if name in texts), None)
    if prompt is None:
        found = ", ".join(map(str, fields)) or "nothing"
        raise UsageError(
            f"{file} line {number} has no text in {', '.join(PROMPT_FIELDS)} (it has {found}): name one so"
        )
    return Item(prompt, next((texts[name] for name in ANSWER_FIELDS if name in texts), ""))


def make_requests(
    prompts: Sequence[Prompts], encode: Encode, prompt_tokens: int, new_tokens: int, num_recorded: int
) -> tuple[list[Request], list[Request]]:
    """(measured, recorded): the first request of every file, and `num_recorded` others, from the files in turn.

    No request shares a token with another. Raises UsageError, naming the file, where there are too few.
    """
    extra = [num_recorded // len(prompts) + (at < num_recorded % len(prompts)) for at in range(len(prompts))]
    measured, recorded = [], []
    for file, more in zip(prompts, extra, strict=True):
        made = _take(file, encode, prompt_tokens, new_tokens, 1 + more)
        measured.append(made[0])
        recorded.append(made[1:])
    rounds = max(extra)
    return measured, [requests[at] for at in range(rounds) for requests in recorded if at < len(requests)]


def _take(file: Prompts, encode: Encode, prompt_tokens: int, new_tokens: int, count: int) -> list[Request]:
    split = _split_text if file.file.suffix != ".jsonl" else _split_items
    found: list[Request] = []
    for ids in split(file, encode, prompt_tokens, new_tokens):
        found.append(Request(file.file.name, torch.tensor([ids]), prompt_tokens))
        if len(found) == count:
            return found
    raise UsageError(
        f"{file.file} is enough for {len(found)} requests of {prompt_tokens} + {new_tokens} tokens, {count} are needed "
        "(1 measured, the others run before): give a longer file, fewer --record-prompts or fewer tokens"
    )


def _split_text(file: Prompts, encode: Encode, prompt_tokens: int, new_tokens: int) -> Iterator[list[int]]:
    ids, size = encode(file.items[0].prompt), prompt_tokens + new_tokens
    for at in range(0, len(ids) - size + 1, size):
        yield ids[at : at + size]


def _split_items(file: Prompts, encode: Encode, prompt_tokens: int, new_tokens: int) -> Iterator[list[int]]:
    """`ids` holds what no request has used yet; a question's end becomes a request's border once enough precedes it."""
    ids: list[int] = []
    border: int | None = None
    for item in file.items:
        ids += encode(item.prompt)
        if border is None and len(ids) >= prompt_tokens:
            border = len(ids)
        ids += encode(_answer(item) + _BETWEEN_ITEMS)
        if border is not None and len(ids) - border >= new_tokens:
            yield ids[border - prompt_tokens : border + new_tokens]
            ids, border = [], None


def _answer(item: Item) -> str:
    """The answer on a line of its own, or, where the prompt ends with one (HumanEval), right behind it."""
    return item.answer if not item.answer or item.prompt.endswith("\n") else "\n" + item.answer
