"""Fate: Mixture-of-Experts models that do not fit in memory, fast and exact.

>>> import fate
>>> model = fate.load("Qwen/Qwen1.5-MoE-A2.7B-Chat", memory="6GiB")

Importing fate also registers its store format with transformers, so that
`AutoModelForCausalLM.from_pretrained(store)` works. It imports neither transformers nor torch, which take seconds:
`fate.load` reads weights meanwhile, and the format is registered once transformers is imported.
"""

from fate.convert import convert
from fate.errors import FateError
from fate.load import load
from fate.registration import register_with_transformers
from fate.systems import SYSTEMS, System

__version__ = "0.1.0"
__all__ = ["SYSTEMS", "FateError", "System", "convert", "load"]

register_with_transformers()
