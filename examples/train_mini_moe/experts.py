"""A trainable experts function: tokens sorted by expert, one product an expert, all else in one piece.

transformers' own experts functions index and mask in Python for every expert, or call a grouped product, which on a CPU
is slower than the products one by one. Here only the products are taken one by one, into slices of one result, and
neither direction scatters: a token's gradient is gathered from its `top_k` rows, as its output is. Unlike products
padded to the busiest expert, it costs the same however skewed routing is, as it is when training begins. An expert's
rows are padded to a multiple of ROWS all the same: oneDNN prepares a product for each new shape, which takes ten times
as long as the product (15 against 2 ms for 60 experts of 192 x 128). Works on CUDA unchanged.

>>> register()
>>> model = AutoModelForCausalLM.from_config(config, experts_implementation=NAME)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "sorted"
ROWS = 16


def register() -> None:
    """Make the function known to transformers as `NAME`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts)


def sorted_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' contract: hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens,
    hidden]. For gated SiLU experts without biases (gate_up_proj [experts, 2 * inner, hidden], down_proj [experts,
    hidden, inner]); computes in autocast's dtype where that is on."""
    dtype, device = hidden_states.dtype, hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    weights = (experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype))
    out = _SortedExperts.apply(hidden_states.to(dtype), *weights, top_k_index, top_k_weights.to(dtype))
    return out.to(hidden_states.dtype)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Where each (token, rank) pair is computed: in rows sorted by expert, each expert's a multiple of ROWS.

    row_of_pair: [tokens * k]. token_of_row, pair_of_row: [rows]; one past the last where the row is padding. counts:
    rows of each expert.
    """

    row_of_pair: Tensor
    token_of_row: Tensor
    pair_of_row: Tensor
    counts: list[int]
    top_k: int

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> _Rows:
        expert_of_pair, top_k = top_k_index.reshape(-1), top_k_index.shape[1]
        counts = torch.bincount(expert_of_pair, minlength=num_experts)
        padded = (counts + ROWS - 1) // ROWS * ROWS
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)  # of an expert's rows by earlier padding
        pairs = expert_of_pair.argsort(stable=True)
        rows = torch.arange(len(pairs), device=pairs.device) + shift[expert_of_pair[pairs]]
        row_of_pair = torch.empty_like(pairs).scatter_(0, pairs, rows)
        pair_of_row = pairs.new_full((int(padded.sum()),), len(pairs)).scatter_(0, rows, pairs)
        return cls(row_of_pair, pair_of_row // top_k, pair_of_row, padded.tolist(), top_k)

    def spread(self, tokens: Tensor) -> Tensor:
        """[tokens, n] -> [rows, n]; padding is zero."""
        return torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])[self.token_of_row]

    def spread_pairs(self, values: Tensor) -> Tensor:
        """[tokens, k] -> [rows, 1]; padding is zero."""
        return torch.cat([values.reshape(-1), values.new_zeros(1)])[self.pair_of_row][:, None]

    def gather_pairs(self, values: Tensor) -> Tensor:
        """[rows] -> [tokens, k]."""
        return values[self.row_of_pair].view(-1, self.top_k)

    def gather(self, rows: Tensor) -> Tensor:
        """[rows, n] -> [tokens, n], summed over each token's pairs."""
        return rows[self.row_of_pair].view(-1, self.top_k, rows.shape[-1]).sum(dim=1)

    def products(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """[rows, n] times each one's of matrices [experts, n, m] -> [rows, m]."""
        out = rows.new_empty(len(rows), matrices.shape[-1])
        for left, matrix, into in zip(rows.split(self.counts), matrices.unbind(), out.split(self.counts)):
            torch.mm(left, matrix, out=into)
        return out

    def outer_products(self, left: Tensor, right: Tensor) -> Tensor:
        """left [rows, n], right [rows, m] -> [experts, n, m], summed over each expert's rows."""
        out = left.new_empty(len(self.counts), left.shape[1], right.shape[1])
        for a, b, into in zip(left.split(self.counts), right.split(self.counts), out.unbind()):
            torch.mm(a.T, b, out=into)
        return out


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        rows = _Rows.of(index, gate_up.shape[0])
        given = rows.spread(x)  # [rows, hidden]
        mixed = rows.products(given, gate_up.mT)  # [rows, 2 * inner]
        gate, up = mixed.chunk(2, dim=-1)
        inner = silu(gate) * up
        of_row = rows.spread_pairs(weights)
        ctx.rows = rows
        ctx.save_for_backward(given, gate_up, down, mixed, inner, of_row)
        return rows.gather(rows.products(inner * of_row, down.mT))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:  # type: ignore[override]
        given, gate_up, down, mixed, inner, of_row = ctx.saved_tensors
        rows: _Rows = ctx.rows
        grad_rows = rows.spread(grad)
        grad_down = rows.outer_products(grad_rows, inner * of_row)
        grad_scaled = rows.products(grad_rows, down)  # of inner * weight
        grad_weights = rows.gather_pairs((grad_scaled * inner).sum(dim=-1))
        grad_inner = grad_scaled * of_row
        gate, up = mixed.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        grad_gate = grad_inner * up * (sigmoid + activated * (1 - sigmoid))
        grad_mixed = torch.cat([grad_gate, grad_inner * activated], dim=-1)
        grad_x = rows.gather(rows.products(grad_mixed, gate_up))
        return grad_x, rows.outer_products(grad_mixed, given), grad_down, None, grad_weights
