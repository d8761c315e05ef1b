"""What a given model needs in memory: the rows of its plan, from the store and a dry run on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental import _config
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fate.core import Envelope
from fate.kernels import decode, native, threads
from fate.models.adapters import Adaptation, adaptation
from fate.models.decode.latent import key_up_bytes, latent_width
from fate.plan.budget import Needs
from fate.plan.machine import resident_bytes
from fate.store.format import RecordLayout, StoreHeader
from fate.store.reader import DENSE_FILE, PACKED_FILE
from fate.units import MIB

DEFAULT_MAX_CONTEXT = 2048
LAYER_FLOOR = 1  # cached experts every layer keeps, whatever the budget
DEFAULT_LOGIT_BYTES = 64 * MIB
# Beyond what is resident when the plan is made: allocator slack, thread stacks, modules that generation imports.
RUNTIME_HEADROOM_BYTES = 160 * MIB


def top_k(model: PreTrainedModel) -> int:
    """Experts one token uses in one layer, by the config."""
    if (adapted := (adaptation(model) or Adaptation()).top_k) is not None:
        return adapted
    config = model.config.get_text_config()
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"):
        if isinstance(value := getattr(config, name, None), int) and value > 0:
            return value
    return 8


def transient_slots(model: PreTrainedModel, header: StoreHeader) -> int:
    """Slots of the region for prefetches and waves: two tokens' worth of one layer."""
    return min(max(2 * top_k(model), 4), max(layer.num_experts for layer in header.layers))


def resolve_envelope(
    model: PreTrainedModel, max_context: int | None, max_batch: int, prefill_chunk: int, logit_rows: int | None
) -> Envelope:
    """Defaults filled in: the model's own context up to DEFAULT_MAX_CONTEXT, and the logit rows that cost little."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_MAX_CONTEXT
    context = max_context or min(limit, DEFAULT_MAX_CONTEXT)
    chunk = min(prefill_chunk, context)
    rows = logit_rows or default_logit_rows(model, max_batch * chunk, max_batch)
    return Envelope(context, max_batch, chunk, rows)


def default_logit_rows(model: PreTrainedModel, max_tokens: int, max_batch: int) -> int:
    """As many rows as DEFAULT_LOGIT_BYTES hold in float32, at least one a sequence, at most one a token."""
    row_bytes = 4 * model.config.get_text_config().vocab_size
    return max(max_batch, min(max_tokens, DEFAULT_LOGIT_BYTES // row_bytes))


def dense_bytes(store: Path) -> int:
    """Bytes of the weights that stay resident."""
    return sum(file.stat().st_size for name in (DENSE_FILE, PACKED_FILE) if (file := store / name).is_file())


def measure_needs(model: PreTrainedModel, header: StoreHeader, dense: int, envelope: Envelope) -> Needs:
    """The plan's rows for `model` (on the meta device, experts function "fate") with the experts of `header`."""
    transient = transient_slots(model, header)
    total = header.num_records
    return Needs(
        runtime=resident_bytes() + RUNTIME_HEADROOM_BYTES,
        dense=dense + key_up_bytes(model, model.dtype.itemsize),
        kv_cache=kv_bytes(model, envelope),
        buffers=_buffer_bytes(model, header, envelope),
        slot=header.max_record_bytes,
        min_slots=sum(min(LAYER_FLOOR, layer.num_experts) for layer in header.layers) + transient,
        max_slots=total + transient,
        total_experts=total,
    )


def kv_bytes(model: PreTrainedModel, envelope: Envelope) -> int:
    """Bytes of the cache at the end of the envelope, by forwards that move no data: what grows with each token, and,
    where there are layers of other kinds than attention's, what a sequence has from the start (the states of linear
    attention and convolutions), by a second forward of another length."""
    if not model.can_generate():
        return 0
    settings: Any = _config  # torch's own switch for a `nonzero` of the meta device

    def cache_layers(tokens: int) -> list[Any]:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        with torch.no_grad(), torch.device("meta"), settings.patch(meta_nonzero_assume_all_nonzero=True):
            if model.config.is_encoder_decoder:
                encoded: Any = model.get_encoder()(ids)
                both = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True).past_key_values
                return [*both.self_attention_cache.layers, *both.cross_attention_cache.layers]
            cache: Any = getattr(model(ids, use_cache=True, logits_to_keep=1), "past_key_values", None)
            if not hasattr(cache, "layers"):
                raise NotImplementedError("a cache of the model's own kind, or none")
            return list(cache.layers)

    try:
        layers = cache_layers(2)
        two = sum(map(_layer_bytes, layers))
        if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            return envelope.max_batch * envelope.max_context * two // 2
        three = sum(map(_layer_bytes, cache_layers(3)))
    except (RuntimeError, NotImplementedError):  # or its forward asks for values, of which there are none
        return envelope.max_batch * envelope.max_context * _ordinary_kv_bytes(model)
    return envelope.max_batch * (two - 2 * (three - two) + (three - two) * envelope.max_context)


def _layer_bytes(layer: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(vars(layer)))


def _ordinary_kv_bytes(model: PreTrainedModel) -> int:
    """Bytes a token of full attention in every layer: as much as any kind of layer keeps."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * int(config.num_hidden_layers * heads * _head_dim(config) * model.dtype.itemsize)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _buffer_bytes(model: PreTrainedModel, header: StoreHeader, envelope: Envelope) -> int:
    """The most activations alive at once: one layer's, the experts' rows, attention over the context, the logits."""
    config = model.config.get_text_config()
    tokens = envelope.max_tokens_per_forward
    item = model.dtype.itemsize
    widest = max(
        (m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features < 1 << 16),
        default=config.hidden_size,
    )
    expert_rows = tokens * top_k(model) * config.hidden_size * 4
    hidden = tokens * (12 * config.hidden_size + 4 * widest) * max(item, 4)
    context = envelope.max_batch * envelope.max_context
    heads = config.num_attention_heads
    expanded = 2 * context * heads * _head_dim(config) * item  # keys and values repeated or unfolded for every head
    mask = tokens * envelope.max_context * 2 * item
    if model.config._attn_implementation == "eager":
        mask += heads * tokens * envelope.max_context * (item + 4)  # scores, and their softmax in float32
    logits = envelope.logit_rows * config.vocab_size * (item + 2 * 4)
    layouts = [header.layout(index) for index in range(len(header.layers))]
    scratch = 4 * max((m.weights for layout in layouts if layout.is_raw for m in layout.matrices), default=0)
    inputs = (m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    num_experts = max(layer.num_experts for layer in header.layers)
    widest_input = max(latent_width(model), max(inputs, default=config.hidden_size))
    kernel = _kernel_scratch(layouts, tokens, config.hidden_size, widest_input, num_experts)
    return expert_rows + hidden + expanded + mask + logits + scratch + kernel


def _head_dim(config: PreTrainedConfig) -> int:
    latent = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    layers: Any = getattr(config, "per_layer_config", None) or [config]
    own = max(getattr(layer, "head_dim", None) or config.hidden_size // config.num_attention_heads for layer in layers)
    return max(latent, own, getattr(config, "v_head_dim", None) or 0)


def _kernel_scratch(layouts: list[RecordLayout], tokens: int, hidden: int, widest_input: int, num_experts: int) -> int:
    """What the CPU kernels of a forward keep, by their own count; nothing where torch does their work."""
    if native.extension() is None:
        return 0
    return decode.scratch_bytes(layouts, tokens, hidden, widest_input, threads.count(), num_experts)
