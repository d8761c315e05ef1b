"""Ctrl-C during an answer: taken where nothing is under way, so that the experts in memory stay."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import fate
from cli_support import FAMILY
from fate import kernels
from fate.cli.interrupt import AnswerInterrupt
from tiny import tiny_store


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_experts_in_memory_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, real, due = torch.arange(200)[None], kernels.experts, []

    def compute(*args: Any) -> None:
        real(*args)
        if due:
            due.clear()
            press()

    monkeypatch.setattr(kernels, "experts", compute)
    with fate.load(tiny_store(FAMILY)) as model:

        def misses_after_ctrl_c(within: AbstractContextManager[object]) -> int:
            due.append("Ctrl-C")
            with within, pytest.raises(KeyboardInterrupt):
                model(ids)
            before = model.fate.stats()
            model(ids)
            return (model.fate.stats() - before).total.misses

        model(ids)
        assert misses_after_ctrl_c(AnswerInterrupt(model)) == 0
        assert misses_after_ctrl_c(nullcontext()) > 0, "what is raised while experts compute empties the cache"


def test_the_second_is_raised_at_once() -> None:
    with fate.load(tiny_store(FAMILY)) as model, AnswerInterrupt(model) as interrupt:
        press()
        assert not interrupt.insisted
        with pytest.raises(KeyboardInterrupt):
            press()
        assert interrupt.insisted


def test_outside_an_answer_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGINT)
    with fate.load(tiny_store(FAMILY)) as model:
        with AnswerInterrupt(model):
            press()
        assert signal.getsignal(signal.SIGINT) is before
        model(torch.arange(4)[None])
