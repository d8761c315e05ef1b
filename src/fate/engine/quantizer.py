"""transformers' side of loading a store: `quant_method: "fate"`.

Imported in the middle of transformers' own import (`registration`), so it uses no more of transformers at first than
what a quantizer is made of. What it does with a model is in `installation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fate.store.files import DENSE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from fate.engine.assembly import LoadOptions
    from fate.engine.installation import Installation

METHOD = "fate"


@register_quantization_config(METHOD)
class FateConfig(QuantizationConfigMixin):
    """The `quantization_config` of a store's config.json, and (never saved) the options of this load."""

    def __init__(self, load_options: LoadOptions | None = None, **stored: Any) -> None:
        self.quant_method: Any = METHOD
        self.stored = {key: value for key, value in stored.items() if key != "quant_method"}
        self.load_options = load_options

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **self.stored}


@register_quantizer(METHOD)
class FateQuantizer(HfQuantizer):
    quantization_config: FateConfig

    def __init__(self, quantization_config: FateConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._installation: Installation | None = None

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The one hook that sees the config before files are resolved: name ours, and our experts function."""
        from fate.engine.backend import EXPERTS_FUNCTION

        config.transformers_weights = DENSE_FILE
        config._experts_implementation = EXPERTS_FUNCTION
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from fate.engine.installation import Installation

        assert checkpoint_files is not None
        config = self.quantization_config
        self._installation = Installation(model, Path(checkpoint_files[0]).parent, config.stored, config.load_options)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        assert self._installation is not None
        self._installation.finish(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
