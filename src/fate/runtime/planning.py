"""What a given model needs in memory: the rows of its plan, from the store and a dry run on the meta device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from fate.core import Envelope
from fate.memory import MIB, Needs, resident_bytes
from fate.store.format import StoreHeader
from fate.store.reader import DENSE_FILE, PACKED_FILE

DEFAULT_MAX_CONTEXT = 2048
DEFAULT_PREFILL_CHUNK = 512
LAYER_FLOOR = 1  # cached experts every layer keeps, whatever the budget
DEFAULT_LOGIT_BYTES = 64 * MIB
# Beyond what is resident when the plan is made: allocator slack, thread stacks, modules that generation imports.
RUNTIME_HEADROOM_BYTES = 160 * MIB


def top_k(model: PreTrainedModel) -> int:
    """Experts one token uses in one layer, by the config."""
    config = model.config.get_text_config()
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"):
        if isinstance(value := getattr(config, name, None), int) and value > 0:
            return value
    return 8


def transient_slots(model: PreTrainedModel, header: StoreHeader) -> int:
    """Slots of the region for guesses and waves: two tokens' worth of one layer."""
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
        dense=dense,
        kv_cache=_kv_bytes_per_token(model) * envelope.max_context * envelope.max_batch,
        buffers=_buffer_bytes(model, header, envelope),
        slot=header.max_record_bytes,
        min_slots=sum(min(LAYER_FLOOR, layer.num_experts) for layer in header.layers) + transient,
        max_slots=total + transient,
        total_experts=total,
    )


def _kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes one more token of one sequence adds to the cache, by two forwards that move no data."""

    def cache_bytes(tokens: int) -> int:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        with torch.no_grad(), torch.device("meta"):
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    return cache_bytes(3) - cache_bytes(2)


def _buffer_bytes(model: PreTrainedModel, header: StoreHeader, envelope: Envelope) -> int:
    """The most activations alive at once: one layer's, the experts' rows, the attention mask, and the logits."""
    config = model.config.get_text_config()
    tokens = envelope.max_tokens_per_forward
    item = model.dtype.itemsize
    widest = max(
        (m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features < 1 << 16),
        default=config.hidden_size,
    )
    expert_rows = tokens * top_k(model) * config.hidden_size * 4
    hidden = tokens * (12 * config.hidden_size + 4 * widest) * max(item, 4)
    mask = tokens * envelope.max_context * 2 * item
    logits = envelope.logit_rows * config.vocab_size * (item + 2 * 4)
    scratch = max(m.weights for layer in header.layers for m in layer.matrices) * 4 if header.codec[0] != "i" else 0
    return expert_rows + hidden + mask + logits + scratch
