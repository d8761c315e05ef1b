"""Where nearly all experts should hit: the cells in which what was predicted fits the idle link.

In a cell, the predicted bytes of a layer are those of the experts that it needed, that its cache did not hold and that
the predictor had named before routing was known (whether or not they arrived: a whole record each), and the bytes read
for experts that it named in vain; a mean over layers and decoded tokens. They *fit* where bytes / link bandwidth <=
compute time of a layer, both as measured: `predicted_link_share` <= 1. Where they fit, HIT_GOAL of the accesses should
be hits; elsewhere PERFECT_GOAL of the hits that a perfect predictor has there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fate.bench.summary import is_ours

HIT_GOAL = 0.99
PERFECT_GOAL = 0.95
_PHASE = "decode"


def hit_region(cells: Sequence[Mapping[str, Any]], systems: Sequence[str]) -> dict[str, Any] | None:
    """Of the first exact system of ours: {"system", "cells": one entry a cell}; None where none was measured.

    reached: whether the goal of the cell is; None where it takes a perfect predictor's run to say. A cell in which
    nothing was predicted (prefetching had switched itself off) has no share and does not count as one that fits.
    """
    ours = [name for name in systems if is_ours(name) and cells and cells[0]["systems"][name]["exact"]]
    if not ours:
        return None
    system = "fate" if "fate" in ours else ours[0]
    return {
        "system": system,
        "phase": _PHASE,
        "cells": [_entry(cell, cell["systems"][system][_PHASE]) for cell in cells],
    }


def _entry(cell: Mapping[str, Any], phase: Mapping[str, Any]) -> dict[str, Any]:
    share, of_perfect = phase["predicted_link_share"], phase.get("hits_of_perfect")
    fits = share is not None and share <= 1
    if fits:
        reached = phase["hit_rate"] >= HIT_GOAL
    else:
        reached = None if of_perfect is None else of_perfect >= PERFECT_GOAL
    return {
        **{name: cell[name] for name in ("link", "rho", "experts", "share")},
        "hit_rate": phase["hit_rate"],
        "predicted_link_share": share,
        "fits": fits,
        "hits_of_perfect": of_perfect,
        "reached": reached,
    }
