"""Random decoder layers for the tests of `kernels.decode`, and the same layers out of single functions, row by row."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fate import kernels
from fate.core import Precision
from fate.kernels import decode
from fate.kernels.activation import SWIGLU
from packed_records import expert_layout, matrix_layout, random_record

EXPERTS = 12
Pick = random.Random


def values(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def packed(rows: int, cols: int, pick: Pick, dtype: torch.dtype, biased: bool = False) -> decode.PackedMatrix:
    layout = matrix_layout(pick.choice(["int4", "int8"]), rows, cols)
    seed = pick.randrange(1 << 20)
    bias = values(rows, seed=seed, dtype=dtype) if biased else None
    return decode.PackedMatrix(random_record(layout, seed), layout, bias)


def norm(cols: int, pick: Pick, dtype: torch.dtype) -> decode.Norm:
    return decode.Norm(values(cols, seed=pick.randrange(1 << 20), dtype=dtype) + 1, 1e-5, pick.random() < 0.5)


def aligned_pool(layout: Any, slots: int) -> tuple[Tensor, int]:
    """A random record in each slot, and the bytes of a slot."""
    slot_bytes = -(-layout.record_bytes // 64) * 64
    pool = torch.zeros(slots * slot_bytes + 64, dtype=torch.uint8)
    pool = pool[-pool.data_ptr() % 64 :][: slots * slot_bytes]
    for slot in range(slots):
        pool[slot * slot_bytes :][: layout.record_bytes] = random_record(layout, slot)
    return pool, slot_bytes


@dataclass
class Caches:
    """Each row's keys and values [kv heads, positions, dim], in memory of their own but of the same strides."""

    keys: list[Tensor]
    values: list[Tensor]
    starts: list[int]
    lengths: list[int]

    def places(self, rows: list[int] | None = None) -> decode.KVRows:
        rows = list(range(len(self.keys))) if rows is None else rows
        (a, b, _), (c, d, _) = self.keys[0].stride(), self.values[0].stride()
        return decode.KVRows(
            [self.keys[r].data_ptr() for r in rows],
            [self.values[r].data_ptr() for r in rows],
            (a, b),
            (c, d),
            [self.starts[r] for r in rows],
            [self.lengths[r] for r in rows],
        )

    def copy(self) -> Caches:
        return Caches(*([t.clone() for t in held] for held in (self.keys, self.values)), self.starts, self.lengths)


