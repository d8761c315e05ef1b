"""A predictor that is never wrong, because it is told: the most that prediction could do, to hold others against.

Whoever runs a request that ran before hands over the routing that was recorded (`foretell`). Experts are then named as
far ahead as the cross-layer gate names them (`oracle`), or further (`oracle-far`), and with the same scheduler, cache,
caps and link: what is still missed then is not for want of prediction.

>>> oracle = Oracle(PredictorContext(gates=[None, None], incomplete=lambda layer: True))
>>> oracle.foretell([TraceStep(0, prefill=False, tokens=1, layers=({3: 1}, {5: 1}))])
>>> oracle.begin_request()
>>> oracle.predict(Routing(0, {3: 1}), None)
[Prediction(layer=1, ranked=((5, 1.0),))]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fate.core import Prediction, Routing
from fate.errors import UsageError
from fate.predict.base import PREDICTORS, Predictor, PredictorContext
from fate.predict.cross_layer import LOOKAHEAD, PATIENCE
from fate.trace import TraceStep


@PREDICTORS.register("oracle")
class Oracle(Predictor):
    """Must be asked in every step, at every layer. Raises UsageError from
    `predict` in a request that was not foretold; beyond its end it names nothing."""

    needs_future = True
    lookahead = LOOKAHEAD  # layers

    def __init__(self, context: PredictorContext) -> None:
        super().__init__(context)
        self._num_layers = len(context.gates)
        self._foretold: Sequence[TraceStep] | None = None
        self._steps: Sequence[TraceStep] | None = None
        self._at = -1  # step
        self._layer = self._num_layers  # that spoke last

    def foretell(self, steps: Sequence[TraceStep]) -> None:
        """The forwards of the next request, from its first to its last."""
        self._foretold = steps

    def begin_request(self) -> None:
        self._steps, self._foretold = self._foretold, None
        self._at, self._layer = -1, self._num_layers

    def predict(self, routing: Routing, gate_input: Any) -> Sequence[Prediction]:
        if self._steps is None:
            raise UsageError(
                "a predictor that knows the future must be given it: 'oracle' runs in fate bench systems only"
            )
        self._at += routing.layer < self._layer or self._num_layers == 1
        self._layer = routing.layer
        if (
            routing.prefill and routing.tokens > 1
        ):  # of a prompt, the rest of its own layers, by the share of its tokens' choices
            furthest = min(self.lookahead - LOOKAHEAD + 1, self._num_layers - 1 - routing.layer)
        else:
            furthest = min(self.lookahead, self._num_layers - 1)
        found = (self._ahead(routing, distance) for distance in range(1, furthest + 1))
        return [prediction for prediction in found if prediction is not None]

    def _ahead(self, routing: Routing, distance: int) -> Prediction | None:
        assert self._steps is not None
        wrapped, layer = divmod(routing.layer + distance, self._num_layers)
        at = self._at + wrapped
        if at >= len(self._steps) or not self.context.incomplete(layer):
            return None
        pairs = self._steps[at].layers[layer]
        most = sum(pairs.values()) if routing.prefill and routing.tokens > 1 else 1
        worth = PATIENCE ** (distance - 1)
        return Prediction(layer, tuple((e, worth * min(count, most) / most) for e, count in pairs.items()))


@PREDICTORS.register("oracle-far")
class FarOracle(Oracle):
    """The same, named as far ahead as a link that is idle now could use."""

    lookahead = 4 * LOOKAHEAD
