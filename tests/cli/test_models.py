"""Checkpoints and stores that are missing, damaged or of the wrong kind: one line, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cli_support import FAMILY, Cli, Refuse, copied, flip
from fate.store.format import PREAMBLE_BYTES
from fate.store.reader import DENSE_FILE, EXPERTS_FILE, PACKED_FILE, StoreReader
from tiny import tiny_checkpoint, tiny_store


def dense_model(path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).save_pretrained(path)
    return path


def changed(path: Path, change: Callable[[Path], None]) -> Path:
    copied(tiny_checkpoint(FAMILY), path)
    change(path)
    return path


def shard(path: Path) -> Path:
    return sorted(path.glob("model-*.safetensors"))[1]


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


BAD_SOURCES = {
    "dense": (dense_model, 2, r"'llama'.*expert"),
    "unknown architecture": (
        lambda path: changed(path, lambda p: edit_config(p, model_type="unheard_of")),
        2,
        r"'unheard_of'.*use a model that it supports",
    ),
    "missing shard": (
        lambda path: changed(path, lambda p: shard(p).unlink()),
        1,
        r"lacks model-00002-.*: download the checkpoint again",
    ),
    "truncated shard": (
        lambda path: changed(path, lambda p: os.truncate(shard(p), shard(p).stat().st_size - 9)),
        1,
        r"model-00002-.* is cut short.*download it again",
    ),
    "config that is no JSON": (
        lambda path: changed(path, lambda p: (p / "config.json").write_text("{")),
        1,
        r"config\.json is not valid JSON.*download it again",
    ),
    "no config": (
        lambda path: changed(path, lambda p: (p / "config.json").unlink()),
        2,
        r"has no config\.json: give the directory of",
    ),
    "quantized": (
        lambda path: changed(path, lambda p: edit_config(p, quantization_config={"quant_method": "aqlm"})),
        2,
        r"'aqlm'\): known are .*; convert the unquantized checkpoint",
    ),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_bad_checkpoint(refuse: Refuse, tmp_path: Path, kind: str) -> None:
    make, code, words = BAD_SOURCES[kind]
    source = make(tmp_path / "source")
    for command in ("run", "convert", "inspect"):
        line = refuse(code, command, source, *(["prompt"] if command == "run" else []))
        assert re.search(words, line), (command, line)
        assert not list(tmp_path.rglob("*.partial"))


COMMANDS = ["run", "convert", "inspect", "eval", "bench text"]
NAMES = ["no-such-directory", "org/name", "a file", "/no/such/path", ""]


@pytest.mark.parametrize("command, name", [*((c, NAMES[0]) for c in COMMANDS), *(("convert", n) for n in NAMES[1:])])
def test_a_model_that_is_nowhere(refuse: Refuse, command: str, name: str, tmp_path: Path) -> None:
    Path("a file").write_text("x")
    (tmp_path / "text.txt").write_text("x")
    text = ["--text", tmp_path / "text.txt"]
    more = {"run": ["prompt"], "eval": text, "bench text": text}
    line = refuse(2, *command.split(), name, *more.get(command, []))
    assert repr(name) in line
    assert "directory" in line


BAD_STORES = {
    "experts cut short": (lambda s: os.truncate(s / EXPERTS_FILE, 30000), r"experts\.fate is cut short"),
    "experts empty": (lambda s: os.truncate(s / EXPERTS_FILE, 0), r"experts\.fate"),
    "dense cut short": (lambda s: os.truncate(s / DENSE_FILE, 5000), r"dense\.safetensors cannot be read"),
    "packed missing": (lambda s: (s / PACKED_FILE).unlink(), r"packed\.safetensors cannot be read"),
    "header damaged": (lambda s: flip(s / EXPERTS_FILE, PREAMBLE_BYTES + 5), r"the header is damaged"),
    "dense damaged": (lambda s: flip(s / DENSE_FILE, (s / DENSE_FILE).stat().st_size - 9), r"is damaged"),
    "another version": (lambda s: flip(s / EXPERTS_FILE, 8), r"format version \d+, this fate reads versions 2 and 3"),
    "another model": (
        lambda s: shutil.copy(tiny_store("mixtral") / EXPERTS_FILE, s / EXPERTS_FILE),
        r"experts of another conversion than .*config\.json",
    ),
    "no config": (lambda s: (s / "config.json").unlink(), r"config\.json cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_STORES)
def test_a_bad_store(refuse: Refuse, tmp_path: Path, kind: str) -> None:
    damage, words = BAD_STORES[kind]
    store = copied(tiny_store(FAMILY), tmp_path / "store")
    damage(store)
    for command in ("run", "inspect"):
        line = refuse(1, command, store, *(["prompt"] if command == "run" else []), stores=1)
        assert re.search(words, line), (command, line)
        assert re.search(r"convert the checkpoint again|convert it again", line), (command, line)


def test_a_flipped_byte_in_an_expert(cli: Cli, tmp_path: Path) -> None:
    store = copied(tiny_store(FAMILY), tmp_path / "store")
    reader = StoreReader(store)
    reader.close()
    for expert in range(8):
        flip(store / EXPERTS_FILE, reader.header.record_offset(1, expert) + 100)
    result = cli("run", store, "prompt", "--quiet")
    assert result.code == 1
    assert re.fullmatch(r"error: .*layer 1 expert \d is damaged .*: convert the checkpoint again\n", result.err)
    assert not [t for t in threading.enumerate() if t.name.startswith("fate-transfer")]


@pytest.mark.parametrize("command", ["run", "eval", "bench text"])
def test_a_store_without_a_tokenizer(refuse: Refuse, tmp_path: Path, command: str) -> None:
    store = copied(tiny_store(FAMILY), tmp_path / "store")
    (store / "tokenizer.json").write_text("{}")
    (tmp_path / "text.txt").write_text("x")
    more = ["prompt"] if command == "run" else ["--text", tmp_path / "text.txt"]
    line = refuse(1, *command.split(), store, *more, stores=1)
    assert "has no tokenizer that transformers can load" in line
    assert "copy the model's tokenizer files" in line
