"""The JSON document of a comparison, from whatever was measured; tables and plots are drawn from nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from fate.bench.comparison import Comparison, Workload, system_called
from fate.bench.environment import environment, peak_resident_bytes
from fate.bench.limits import Compute
from fate.bench.prompts import Request
from fate.bench.quality import Quality
from fate.bench.region import hit_region
from fate.bench.summary import PHASES, is_ours, system_row
from fate.bench.systems import Cell, Measured
from fate.fileio import replace_file
from fate.units import parse_experts


def document(
    store: Path, comparison: Comparison, workload: Workload, measured: Measured, quality: Quality | None = None
) -> dict[str, Any]:
    """Every number with its unit in its name; `cells` holds the finished ones, `complete` says whether that is all.

    measured.compute must be there: until then there is nothing to say.
    """
    compute = measured.compute
    assert compute is not None
    found: dict[str, Any] = {
        "bench": "systems",
        "store": store.name,
        "store_fingerprint": measured.fingerprint,
        "num_experts": measured.num_experts,
        "comparison": asdict(comparison),
        "workload": describe_workload(workload),
        "compute": asdict(compute),
        "disk_read_bytes_per_s": _disk_limit(measured),
        "complete": len(measured.cells) == len(comparison.cells),
        "cells": [_describe(cell, compute, measured) for cell in measured.cells],
        "peak_resident_bytes": peak_resident_bytes(),
        "environment": environment(),
    }
    found["speedups"] = speedups(found["cells"])
    found["hit_region"] = hit_region(found["cells"], comparison.systems)
    if quality is not None:
        found["perplexity"] = quality.describe()
    return found


def write_json(document: dict[str, Any], path: Path) -> None:
    """The whole document or, where something fails, nothing: `path` never holds half of one. Raises OSError."""
    replace_file(path, json.dumps(document, sort_keys=True) + "\n")


def describe_workload(workload: Workload) -> dict[str, Any]:
    request = workload.measured[0]
    return {
        "prompts": [measured.file for measured in workload.measured],
        "prompt_tokens": request.prompt_tokens,
        "new_tokens": request.new_tokens,
        "recorded_requests": len(workload.recorded),
        "token_ids_sha256": _digest([*workload.recorded, *workload.measured]),
    }


def _digest(requests: Sequence[Request]) -> str:
    digest = hashlib.sha256()
    for request in requests:
        digest.update(f"{request.prompt_tokens} {request.ids.tolist()}".encode())
    return digest.hexdigest()


def _describe(cell: Cell, compute: Compute, measured: Measured) -> dict[str, Any]:
    bytes_per_s = cell.link.bytes_per_s or _disk_limit(measured)
    total = measured.num_experts
    rows = {name: system_row(cell.runs, name, compute, bytes_per_s, cell.minimum) for name in cell.runs}
    for name, row in rows.items():
        row["exact"] = system_called(name).exact
        row["perplexity_change"] = cell.perplexity.get(name)
    return {
        "link": cell.link.name,
        "bytes_per_s": bytes_per_s,
        "rho": compute.rho(bytes_per_s),
        "experts": cell.experts,
        "share": (parse_experts(cell.experts, total) or total) / total,
        "systems": rows,
        "timelines": cell.timelines,
    }


def _disk_limit(measured: Measured) -> float:
    """The fastest the disk was ever seen to read: in probes, which it may have disturbed, or in a run."""
    phases = [
        run.phase(name)
        for cell in measured.cells
        if cell.link.bytes_per_s is None
        for runs in cell.runs.values()
        for run in runs
        for name in PHASES
    ]
    return max(measured.disk_bytes_per_s, *(phase.stats.bytes_moved / phase.seconds for phase in phases), 0.0)


def speedups(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per link, phase, system called fate or fate-..., and baseline: the median paired ratio at each budget
    (`by_experts`), its ceiling there (`at_most`, see `summary.overlap_ceiling`), the budget where it is largest."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    ceilings: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for cell in cells:
        ours = {system: row for system, row in cell["systems"].items() if is_ours(system)}
        for (system, row), phase in product(ours.items(), PHASES):
            for baseline, ratio in row[phase]["speedup_over"].items():
                key = (cell["link"], phase, system, baseline)
                found.setdefault(key, {})[cell["experts"]] = ratio["median"]
                if "at_most" in ratio:
                    ceilings.setdefault(key, {})[cell["experts"]] = ratio["at_most"]
    keys = ("link", "phase", "system", "over")
    return [
        {
            **dict(zip(keys, key)),
            "by_experts": ratios,
            "at_most": ceilings.get(key, {}),
            "best": max(ratios, key=ratios.__getitem__),
        }
        for key, ratios in found.items()
    ]
