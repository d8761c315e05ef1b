"""The cross-layer gate: the input of layer l's gate, fed to layer l+1's gate, names layer l+1's experts.

Residual connections make the gate inputs of adjacent layers similar, so no training is needed.
Source: Fate, arXiv 2502.12224, section "cross-layer gate".
"""

from __future__ import annotations

from typing import Any

from fate.core import Prediction, Routing
from fate.predict.base import PREDICTORS, Predictor


@PREDICTORS.register("cross-layer")
class CrossLayerGate(Predictor):
    def predict(self, routing: Routing, gate_input: Any) -> Prediction | None:
        target = routing.layer + 1
        if target >= len(self.context.gates) or not self.context.incomplete(target):
            return None
        gate = self.context.gates[target]
        ranked = gate.rank(gate_input) if gate is not None else None
        return Prediction(target, ranked) if ranked else None
