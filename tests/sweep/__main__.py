"""The whole sweep: `make families`. Writes docs/results/families.json and docs/families.md, and ends with a line
`N passed, M failed`; exit code 1 where too many fail.

>>> python -m sweep mixtral gpt_oss   # these families only, nothing is written
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from sweep.check import Outcome, check_family
from sweep.discovery import find_adapted, find_composites, find_families, find_family
from sweep.table import DOCUMENT, RESULTS, render


def main(names: list[str]) -> int:
    _hush()
    families = (
        [find_family(name) for name in names] if names else [*find_families(), *find_adapted(), *find_composites()]
    )
    outcomes = []
    for family in families:
        start = time.perf_counter()
        outcome = check_family(family)
        outcomes.append(outcome)
        verdict, seconds = "pass" if outcome.passed else "FAIL", time.perf_counter() - start
        print(f"{verdict}  {family.name:<24}{seconds:5.1f} s  {outcome.reason}")
    if not names:
        _write(outcomes)
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _write(outcomes: list[Outcome]) -> None:
    root = Path(__file__).resolve().parents[2]
    result = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "families": [asdict(outcome) for outcome in outcomes],
    }
    (root / RESULTS).write_text(json.dumps(result, indent=1) + "\n")
    (root / DOCUMENT).write_text(render(result))


def _hush() -> None:
    """Sixty models' warnings hide the outcome."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
