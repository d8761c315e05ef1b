"""config.json of a checkpoint or store, as it is and as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from fate.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError


def transformers_config(path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """config.json of a checkpoint or store as transformers reads it.

    Raises ModelNotFoundError where there is none, CheckpointError where it is damaged, UnsupportedModelError where
    transformers does not know the model type.
    """
    raw = read_checkpoint_config(path)
    model_type = raw.get("model_type")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        if model_type in CONFIG_MAPPING:
            raise CheckpointError(
                f"{path}/config.json is not a valid config of model type {model_type!r} ({reason}): download it again"
            ) from error
        if "auto_map" not in raw:
            fix = "use a model that it supports"
        elif trust_remote_code:
            fix = f"the code that comes with it does not run with it ({reason})"
        else:
            fix = "its code comes with the checkpoint: pass trust_remote_code (--trust-remote-code) if you trust it"
        raise UnsupportedModelError(
            f"{path} has model type {model_type!r}, which the installed transformers does not know: {fix}"
        ) from error


def read_checkpoint_config(path: Path) -> dict[str, Any]:
    """config.json as it is; ModelNotFoundError where there is none, CheckpointError where it is no JSON object."""
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{path} has no config.json: give the directory of a Hugging Face checkpoint, or a hub id"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}/config.json is not valid JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}/config.json is not a JSON object: download it again")
    return config
