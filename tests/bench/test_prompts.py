"""Requests from files: where a prompt ends, what is decoded after it, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fate.bench.prompts import Item, Prompts, Request, make_requests, read_prompts
from fate.errors import UsageError


def encode(text: str) -> list[int]:
    return list(text.encode())


def text_of(request: Request) -> tuple[str, str]:
    ids = bytes(request.ids[0].tolist())
    return ids[: request.prompt_tokens].decode(), ids[request.prompt_tokens :].decode()


def jsonl(path: Path, *items: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_gsm8k_and_humaneval(tmp_path: Path) -> None:
    gsm = jsonl(tmp_path / "gsm.jsonl", {"question": "How many?", "answer": "Two.\n#### 2"})
    assert read_prompts(gsm).items == (Item("How many?", "Two.\n#### 2"),)
    code = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "  pass\n"}
    assert read_prompts(jsonl(tmp_path / "code.jsonl", code)).items == (Item("def f():\n", "  pass\n"),)
    assert read_prompts(jsonl(tmp_path / "t.jsonl", {"text": "Once"}, {"text": "Twice"})).items == (
        Item("Once"),
        Item("Twice"),
    )


def test_a_prompt_ends_with_the_question_and_its_answer_is_decoded() -> None:
    items = (Item("Who is it?", "It is I."), Item("What is that now?", "An egg, he said."))
    (request,), _ = make_requests([Prompts(Path("a.jsonl"), items)], encode, 20, 8, 0)
    assert text_of(request) == ("I.\n\nWhat is that now?"[-20:], "\nAn egg,")


def test_a_solution_follows_its_prompt_directly() -> None:
    items = (Item("def function():\n", "    return 1\n"),)
    (request,), _ = make_requests([Prompts(Path("a.jsonl"), items)], encode, 10, 12, 0)
    assert text_of(request) == ("unction():\n"[-10:], "    return 1")


def test_short_answers_go_on_with_the_next_items() -> None:
    items = (Item("aaaaaaaa", "1"), Item("bbbb", "2"))
    (request,), _ = make_requests([Prompts(Path("a.jsonl"), items)], encode, 8, 8, 0)
    assert text_of(request) == ("aaaaaaaa", "\n1\n\nbbbb")


def test_requests_share_nothing_and_come_from_the_files_in_turn(tmp_path: Path) -> None:
    letters = Prompts(Path("letters.txt"), (Item("abcdefghijklmnopqrstuvwxyz"),))
    digits = Prompts(Path("digits.txt"), (Item("0123456789"),))
    measured, recorded = make_requests([letters, digits], encode, 3, 1, 3)
    assert [text_of(request) for request in measured] == [("abc", "d"), ("012", "3")]
    assert [text_of(request) for request in recorded] == [("efg", "h"), ("456", "7"), ("ijk", "l")]
    assert [request.file for request in recorded] == ["letters.txt", "digits.txt", "letters.txt"]
    assert measured[0].new_tokens == 1


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(UsageError) as error:
        make_requests([Prompts(Path("some/digits.txt"), (Item("0123456789"),))], encode, 3, 1, 2)
    assert re.match(r"some/digits\.txt is enough for 2 requests of 3 \+ 1 tokens, 3 are needed .*: ", str(error.value))


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"query": "a", "id": 3}\n', r"line 1 has no text in prompt, question, text \(it has query, id\)"),
        (b'{"prompt": "a"}\n\n{"prompt": ""}\n', r"line 3 has no text in prompt, question, text \(it has prompt\)"),
        (b'{"prompt": 3}\n', r"line 1 has no text in"),
        (b"{}\n", r"\(it has nothing\)"),
        (b'{"prompt": "a"}\nplain\n', r"line 2 is not a JSON object: give jsonl, or text in a file not called \.jsonl"),
        (b"[1]\n", r"line 1 is not a JSON object"),
        (b"\xff\xfe\x00\x01", r"is not UTF-8 text: give a text file"),
        (b" \n\n", r"has no text: give a text file with some"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_prompts(file)
    assert re.search(words, str(error.value)), str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_the_folder_of_prompts(shared_data: Path) -> None:
    files = [
        read_prompts(shared_data / "prompts" / name) for name in ("gsm8k_train_400.jsonl", "humaneval_first_82.jsonl")
    ]
    measured, recorded = make_requests(files, encode, 400, 100, 6)
    assert (len(measured), len(recorded)) == (2, 6)
    assert all(request.ids.shape == (1, 500) for request in (*measured, *recorded))
    assert text_of(measured[1])[1].startswith("    "), "a solution"
