"""Going on with a comparison that was cut short: the cells of its JSON stand, if they were measured in the same way.

Links and budgets may be added. Everything else that decides what a cell measures must be what it was: the store, the
requests, the systems and settings, the machine and the code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fate.bench.comparison import DISK, Comparison, Link, Workload
from fate.bench.environment import environment
from fate.bench.limits import Compute
from fate.bench.quality import Quality
from fate.bench.report import describe_workload
from fate.bench.summary import PHASES, repeated_run
from fate.bench.systems import Cell, Measured
from fate.errors import UsageError

_AXES = ("links", "rhos", "experts")


def read_comparison(file: Path) -> dict[str, Any]:
    """The document in `file`; raises UsageError where there is none of a comparison."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--resume {file}: there is no such file: start with --json {file}") from None
    except OSError as error:
        raise UsageError(f"--resume {file} cannot be read ({error.strerror}): give the JSON of a comparison") from None
    except ValueError:
        raise _foreign(file) from None
    if not isinstance(saved, dict) or saved.get("bench") != "systems" or "store_fingerprint" not in saved:
        raise _foreign(file)
    return saved


def resume(
    file: Path,
    saved: Mapping[str, Any],
    fingerprint: str,
    comparison: Comparison,
    workload: Workload,
    quality: Quality | None = None,
) -> Measured:
    """What `saved`, of `file`, holds of `comparison`. fingerprint: of the store that is there now.

    Raises UsageError, in one line, where it was another comparison.
    """
    try:
        _check(file, saved, fingerprint, comparison, workload, quality)
        return Measured(
            saved["num_experts"],
            saved["store_fingerprint"],
            Compute(**saved["compute"]),
            saved["disk_read_bytes_per_s"],
            [_cell(cell, len(workload.measured), comparison) for cell in saved["cells"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _foreign(file) from None


def _foreign(file: Path) -> UsageError:
    return UsageError(
        f"--resume {file} is no comparison that this version of fate bench systems wrote: give the file of its --json"
    )


def _check(
    file: Path,
    saved: Mapping[str, Any],
    fingerprint: str,
    comparison: Comparison,
    workload: Workload,
    quality: Quality | None,
) -> None:
    settings = {name: value for name, value in asdict(comparison).items() if name not in _AXES}
    now = {
        "store": fingerprint,
        **describe_workload(workload),
        **json.loads(json.dumps(settings)),  # tuples are lists in the file
        "perplexity text": quality.settings() if quality is not None else None,
        **environment(),
    }
    then = {
        "store": saved["store_fingerprint"],
        **saved["workload"],
        **saved["comparison"],
        "perplexity text": saved["perplexity"]["settings"] if "perplexity" in saved else None,
        **saved["environment"],
    }
    for name, value in now.items():
        if then.get(name) != value:
            what = "choice of --plots" if name == "timelines" else name.replace("_", " ")
            raise UsageError(
                f"--resume {file} was measured with another {what} ({_short(then.get(name))}, now {_short(value)}): "
                "ask for the same, or start afresh with --json"
            )
    for cell in saved["cells"]:
        if (cell["link"], cell["experts"]) not in comparison.cells:
            raise UsageError(
                f"--resume {file} has a cell of link {cell['link']} with {cell['experts']} of the experts, which "
                "is not asked for now: name all links and shares of the file, and any others"
            )


def _short(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cell(cell: Mapping[str, Any], num_requests: int, comparison: Comparison) -> Cell:
    rows = cell["systems"]
    runs = {
        name: [repeated_run(repeat, num_requests, row["slots"], row["notes"]) for repeat in row["repeats"]]
        for name, row in ((name, rows[name]) for name in comparison.systems)
    }
    some = rows[comparison.systems[0]]
    return Cell(
        Link(cell["link"], None if cell["link"] == DISK else cell["bytes_per_s"]),
        cell["experts"],
        runs,
        {phase: some[phase]["belady_bytes_per_token"] for phase in PHASES},
        cell["timelines"],
        {name: rows[name]["perplexity_change"] for name in comparison.lossy if rows[name]["perplexity_change"]},
    )
