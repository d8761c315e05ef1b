"""A decoded layer in two native calls: each row has the bits of the single functions for that row alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from decode_layers import EXPERTS, Layer, aligned_pool, packed, values
from fate import kernels
from fate.core import Precision
from fate.kernels import decode, native
from fate.kernels.activation import SWIGLU
from fate.store.format import RecordLayout
from packed_records import expert_layout

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(6))
def test_layers(seed: int, compiled_kernel: str) -> None:
    layer = Layer(seed, DTYPES[seed % len(DTYPES)])
    attention, experts, buffers = layer.attention(), layer.experts(), layer.buffers(16)
    for rows in (1, layer.pick.randint(2, 16)):
        torch.set_num_threads(layer.pick.choice([1, 2]))
        x, rotary, caches = layer.inputs(rows, seed + rows)
        alone = caches.copy()
        routed = attention(buffers, x, rotary, caches.places())
        assert routed is not None
        out = layer.call_experts(experts, buffers, routed, rows)
        chosen: dict[int, list[float]] = {}
        for row in range(rows):
            residual = layer.attention_alone(x[row], rotary, alone, row)
            normed = decode.rms_norm(residual, layer.norms[1])
            logits, scores, indices = decode.route_rows(layer.router, normed)
            assert torch.equal(buffers.residual[row], residual[0])
            assert torch.equal(buffers.normed[row], normed[0])
            assert torch.equal(buffers.logits[row], logits[0])
            assert torch.equal(buffers.scores[row], scores[0])
            assert torch.equal(buffers.indices[row], indices[0])
            assert torch.equal(out[row], (residual + layer.experts_alone(normed, scores, indices))[0])
            for expert, weight in zip(indices[0].tolist(), scores[0].tolist()):
                if weight:
                    chosen.setdefault(expert, []).append(weight)
        for held, expected in zip(caches.keys + caches.values, alone.keys + alone.values):
            assert torch.equal(held, expected)
        order = sorted(chosen, key=lambda expert: (-len(chosen[expert]), expert))
        assert routed.experts == order
        assert routed.pairs == [len(chosen[expert]) for expert in order]
        assert routed.weights == pytest.approx([sum(chosen[expert]) for expert in order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_from_every_instruction_set(dtype: torch.dtype) -> None:
    results = []
    for name in native.available():
        if name == "torch":
            continue
        with native.selected(name):
            layer = Layer(3, dtype)
            x, rotary, caches = layer.inputs(5, 1)
            buffers = layer.buffers(5)
            routed = layer.attention()(buffers, x, rotary, caches.places())
            assert routed is not None
            results.append(layer.call_experts(layer.experts(), buffers, routed, 5))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_a_block_alone(rows: int, dtype: torch.dtype) -> None:
    layer = Layer(20 + rows, dtype)
    x, buffers = values(rows, layer.hidden, seed=rows, dtype=dtype), layer.buffers(16)
    routed = decode.route(layer.router, buffers, x)
    out = torch.empty_like(x)
    slots, precisions = ([held[e] for e in routed.experts] for held in (layer.slots, layer.precisions))
    layer.experts()(
        buffers, rows, routed.experts, slots, precisions, first=True, last=True, out=out, add_residual=False
    )
    assert torch.equal(buffers.normed[:rows], x)
    for row in range(rows):
        _, scores, indices = decode.route_rows(layer.router, x[row : row + 1])
        assert torch.equal(out[row], layer.experts_alone(x[row : row + 1], scores, indices)[0])


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_a_router_of_the_familys_own(given: torch.dtype) -> None:
    rows, dtype = 6, torch.bfloat16
    layer = Layer(30, dtype)
    x, buffers = values(rows, 1, layer.hidden, seed=0, dtype=dtype), decode.Buffers(6, layer.hidden, 4, EXPERTS, dtype)
    indices = torch.stack(
        [torch.randperm(EXPERTS + 2, generator=torch.Generator().manual_seed(r))[:3] for r in range(6)]
    )
    weights = values(rows, 3, seed=1, dtype=given).abs()
    weights[2, 1] = 0
    routed = decode.group(buffers, x, indices, weights, EXPERTS)
    assert max(routed.experts) < EXPERTS
    assert sum(routed.pairs) == int(((indices < EXPERTS) & (weights != 0)).sum())
    assert torch.equal(buffers.indices, indices)
    assert torch.equal(
        buffers.scores.to(given) if given != torch.float64 else buffers.scores, weights.to(buffers.scores.dtype)
    )
    out = layer.call_experts(layer.experts(), buffers, routed, rows)
    for row in range(rows):
        alone = layer.experts_alone(x[row], weights[row : row + 1], indices[row : row + 1])
        assert torch.equal(out[row], (buffers.residual[row : row + 1] + alone)[0])


def test_nobody_is_chosen() -> None:
    layer = Layer(31, torch.float32)
    x, buffers = values(2, layer.hidden, seed=0, dtype=torch.float32), layer.buffers(2)
    indices = torch.full((2, 1), EXPERTS)
    routed = decode.group(buffers, x, indices, torch.ones(2, 1), EXPERTS)
    assert routed == ([], [], [])
    out = torch.empty_like(x)
    layer.experts()(buffers, 2, [], [], None, first=True, last=True, out=out, add_residual=False)
    assert torch.equal(out[:1], layer.experts_alone(x[:1], torch.ones(1, 1), indices[:1]))


def test_attention_without_a_router() -> None:
    layer = Layer(32, torch.float32)
    x, rotary, caches = layer.inputs(2, 0)
    buffers, others = layer.buffers(2), layer.buffers(2)
    again = caches.copy()
    assert layer.attention(router=False)(buffers, x, rotary, caches.places()) is None
    layer.attention()(others, x, rotary, again.places())
    assert torch.equal(buffers.normed, others.normed)


def test_attention_that_does_not_fit_is_refused() -> None:
    layer = Layer(40, torch.float32)
    x, rotary, caches = layer.inputs(3, 0)
    half, buffers, kv = layer.attention(), layer.buffers(3), caches.places()
    for wrong in (x[:, :, 1:], x.double(), x.expand(3, 2, -1), x.mT):
        with pytest.raises(ValueError, match="rows must be contiguous"):
            half(buffers, wrong, rotary, kv)
    with pytest.raises(ValueError, match="rows do not fit"):
        half(layer.buffers(2), x, rotary, kv)
    for cos in (
        rotary[0].double(),
        rotary[0][:2].expand(2, 1, -1) if len(rotary[0]) > 1 else rotary[0].expand(2, 1, -1),
    ):
        with pytest.raises(ValueError, match="angles must be"):
            half(buffers, x, (cos, cos), kv)
    with pytest.raises(ValueError, match="an even part of a head"):
        half(buffers, x, (torch.ones(1, 1, layer.dim + 2), torch.ones(1, 1, layer.dim + 2)), kv)
    for unfit in (kv._replace(keys=kv.keys[:2]), kv._replace(lengths=[*kv.lengths, 1]), kv._replace(starts=[0])):
        with pytest.raises(ValueError, match="an entry for each row"):
            half(buffers, x, rotary, unfit)
    for unfit in (kv._replace(starts=kv.lengths), kv._replace(starts=[-1, 0, 0]), kv._replace(keys=[0, 0, 0])):
        with pytest.raises(ValueError, match="a row must have a cache"):
            half(buffers, x, rotary, unfit)
    layer.output = layer.output._replace(bias=torch.zeros(3))
    with pytest.raises(ValueError, match="bias must be"):
        layer.attention()
    layer.output = layer.query
    if layer.heads * layer.dim != layer.hidden:
        with pytest.raises(ValueError, match="must fit one another"):
            layer.attention()


def test_experts_that_do_not_fit_are_refused() -> None:
    layer = Layer(41, torch.float32)
    x, buffers = values(3, layer.hidden, seed=0, dtype=torch.float32), layer.buffers(4)
    half, out = layer.experts(), torch.empty(3, layer.hidden)
    last = {"first": True, "last": True, "out": out, "add_residual": False}
    with pytest.raises(ValueError, match="were not routed"):
        half(buffers, 3, [], [], None, **last)
    routed = decode.route(layer.router, buffers, x)
    slots = [layer.slots[e] for e in routed.experts]
    other = next(e for e in range(EXPERTS) if e not in routed.experts)
    with pytest.raises(ValueError, match="must follow those of all others"):
        half(buffers, 3, [], [], None, **last)
    with pytest.raises(ValueError, match="was not chosen"):
        half(buffers, 3, [other], [0], None, **last)
    with pytest.raises(ValueError, match="was not chosen"):
        half(buffers, 3, [EXPERTS], [0], None, **last)
    with pytest.raises(ValueError, match="named twice"):
        half(buffers, 3, routed.experts[:1] * 2, slots[:1] * 2, None, **last)
    with pytest.raises(ValueError, match="outside of the pool"):
        half(buffers, 3, routed.experts[:1], [EXPERTS + 3], None, **last)
    with pytest.raises(ValueError, match="as many entries"):
        half(buffers, 3, routed.experts, [0], None, **last)
    with pytest.raises(ValueError, match="needs a place"):
        half(buffers, 3, routed.experts, slots, None, **{**last, "out": None})
    with pytest.raises(ValueError, match="already"):
        half(buffers, 3, routed.experts, slots, None, **last)
    with pytest.raises(ValueError, match="must have 3 rows"):
        half(buffers, 3, [], [], None, **{**last, "out": out[:2]})
    half(buffers, 3, [], [], None, **last)
    layer.pool = layer.pool[4:]
    with pytest.raises(ValueError, match="slots must hold a record each"):
        layer.experts()


def test_a_shared_expert_that_no_call_computed_is_missed() -> None:
    layer = next(made for made in (Layer(seed, torch.float32) for seed in range(20)) if made.shared is not None)
    x, buffers = values(1, layer.hidden, seed=0, dtype=torch.float32), layer.buffers(1)
    routed = decode.route(layer.router, buffers, x)
    slots = [layer.slots[e] for e in routed.experts]
    with pytest.raises(ValueError, match="shared expert is missing"):
        layer.experts()(
            buffers, 1, routed.experts, slots, None, first=False, last=True, out=torch.empty_like(x), add_residual=False
        )


def test_raw_codecs_and_other_dtypes_are_refused() -> None:
    layout = expert_layout("bf16", 64, 64)
    pool, slot_bytes = aligned_pool(layout, 1)
    with pytest.raises(ValueError, match="not packed"):
        decode.ExpertHalf(
            layout=layout,
            activation=SWIGLU,
            biases=None,
            shared=None,
            pool=pool,
            slot_bytes=slot_bytes,
            hidden=64,
            dtype=torch.float32,
        )
    with pytest.raises(ValueError, match="not supported"):
        decode.Buffers(1, 64, 2, 4, torch.float64)
    for rows in (0, decode.MAX_ROWS + 1):
        with pytest.raises(ValueError, match="1 to 16 rows"):
            decode.Buffers(rows, 64, 2, 4, torch.float32)
    buffers, router = (
        decode.Buffers(1, 64, 2, 4, torch.float32),
        decode.Router(torch.ones(5, 64), 2, True, torch.float32),
    )
    with pytest.raises(ValueError, match="the router does not fit"):
        decode.route(router, buffers, torch.ones(1, 64))
    with pytest.raises(ValueError, match="indices must be int64"):
        decode.group(buffers, torch.ones(1, 64), torch.zeros(1, 2), torch.ones(1, 2), 4)
    with pytest.raises(ValueError, match="the routing does not fit"):
        decode.group(buffers, torch.ones(1, 64), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3), 4)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_scratch_is_what_was_planned(num_threads: int, compiled_kernel: str) -> None:
    """Each call runs on a thread of its own, whose scratch is empty before."""
    hidden, inner, wide, dtype = 256, 320, 1024, torch.float32
    layout = expert_layout("int4", hidden, inner)
    pool, _ = aligned_pool(layout, 1)
    pick = random.Random(0)
    matrix, gate, down = (packed(*shape, pick, dtype) for shape in ((64, wide), (wide, hidden), (hidden, wide)))

    def held_after(call: Callable[[], object]) -> int:
        def run() -> int:
            torch.set_num_threads(num_threads)
            call()
            return int(native.extension().scratch_held())

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    def planned(layouts: list[RecordLayout], tokens: int, widest: int, num_experts: int = 8) -> int:
        return decode.scratch_bytes(layouts, tokens, hidden, widest, num_threads, num_experts)

    def experts(tokens: int) -> None:
        pairs = torch.stack((torch.arange(tokens), torch.zeros(tokens)), dim=1).int()
        rows = torch.empty(tokens, 1, hidden)
        x = values(tokens, hidden, seed=0, dtype=dtype)
        kernels.experts(x, pool, layout, [0], [Precision.FULL], [0, tokens], pairs, rows)

    for tokens in (1, 40, 700):
        x = values(tokens, wide, seed=0, dtype=dtype)
        calls = (
            lambda x=x: kernels.linear(x, matrix.packed, matrix.layout),
            lambda x=x: decode.gated_mlp(x[:, :hidden], gate, gate, down),
            lambda x=x: decode.route_rows(
                decode.Router(values(8, hidden, seed=0, dtype=dtype), 2, True, dtype), x[:, :hidden]
            ),
            lambda tokens=tokens: experts(tokens),
        )
        for call in calls:
            assert 0 < held_after(call) <= planned([layout], tokens, wide)
    for length in (1, 300, 20000):
        query, cache = values(16, 32, 1, 8, seed=0, dtype=dtype), values(1, 8, length, 8, seed=1, dtype=dtype)
        held = held_after(
            lambda q=query, c=cache: kernels.attend(q, c.expand(16, -1, -1, -1), c.expand(16, -1, -1, -1), 1.0)
        )
        assert held <= planned([], 1, 32 * 8)
    assert held_after(lambda: experts(700)) > 0.4 * planned([layout], 700, wide)


def test_the_bytes_of_buffers() -> None:
    small, large = decode.Buffers(1, 64, 2, 8, torch.float32), decode.Buffers(16, 64, 2, 8, torch.float32)
    assert large.nbytes - small.nbytes >= 15 * 2 * 64 * 4