class Layer:
    """One of random shapes and settings."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        pick = self.pick = Pick(seed)
        self.dtype, self.hidden = dtype, pick.choice([64, 130, 192])
        self.kv_heads, self.dim = pick.choice([1, 2, 3]), pick.choice([8, 24, 64])
        self.heads = self.kv_heads * pick.choice([1, 2, 5])
        self.top_k, inner = pick.randint(1, 5), pick.choice([40, 80])
        biased = pick.random() < 0.5
        self.query = packed(self.heads * self.dim, self.hidden, pick, dtype, biased)
        self.key = packed(self.kv_heads * self.dim, self.hidden, pick, dtype, biased)
        self.value = packed(self.kv_heads * self.dim, self.hidden, pick, dtype, biased)
        self.output = packed(self.hidden, self.heads * self.dim, pick, dtype, pick.random() < 0.5)
        self.norms = norm(self.hidden, pick, dtype), norm(self.hidden, pick, dtype)
        covers = pick.choice(["none", "head", "all"])
        self.head_norms: tuple[decode.Norm | None, decode.Norm | None] = (None, None)
        if covers != "none":
            widths = [self.dim if covers == "head" else n * self.dim for n in (self.heads, self.kv_heads)]
            self.head_norms = norm(widths[0], pick, dtype), norm(widths[1], pick, dtype)
        self.turned, self.scale = pick.choice([0, self.dim // 2, self.dim]), self.dim**-0.5
        gate = values(EXPERTS, self.hidden, seed=seed, dtype=dtype, scale=pick.choice([0.1, 3.0, 30.0]))
        self.router = decode.Router(gate, self.top_k, pick.random() < 0.5, pick.choice([dtype, torch.float32]))
        self.layout = expert_layout(pick.choice(["int4", "int8"]), self.hidden, inner)
        self.pool, self.slot_bytes = aligned_pool(self.layout, EXPERTS + 3)
        self.slots = pick.sample(range(EXPERTS + 3), EXPERTS)
        depths = [Precision.FULL, Precision.INT2] if self.layout.codec == "int4" else [Precision.FULL]
        self.precisions = [pick.choice(depths) for _ in range(EXPERTS)]
        self.biases = None
        if pick.random() < 0.5:
            given = pick.choice([dtype, torch.float32])
            widths = [spec.rows for spec in self.layout.matrices]
            self.biases = (
                values(EXPERTS, widths[0], seed=1, dtype=given),
                values(EXPERTS, widths[1], seed=2, dtype=given),
            )
        self.shared = self._shared_expert(pick.choice(["none", "share", "no share"]))

    def _shared_expert(self, kind: str) -> decode.SharedExpert | None:
        pick, between = self.pick, 72
        if kind == "none":
            return None
        share = values(1, self.hidden, seed=3, dtype=self.dtype, scale=0.1) if kind == "share" else None
        shapes = (between, self.hidden), (between, self.hidden), (self.hidden, between)
        gate, up, down = (packed(*shape, pick, self.dtype, pick.random() < 0.3) for shape in shapes)
        return decode.SharedExpert(gate, up, down, share)

    def attention(self, router: bool = True) -> decode.MixerHalf:
        mixer = decode.Attention(
            query=self.query,
            key=self.key,
            value=self.value,
            output=self.output,
            query_norm=self.head_norms[0],
            key_norm=self.head_norms[1],
            head_dim=self.dim,
            scale=self.scale,
            dtype=self.dtype,
        )
        return decode.MixerHalf(self.norms[0], mixer, self.norms[1], self.router if router else None)

    def experts(self) -> decode.ExpertHalf:
        return decode.ExpertHalf(
            layout=self.layout,
            activation=SWIGLU,
            biases=self.biases,
            shared=self.shared,
            pool=self.pool,
            slot_bytes=self.slot_bytes,
            hidden=self.hidden,
            dtype=self.dtype,
        )

    def buffers(self, rows: int) -> decode.Buffers:
        return decode.Buffers(rows, self.hidden, self.top_k, EXPERTS, self.dtype)

    def inputs(self, rows: int, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor], Caches]:
        x = values(rows, 1, self.hidden, seed=seed, dtype=self.dtype)
        angles = self.pick.choice([1, rows])
        rotary = tuple(values(angles, 1, self.turned, seed=seed + i, dtype=self.dtype) for i in (1, 2))
        lengths = [self.pick.choice([1, 2, 9, 70, 300]) for _ in range(rows)]
        starts = [self.pick.randrange(length) for length in lengths]
        shape, swapped = (self.kv_heads, max(lengths) + 2, self.dim), self.pick.random() < 0.5
        held = []
        for at in range(2 * rows):
            cache = values(*shape, seed=seed + 10 + at, dtype=self.dtype)
            held.append(cache.transpose(0, 1).contiguous().transpose(0, 1) if swapped else cache)
        return x, (rotary[0], rotary[1]), Caches(held[:rows], held[rows:], starts, lengths)

    def call_experts(
        self, half: decode.ExpertHalf, buffers: decode.Buffers, routed: decode.Routed, rows: int
    ) -> Tensor:
        """The second half: experts in some groups, the residual added."""
        out = torch.empty(rows, self.hidden, dtype=self.dtype)
        groups: list[list[int]] = [[] for _ in range(self.pick.randint(1, 4))]
        for expert in routed.experts:
            self.pick.choice(groups).append(expert)
        for at, group in enumerate(groups):
            slots, last = [self.slots[e] for e in group], at == len(groups) - 1
            precisions = [self.precisions[e] for e in group]
            half(
                buffers,
                rows,
                group,
                slots,
                precisions,
                first=at == 0,
                last=last,
                out=out if last else None,
                add_residual=True,
            )
        return out

    def attention_alone(self, x: Tensor, rotary: tuple[Tensor, Tensor], caches: Caches, row: int) -> Tensor:
        """x [1, hidden] plus attention of one row, and its key and value to the cache."""
        cos, sin = (angle[row : row + 1] if len(angle) > 1 else angle for angle in rotary)
        normed = decode.rms_norm(x, self.norms[0])
        query, key, value = (
            kernels.linear(normed, m.packed, m.layout, bias=m.bias) for m in (self.query, self.key, self.value)
        )
        query_norm, key_norm = self.head_norms
        query = self.rotated(query if query_norm is None else self.normalized(query, query_norm), cos, sin)
        key = self.rotated(key if key_norm is None else self.normalized(key, key_norm), cos, sin)
        value = value.view(1, -1, 1, self.dim)
        start, length = caches.starts[row], caches.lengths[row]
        caches.keys[row][:, length - 1] = key[0, :, 0]
        caches.values[row][:, length - 1] = value[0, :, 0]
        seen = slice(start, length)
        given = kernels.attend(query, caches.keys[row][None, :, seen], caches.values[row][None, :, seen], self.scale)
        return x + kernels.linear(given.view(1, -1), self.output.packed, self.output.layout, bias=self.output.bias)

    @staticmethod
    def normalized(states: Tensor, norm: decode.Norm) -> Tensor:
        """states [1, heads * dim], each head by itself or all at once, as wide as the norm's weight is."""
        return decode.rms_norm(states.view(-1, norm.weight.numel()), norm).view(1, -1)

    def rotated(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """states [1, heads * dim] -> [1, heads, 1, dim], their first elements rotated as transformers rotates them."""
        states, turn = states.view(1, -1, 1, self.dim), cos.shape[-1]
        first, rest = states[..., :turn], states[..., turn:]
        half = torch.cat((-first[..., turn // 2 :], first[..., : turn // 2]), dim=-1)
        return torch.cat((first * cos[:, None] + half * sin[:, None], rest), dim=-1).contiguous()

    def experts_alone(self, normed: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """The block of one row, normed [1, hidden]."""
        rows = torch.zeros(1, weights.shape[1], self.hidden)
        for rank, expert in enumerate(indices[0].tolist()):
            if expert >= EXPERTS or weights[0, rank] == 0:
                weights = weights.clone()
                weights[0, rank] = 0
                continue
            biases = None if self.biases is None else kernels.ExpertBiases(*self.biases, [expert])
            offset, pair = self.slots[expert] * self.slot_bytes, torch.tensor([[0, rank]], dtype=torch.int32)
            depth = [self.precisions[expert]]
            kernels.experts(normed, self.pool, self.layout, [offset], depth, [0, 1], pair, rows, SWIGLU, biases)
        out = kernels.reduce_rows(rows, weights, self.dtype)
        if self.shared is not None:
            given = decode.gated_mlp(normed, *self.shared[:3])
            out = decode.add_gated(out, given, normed, self.shared.share)
        return out
