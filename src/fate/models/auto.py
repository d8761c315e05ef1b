"""Which of transformers' Auto classes loads a configuration: the language model where there is one, whatever it is
otherwise made of.

>>> auto_class(AutoConfig.from_pretrained("Qwen/Qwen1.5-MoE-A2.7B")).__name__
'AutoModelForCausalLM'
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

# In order of preference: a family may be in several.
AUTO_CLASSES: tuple[Any, ...] = (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForTokenClassification,
)


def auto_class(config: PreTrainedConfig) -> Any:
    """The first Auto class that knows the configuration's type; AutoModelForCausalLM, whose error says so, if none."""
    return next((auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping), AutoModelForCausalLM)
