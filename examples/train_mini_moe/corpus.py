"""The text: three domains of documents, each split once into training and held-out documents.

A folder of any text: `.jsonl` with "question" and "answer" (or "text"), `.txt`, and `.py`; beside it the sources of the
running interpreter's standard library, if wanted. Books are cut into pieces at paragraphs, and lines that a book wraps
are joined (verse and plays keep theirs). Which documents are held out follows from their order alone.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT_EVERY = 25
PIECE_CHARS = 6000
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings"}
_CALCULATOR = re.compile(r"<<[^>]*>>")
_GUTENBERG = re.compile(r"\*\*\* ?START OF.*?\*\*\*(.*?)\*\*\* ?END OF", re.DOTALL)


@dataclass
class Corpus:
    """train, held_out: domain -> documents. repeats: how often an epoch has a domain's documents, where not once."""

    train: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, list[str]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)

    def repeat(self, wanted: list[str]) -> None:
        """Set repeats from "DOMAIN=TIMES". Raises ValueError."""
        for one in wanted:
            domain, _, times = one.rpartition("=")
            if domain not in self.train or not times.isdecimal() or int(times) < 1:
                allowed = " or ".join(f'"{name}=N"' for name in self.train)
                raise ValueError(f"cannot repeat {one!r}: give {allowed}, N at least 1")
            self.repeats[domain] = int(times)

    def add(self, domain: str, documents: list[str]) -> None:
        for at, document in enumerate(documents):
            part = self.held_out if at % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 else self.train
            part.setdefault(domain, []).append(document)

    def epoch(self, seed: int) -> Iterator[str]:
        """Every training document, shuffled; those of a repeated domain as often as `repeats` says."""
        documents = [text for domain, texts in self.train.items() for text in texts * self.repeats.get(domain, 1)]
        random.Random(seed).shuffle(documents)
        yield from documents


def read_corpus(folder: Path, *, standard_library: bool = True) -> Corpus:
    """Raises FileNotFoundError for a folder that is none or holds no text, ValueError for a .jsonl file of others."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one with .txt, .jsonl or .py files")
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl", ".py"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .txt, .jsonl or .py files: give a folder of text")
    found: dict[str, list[str]] = {}
    for path in files:
        domain, documents = _read(path)
        found.setdefault(domain, []).extend(documents)
    if standard_library:
        found.setdefault("Python", []).extend(_standard_library())
    corpus = Corpus()
    for domain, documents in found.items():
        corpus.add(domain, documents)
    return corpus


def _read(path: Path) -> tuple[str, list[str]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        return "Python", [text]
    if path.suffix == ".jsonl":
        try:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
            return "word problems", [_problem(record) for record in records]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: give one object a line, with question and answer, or text") from None
    return "prose", _pieces(text)


def _problem(record: dict[str, str]) -> str:
    """As the chat template writes them."""
    if "question" not in record:
        return record["text"]
    return f"Question: {record['question'].strip()}\nAnswer: {_CALCULATOR.sub('', record['answer']).strip()}"


def _pieces(text: str) -> list[str]:
    """Whole paragraphs, about PIECE_CHARS characters together."""
    book = _GUTENBERG.search(text)
    paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", (book[1] if book else text).replace("\r", ""))]
    pieces: list[str] = []
    current: list[str] = []
    for paragraph in filter(None, map(_unwrap, paragraphs)):
        current.append(paragraph)
        if sum(map(len, current)) >= PIECE_CHARS:
            pieces.append("\n\n".join(current))
            current = []
    return pieces + ["\n\n".join(current)] * bool(current)


def _unwrap(paragraph: str) -> str:
    """Joins lines that end where a page does; a speech or verse has short lines, and keeps them."""
    lines = [line.strip() for line in paragraph.split("\n")]
    wrapped = len(lines) > 1 and all(len(line) > 50 for line in lines[:-1])
    return (" " if wrapped else "\n").join(lines)


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in sorted(root.rglob("*.py")) if not _SKIPPED & set(path.relative_to(root).parts))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]
