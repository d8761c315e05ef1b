"""A layer's small operations on any number of rows: against float64, and each row the bits it has alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from decode_layers import norm, packed, values
from fate.kernels import native, ops

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
TOKENS = [1, 3, 16, 17, 130, 600]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_alone(call: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor) -> None:
    """Some of the rows that the call of all of x gave, against calls of one row each; on one thread and on two."""
    for row in {0, 1, 15, 16, 129, len(x) - 1}:
        if row < len(x):
            torch.set_num_threads(1 + row % 2)
            assert torch.equal(call(x[row : row + 1])[0], rows[row])


@pytest.mark.parametrize(("tokens", "dtype"), list(zip(TOKENS, itertools.cycle(TOLERANCE))))
class TestRows:
    def test_norm(self, tokens: int, dtype: torch.dtype) -> None:
        x, made = values(tokens, 200, seed=0, dtype=dtype), norm(200, random.Random(tokens), dtype)
        out = ops.rms_norm(x, made)
        exact = made.weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + made.eps).sqrt()
        assert torch.allclose(out.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        rows_alone(lambda row: ops.rms_norm(row, made), x, out)

    @pytest.mark.parametrize("experts, hidden, top_k", [(60, 200, 4), (7, 33, 7)])
    def test_router(
        self, tokens: int, dtype: torch.dtype, experts: int, hidden: int, top_k: int, compiled_kernel: str
    ) -> None:
        weight = values(experts, hidden, seed=1, dtype=dtype, scale=hidden**-0.5)
        router = ops.Router(weight, top_k, tokens % 2 == 0, torch.float32)
        x = values(tokens, hidden, seed=2, dtype=dtype)
        logits, scores, indices = ops.route_rows(router, x)
        exact = x.double() @ weight.double().T
        assert torch.allclose(logits.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        likely, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        expected = likely[:, :top_k] / (likely[:, :top_k].sum(-1, keepdim=True) if router.renormalize else 1)
        assert torch.equal(indices, order[:, :top_k])
        assert torch.allclose(scores, expected, rtol=1e-5)
        for part in range(3):
            rows_alone(lambda row, part=part: ops.route_rows(router, row)[part], x, (logits, scores, indices)[part])  # type: ignore[misc]

    def test_few_rows(self, tokens: int, dtype: torch.dtype) -> None:
        x, weight = values(tokens, 90, seed=1, dtype=dtype), values(3, 90, seed=2, dtype=dtype, scale=0.1)
        out = ops.multiply_few_rows(x, weight)
        assert torch.allclose(
            out.double(), x.double() @ weight.double().T, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
        rows_alone(lambda row: ops.multiply_few_rows(row, weight), x, out)

    def test_shared_expert(self, tokens: int, dtype: torch.dtype) -> None:
        pick = random.Random(tokens)
        gate, up, down = (packed(*shape, pick, dtype, True) for shape in ((72, 130), (72, 130), (130, 72)))
        x = values(tokens, 130, seed=3, dtype=dtype)
        given = ops.gated_mlp(x, gate, up, down)
        rows_alone(lambda row: ops.gated_mlp(row, gate, up, down), x, given)
        share = values(1, 130, seed=4, dtype=dtype, scale=0.1)
        out, plain = ops.add_gated(x, given, x, share), ops.add_gated(x, given, x, None)
        assert torch.equal(plain, x + given)
        exact = x.double() + (x.double() @ share.double().T).sigmoid() * given.double()
        assert torch.allclose(out.double(), exact, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
        for row in range(min(tokens, 3)):
            some = slice(row, row + 1)
            assert torch.equal(ops.add_gated(x[some], given[some], x[some], share)[0], out[row])

    def test_ranked_experts(self, tokens: int, dtype: torch.dtype) -> None:
        weight, x = values(20, 64, seed=5, dtype=dtype, scale=0.2), values(tokens, 64, seed=6, dtype=dtype)
        ranked = ops.rank_experts(weight, x, 5)
        exact = (x.double() @ weight.double().T).softmax(-1)
        for row, likely in enumerate(ranked):
            assert len(likely) == 5
            assert [p for _, p in likely] == sorted((p for _, p in likely), reverse=True)
            assert torch.allclose(torch.tensor([p for _, p in likely]).double(), exact[row].topk(5).values, rtol=1e-4)
        assert len(ops.rank_experts(weight, x[:1], 50)[0]) == 20


def test_what_does_not_fit_is_refused() -> None:
    x, pick = torch.ones(2, 64), random.Random(0)
    matrix, made = packed(32, 64, pick, x.dtype), norm(64, pick, x.dtype)
    for refused in (
        lambda: ops.rms_norm(x[:, 1:], made),
        lambda: ops.rms_norm(x.double(), made),
        lambda: ops.rms_norm(x.bfloat16(), made),
        lambda: ops.multiply_few_rows(x, torch.ones(3, 63)),
        lambda: ops.multiply_few_rows(x, torch.ones(64, 3).mT),
        lambda: ops.gated_mlp(x, matrix, matrix, matrix),
        lambda: ops.gated_mlp(x, matrix._replace(packed=matrix.packed[:-1]), matrix, packed(64, 32, pick, x.dtype)),
        lambda: ops.gated_mlp(x, matrix._replace(bias=torch.ones(31)), matrix, packed(64, 32, pick, x.dtype)),
        lambda: ops.add_gated(x, x[:1], x, None),
        lambda: ops.add_gated(x, x, x, torch.ones(64)),
        lambda: ops.route_rows(ops.Router(torch.ones(4, 64), 5, True, torch.float32), x),
        lambda: ops.route_rows(ops.Router(torch.ones(4, 64), 2, True, torch.float64), x),
        lambda: ops.rank_experts(torch.ones(4, 63), x, 2),
        lambda: ops.rank_experts(torch.ones(4, 64), x, 0),
    ):
        with pytest.raises(ValueError):
            refused()


def test_without_the_extension() -> None:
    with native.selected("torch"), pytest.raises(ValueError, match="needs the compiled kernels"):
        ops.multiply_few_rows(torch.ones(1, 4), torch.ones(1, 4))
