"""A long prompt through `generate`: in chunks, within the smallest budget, with the full one's output.

The vocabulary is wide, so that keeping the logits of every token (128 MiB or 512) would break the budget.
"""

import json
import subprocess
import sys

import pytest
import torch

import fate
from tiny import tiny_store

RUN = """
import json, sys, torch, fate
from fate.bench.environment import peak_resident_bytes
from fate.errors import BudgetTooSmallError

limits = {"max_context": int(sys.argv[2]) + 64, "logit_rows": 1}
try:
    fate.load(sys.argv[1], memory=1, **limits)
except BudgetTooSmallError as refusal:
    smallest = refusal.smallest_bytes
with fate.load(sys.argv[1], memory=smallest, experts=1, **limits) as model:
    rows = []
    model.register_forward_hook(lambda module, args, output: rows.append(output.logits.shape[1]))
    prompt = torch.randint(0, 256, (1, int(sys.argv[2])), generator=torch.Generator().manual_seed(0))
    out = model.generate(prompt, max_new_tokens=32, do_sample=False, pad_token_id=0)
    stats = model.fate.stats()
    print(json.dumps({
        "new": out[0, prompt.shape[1]:].tolist(),
        "logit_rows": max(rows),
        "chunks": [stats.prefill.forwards, stats.prefill.tokens],
        "demanded_again": stats.total.misses - stats.total.first_accesses,
        "peak": peak_resident_bytes(),
        "budget": model.fate.plan.budget,
        "planned": model.fate.plan.total,
    }))
"""


@pytest.fixture(scope="module")
def store():
    return tiny_store("qwen2_moe", vocab_size=32768, max_position_embeddings=8192, eos_token_id=None)


@pytest.fixture(scope="module", params=[1024, pytest.param(4096, marks=pytest.mark.slow)])
def tokens(request):
    return request.param


@pytest.fixture(scope="module")
def smallest(store, tokens):
    """What a process of its own, in the smallest legal budget, says of its run."""
    command = [sys.executable, "-c", RUN, str(store), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_output_is_that_of_the_full_budget(store, smallest, tokens):
    prompt = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    with fate.load(store, max_context=tokens + 64, logit_rows=1) as model:
        assert model.fate.plan.num_slots == model.fate.plan.needs.max_slots
        new = model.generate(prompt, max_new_tokens=32, do_sample=False, pad_token_id=0)[0, tokens:].tolist()
    assert smallest["new"] == new
    assert smallest["demanded_again"] > 0, "experts had to leave, or the budgets are the same"
    assert len(set(new)) > 2, "an output that says something"


def test_it_goes_in_chunks_with_one_row_of_logits(smallest, tokens):
    assert smallest["chunks"] == [tokens // 512, tokens]
    assert smallest["logit_rows"] == 1


def test_the_peak_is_within_the_plan(smallest):
    assert smallest["peak"] <= smallest["planned"] <= smallest["budget"]
    assert smallest["budget"] - smallest["planned"] < 64 << 20, "the budget was the smallest"
