"""What is refused before a model is touched, and how much there is to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench_support import workload
from fate.bench.comparison import Comparison, system_called
from fate.errors import ExpertShareError, LinkSpeedError, NeedsFutureError, UnknownNameError, UsageError
from fate.systems import resolve_system

GOOD: dict[str, Any] = {"systems": ("load-on-demand",), "experts": ("25%",)}


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"systems": ("load-on-demand", "fastest")}, UnknownNameError, "unknown system 'fastest': choose one of"),
        ({"experts": ("25%", "0%")}, ExpertShareError, "experts '0%' is not valid"),
        ({"links": ("disk", "0")}, LinkSpeedError, "link speed '0' is not valid: write a positive"),
        ({"links": ("disc",)}, LinkSpeedError, "link speed 'disc' is not valid"),
        ({"rhos": (-1.0,)}, UsageError, "rho -1.0 is not valid: give a positive number"),
        ({"rhos": (math.nan,)}, UsageError, "rho nan is not valid"),
        ({"rhos": (math.inf,)}, UsageError, "rho inf is not valid"),
        ({"systems": ()}, UsageError, "nothing to compare: give at least one name to --systems"),
        ({"experts": ()}, UsageError, "give at least one name to --experts"),
        ({"links": ()}, UsageError, "give at least one name to --link"),
        ({"systems": ("load-on-demand",) * 2}, UsageError, "--systems load-on-demand,load-on-demand names one twice"),
    ],
)
def test_a_comparison_that_is_none(changes: dict[str, Any], error: type[UsageError], words: str) -> None:
    with pytest.raises(error) as info:
        Comparison(**{**GOOD, **changes})
    assert words in str(info.value)


def test_cells_are_links_times_budgets() -> None:
    comparison = Comparison(("load-on-demand",), ("25%", "50%", "75%"), ("disk", "1GB/s"), (0.5,))
    assert comparison.cells[2:7] == [
        *(("disk", "75%"), ("1GB/s", "25%"), ("1GB/s", "50%")),
        ("1GB/s", "75%"),
        ("ρ 0.5", "25%"),
    ]
    assert len(comparison.cells) == 9
    assert comparison.middle_experts == "50%"
    assert Comparison(("load-on-demand", "cross-layer-int2"), ("25%",)).lossy == ["cross-layer-int2"]


def test_an_oracle_can_be_compared_and_nothing_else() -> None:
    assert Comparison(("fate-oracle",), ("25%",)).lossy == []
    assert system_called("fate-oracle-far").prefetches
    with pytest.raises(NeedsFutureError, match="which only fate bench systems has"):
        resolve_system("fate-oracle")


def test_the_warm_up_goes_on_from_the_last_recorded_request() -> None:
    work = workload(recorded=3)  # which decode 4 tokens each, of 16
    assert [request.file for request in work.warm_up(12)] == ["file 1", "file 2", "file 3"]
    more = work.warm_up(12 + 14 + 14 + 3)
    assert [request.file for request in more[3:]] == ["file 3", "file 2", "file 1"]
    assert [(r.prompt_tokens, r.new_tokens) for r in more[3:]] == [(2, 14), (2, 14), (2, 3)]
    assert more[5].ids.tolist() == work.recorded[0].ids[:, -5:].tolist()
    assert workload(recorded=0).warm_up(17) == []
