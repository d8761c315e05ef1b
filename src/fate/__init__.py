"""Fate: Mixture-of-Experts models that do not fit in memory, fast and exact.

>>> import fate
>>> model = fate.load("Qwen/Qwen1.5-MoE-A2.7B-Chat", memory="6GiB")

Importing fate also registers its store format with transformers, so that
`AutoModelForCausalLM.from_pretrained(store)` works. It imports neither transformers nor torch, which take seconds:
`fate.load` reads weights meanwhile, and the format is registered once transformers is imported.
"""

from typing import TYPE_CHECKING, Any

from fate.errors import FateError
from fate.loading import load
from fate.registration import register_with_transformers
from fate.systems import SYSTEMS, System

if TYPE_CHECKING:
    from fate.conversion import convert

__version__ = "0.1.0"
__all__ = ["SYSTEMS", "FateError", "System", "convert", "load"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fate.conversion import convert

    globals()[name] = convert
    return convert


def __dir__() -> list[str]:
    return sorted({*globals(), "convert"})
