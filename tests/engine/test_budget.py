"""The budget is hard: a real run's peak resident memory stays within it."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from fate.tools.synth.store import synth
from fate.units import MIB

RUN = """
import json, sys, torch, fate
from fate.bench.environment import peak_resident_bytes
from fate.errors import BudgetTooSmallError
store, memory, tokens, experts = sys.argv[1], sys.argv[2], int(sys.argv[3]), None
if memory == "smallest":
    try:
        fate.load(store, memory=1, max_context=tokens + 64)
    except BudgetTooSmallError as refusal:
        memory, experts = refusal.smallest_bytes, 1
with fate.load(store, memory=int(memory), experts=experts, max_context=tokens + 64) as model:
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    model.generate(ids, max_new_tokens=48, do_sample=False)
    stats = model.fate.stats()
    peak = peak_resident_bytes()
    print(json.dumps({"peak": peak, "budget": model.fate.plan.budget, "planned": model.fate.plan.total,
                      "slots": model.fate.plan.num_slots, "decode": stats.decode.forwards,
                      "evictions": stats.total.evictions}))
"""


def run(store, memory, tokens, env=None):
    """The run's own figures; fails with its standard error if it was killed."""
    command = [sys.executable, "-c", RUN, str(store), str(memory), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def memory_cgroup(limit):
    """A memory cgroup (v1) of `limit` bytes; yields a wrapper of a command line, skips where it cannot be had."""
    root = Path("/sys/fs/cgroup/memory")
    group = root / f"fate-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


@pytest.fixture(scope="module")
def full_width_store(tmp_path_factory):
    """Two layers of Qwen1.5-MoE at full width: 120 experts of 4.6 MiB."""
    return synth("qwen1.5-moe-a2.7b", tmp_path_factory.mktemp("synth") / "qwen", num_layers=2)


def test_the_smallest_budget_is_kept(mini_store):
    figures = run(mini_store, "smallest", 900)
    assert figures["peak"] <= figures["budget"]
    assert figures["decode"] == 47
    assert figures["evictions"] > 0, figures


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [40, 1500])
def test_full_width_experts_keep_the_budget(full_width_store, tokens):
    budget = 1400 * MIB
    figures = run(full_width_store, budget, tokens)
    assert figures["planned"] <= budget
    assert figures["peak"] <= budget
    assert figures["peak"] > 0.6 * budget, "the budget is used, not just kept"
    assert figures["evictions"] > 0, figures


@pytest.mark.slow
def test_inside_a_cgroup_of_exactly_the_budget(full_width_store):
    budget = 1400 * MIB
    with memory_cgroup(budget) as group:
        code = f"open('{group}/cgroup.procs', 'w').write('0')\n" + RUN
        command = [sys.executable, "-c", code, str(full_width_store), str(budget), "900"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "oom_kill 0" in (group / "memory.oom_control").read_text()
        assert json.loads(done.stdout.splitlines()[-1])["evictions"] > 0
