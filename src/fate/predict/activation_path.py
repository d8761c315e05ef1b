"""MoE-Infinity's predictor: the request so far resembles a recorded one, which tells the experts of the layers ahead.

Source: MoE-Infinity, arXiv 2401.14361 (the "expert activation path" of Fate's comparison, arXiv 2502.12224). A request
is described by its *expert activation matrix*: how often each expert of each layer was used. Matrices of past requests
are kept; the one nearest to the current matrix gives, for the layers ahead, experts with priority

    (share of the layer's activations that were the expert's) * (1 - layers ahead / layers)

Its distance is the mean over layers of the cosine distance of rows, as in the authors' implementation; rows that the
current request has not filled are left out. The collection stays bounded and diverse: when it is full, a new matrix
replaces the one it resembles most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate.core import Prediction, Routing
from fate.predict.base import PREDICTORS, Predictor, PredictorContext

# The paper's collections (EAMC) hold some hundred matrices; of 64 experts by 28 layers, 120 take 0.9 MB.
MAX_MATRICES = 120

# The paper names all later layers. Reads go nearest first and a layer's routing expires its prefetches, so further
# layers would only be reached on a link so idle that they are asked for again, and better known, a layer later.
LAYERS_AHEAD = 3

# Twice as many candidates as a token uses: beyond, shares come near to chance.
CANDIDATES_PER_EXPERT = 2

Row = NDArray[np.float64]


@PREDICTORS.register("activation-path")
class ActivationPath(Predictor):
    """Names experts of the next LAYERS_AHEAD layers; after the last layer come the first ones, of the next token.

    Until a first request is recorded the current one stands in for it: its own matrix so far.
    """

    def __init__(self, context: PredictorContext) -> None:
        super().__init__(context)
        self._matrix = ActivationMatrix(context.num_experts)
        self.past = MatrixCollection(context.num_experts, MAX_MATRICES)

    def begin_request(self) -> None:
        if self._matrix.filled:
            self.past.add(self._matrix)
        self._matrix.clear()
        self.past.restart()

    def predict(self, routing: Routing, gate_input: Any) -> Sequence[Prediction]:
        self._matrix.count(routing.layer, routing.pairs_per_expert)
        self.past.follow(routing.layer, routing.pairs_per_expert, self._matrix)
        nearest = self.past.nearest()
        num_layers = len(self.context.num_experts)
        # A step of many tokens needs more than one token's experts: about as many as this layer needs.
        limit = max(CANDIDATES_PER_EXPERT * self.context.top_k, len(routing.experts))
        predictions = []
        for ahead in range(1, min(LAYERS_AHEAD, num_layers - 1) + 1):
            target = (routing.layer + ahead) % num_layers
            if not self.context.incomplete(target):
                continue
            row = self._matrix.counts[target] if nearest is None else self.past.row(nearest, target)
            if ranked := _ranked(row, limit, 1 - ahead / num_layers):
                predictions.append(Prediction(target, ranked))
        return predictions


class ActivationMatrix:
    """Activations of one request, counts[layer][expert], with the Euclidean norm of each row."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self.counts = [np.zeros(experts) for experts in num_experts]
        self.norms = [0.0] * len(num_experts)

    @property
    def filled(self) -> bool:
        return any(self.norms)

    def count(self, layer: int, pairs_per_expert: Mapping[int, int]) -> None:
        row = self.counts[layer]
        row[list(pairs_per_expert)] += list(pairs_per_expert.values())
        self.norms[layer] = float(row @ row) ** 0.5

    def clear(self) -> None:
        for row in self.counts:
            row[:] = 0
        self.norms = [0.0] * len(self.norms)


class MatrixCollection:
    """Up to `capacity` matrices of past requests, and how near each is to a current one that grows.

    The nearness is kept up to date by what a step adds to one row, so that a step costs the experts it used times the
    matrices, not the size of the matrices. Memory: 4 bytes per layer, expert and matrix.
    """

    def __init__(self, num_experts: Sequence[int], capacity: int) -> None:
        self.capacity = capacity
        self._size = 0
        # Of each layer [experts, matrices], every matrix's row at length 1; made when there is something to keep.
        self._rows: list[NDArray[np.float32]] = []
        self._num_experts = tuple(num_experts)
        self._dots = np.zeros((len(num_experts), capacity))  # of the current row with each unit row
        self._cosines = np.zeros((len(num_experts), capacity))
        self._nearness = np.zeros(capacity)  # sum of the cosines over layers

    def __len__(self) -> int:
        return self._size

    def add(self, current: ActivationMatrix) -> None:
        """Keep `current`, which was followed to its end; where all places are taken, in place of the nearest."""
        if not self._rows:
            self._rows = [np.zeros((experts, self.capacity), dtype=np.float32) for experts in self._num_experts]
        at = self._size if self._size < self.capacity else self.nearest()
        assert at is not None
        for rows, counts, norm in zip(self._rows, current.counts, current.norms):
            rows[:, at] = counts / norm if norm else 0.0
        self._size = max(self._size, at + 1)

    def restart(self) -> None:
        """The current matrix is empty again."""
        self._dots[:] = 0
        self._cosines[:] = 0
        self._nearness[:] = 0

    def follow(self, layer: int, added: Mapping[int, int], current: ActivationMatrix) -> None:
        """`added` was just counted into row `layer` of `current`."""
        if not self._size or not added:
            return
        dots, cosines = self._dots[layer], self._cosines[layer]
        dots += np.fromiter(added.values(), np.float32, len(added)) @ self._rows[layer][list(added)]
        self._nearness -= cosines
        np.divide(dots, current.norms[layer], out=cosines)
        self._nearness += cosines

    @property
    def nearness(self) -> Row:
        """Of each matrix: the sum over layers of its cosine with the current one."""
        return self._nearness[: self._size]

    def nearest(self) -> int | None:
        """The matrix most like the current one; None while there are none."""
        return int(self.nearness.argmax()) if self._size else None

    def row(self, index: int, layer: int) -> Row:
        """The matrix's row of `layer`, up to a factor."""
        return self._rows[layer][:, index].astype(np.float64)


def _ranked(row: Row, limit: int, weight: float) -> tuple[tuple[int, float], ...]:
    """Up to `limit` experts with more than an even share of the row, each with its share times `weight`."""
    total = float(row.sum())
    if total == 0.0:
        return ()
    shares = row / total
    order = (-shares).argsort(kind="stable")[:limit]
    even = 1 / len(row)
    return tuple(
        (expert, share * weight) for expert, share in zip(order.tolist(), shares[order].tolist()) if share > even
    )
