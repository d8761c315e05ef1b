"""A few families of the sweep, one for each thing families differ in; `make families` runs all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweep.check import check_family
from sweep.discovery import find_adapted, find_composites, find_families, find_family
from sweep.table import DOCUMENT, RESULTS, render

ROOT = Path(__file__).resolve().parents[1]
SUBSET = {
    "aria": "transposed weights",
    "nemotron_h": "no gate projection, a latent width, and state-space layers",
    "muse_spark": "a norm after each expert",
    "deepseek_v4": "hash routing in its first layers: the router takes token ids",
    "ernie4_5_vl_moe": "one list of experts split between two modules",
    "diffusion_gemma": "an encoder's experts tied to its decoder's, and no language model's forward",
    "qwen3_vl_moe": "stacked experts that a converter transposes",
    "openai_privacy_filter": "a classifier, with biases",
    "jetmoe": "an adapter that replaces blocks; attention experts stay",
    "longcat_flash": "an adapter for experts that give back what they are given",
    "switch_transformers": "an adapter for an encoder-decoder model",
    "zaya": "a skip expert, and a router with state",
}


# Left to `make slow`: what takes long, or differs in little that the others here do not.
LONG = {"aria", "deepseek_v4", "diffusion_gemma", "jetmoe", "qwen3_vl_moe", "zaya"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in SUBSET])
def test_family(name: str) -> None:
    outcome = check_family(find_family(name))
    assert outcome.passed, outcome.reason


def test_discovery_finds_what_transformers_marks() -> None:
    names = {family.name for family in find_families()}
    assert len(names) >= 64
    assert {"mixtral", "qwen3_vl_moe", "openai_privacy_filter"} <= names
    assert "llama" not in names


def test_the_table_is_the_sweeps_result() -> None:
    result = json.loads((ROOT / RESULTS).read_text())
    assert {family["family"] for family in result["families"]} == {
        family.name for family in (*find_families(), *find_adapted(), *find_composites())
    }
    assert (ROOT / DOCUMENT).read_text() == render(result)
    assert [family["family"] for family in result["families"] if family["reason"]] == []
