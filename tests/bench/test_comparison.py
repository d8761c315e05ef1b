"""What is refused before a model is touched, and how much there is to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench_support import workload
from fate.bench.comparison import Comparison
from fate.errors import ExpertShareError, LinkSpeedError, UnknownNameError, UsageError

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
    assert comparison.num_cells == 9
    assert comparison.middle_experts == "50%"
    assert Comparison(("load-on-demand", "cross-layer-int2"), ("25%",)).lossy == ["cross-layer-int2"]


def test_settling_goes_round_the_recorded_requests() -> None:
    work = workload(recorded=3)  # which decode 4 tokens each
    assert [work.recorded[at].file for at in work.settling(17)] == ["file 3", "file 2", "file 1", "file 3", "file 2"]
    assert work.settling(0) == []
    assert workload(recorded=0).settling(17) == []
