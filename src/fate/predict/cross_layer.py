"""The cross-layer gate: the input of layer l's gate, fed to layer l+1's gate, names layer l+1's experts.

Residual connections make the gate inputs of adjacent layers similar, so no training is needed.
Source: Fate, arXiv 2502.12224, section "cross-layer gate".

Beyond the paper: candidates past top-k where the gate is unsure (see `calibration.py`); the layer after the next, for
the time when the link has nothing better to do; and, from the last layers on, the first layers of the next token, from
the experts that tokens used lately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fate.core import Prediction, Routing
from fate.predict.base import PREDICTORS, Predictor, PredictorContext, Ranked
from fate.predict.calibration import Calibration, GateOutput
from fate.predict.popularity import RecentPopularity

LOOKAHEAD = 2  # layers
CANDIDATES = 3  # at most, in units of top-k
PATIENCE = 0.7  # what a prefetch for the layer after the next is worth beside one for the next
# A read that is wrong more often costs more (a demand waits for a chunk, cores for the copy) than it saves; on a link
# that is never idle, every wrong read takes its whole time from a right one.
MIN_CONFIDENCE = 0.2
BUSY_CONFIDENCE = 0.5
BUSY_LOAD = 0.5  # share of time from which a link counts as busier


@PREDICTORS.register("cross-layer")
class CrossLayerGate(Predictor):
    """Decoding is calibrated; of a prompt's tokens the gate's choice is taken as it is, for the next layer only."""

    def __init__(self, context: PredictorContext) -> None:
        super().__init__(context)
        self._num_layers = len(context.gates)
        limit = CANDIDATES * context.top_k
        self._limits = [min(limit, experts) for experts in context.num_experts]
        self._calibrations: dict[tuple[int, int], Calibration] = {}
        self._pending: dict[tuple[int, int], list[GateOutput]] = {}  # (layer, distance) -> what its gate gave, by row
        first_layers = range(min(LOOKAHEAD, self._num_layers))
        self._recent = {layer: RecentPopularity(context.num_experts[layer]) for layer in first_layers}

    def predict(self, routing: Routing, gate_input: Any) -> Sequence[Prediction]:
        if routing.prefill and routing.tokens > 1:
            return self._prompt(routing, gate_input)
        self._learn(routing)
        ahead = (routing.layer + distance for distance in range(1, LOOKAHEAD + 1))
        predictions = (self._ahead(layer, layer - routing.layer, gate_input) for layer in ahead)
        return [prediction for prediction in predictions if prediction is not None]

    def _prompt(self, routing: Routing, gate_input: Any) -> Sequence[Prediction]:
        target = routing.layer + 1
        if gate_input is None or target >= self._num_layers or not self.context.incomplete(target):
            return ()
        gate = self.context.gates[target]
        ranked = gate.shares(gate_input) if gate is not None else None
        return (Prediction(target, ranked),) if ranked else ()

    def _ahead(self, layer: int, distance: int, gate_input: Any) -> Prediction | None:
        if layer >= self._num_layers:
            return self._next_token(layer - self._num_layers)
        gate = self.context.gates[layer]
        if gate is None or gate_input is None or not self.context.incomplete(layer):
            return None
        rows = gate.rank(gate_input, self._limits[layer])
        return self._prediction(layer, distance, rows) if rows else None

    def _next_token(self, layer: int) -> Prediction | None:
        """The first layers have no gate input yet: what tokens used lately."""
        if layer not in self._recent or not self.context.incomplete(layer):
            return None
        return self._prediction(layer, 0, [self._recent[layer].ranked(self._limits[layer])])

    def _prediction(self, layer: int, distance: int, rows: Sequence[Ranked]) -> Prediction:
        """What some row is expected to need: rows are independent, so confidences add up as probabilities do."""
        cached = self.context.cached(layer)
        calibration = self._calibration(layer, distance)
        self._pending[layer, distance] = outputs = [GateOutput(row, cached) for row in rows]
        if len(outputs) == 1:
            named = calibration.confident(outputs[0])
        else:
            absent: dict[int, float] = {}  # by expert: how likely no row needs it
            for output in outputs:
                for expert, confidence in calibration.confident(output):
                    absent[expert] = absent.get(expert, 1.0) * (1 - confidence)
            named = sorted(((e, 1 - none) for e, none in absent.items()), key=lambda pair: -pair[1])
        worth, least = PATIENCE if distance > 1 else 1.0, self._least_confidence()
        return Prediction(layer, [(e, c * worth if c >= least else 0.0) for e, c in named])

    def _least_confidence(self) -> float:
        busier = max(self.context.link_load() - BUSY_LOAD, 0.0) / (1 - BUSY_LOAD)
        return MIN_CONFIDENCE + (BUSY_CONFIDENCE - MIN_CONFIDENCE) * min(busier, 1.0)

    def _learn(self, routing: Routing) -> None:
        layer, needed = routing.layer, routing.pairs_per_expert
        for distance in range(LOOKAHEAD + 1):
            if (outputs := self._pending.pop((layer, distance), None)) is not None:
                calibration = self._calibration(layer, distance)
                for output in outputs:
                    calibration.learn(output, needed, alone=len(outputs) == 1)
        if layer in self._recent:
            self._recent[layer].learn(needed)

    def _calibration(self, layer: int, distance: int) -> Calibration:
        key = (layer, distance)
        if key not in self._calibrations:
            self._calibrations[key] = Calibration(self.context.top_k, self._limits[layer])
        return self._calibrations[key]
