"""No prediction: every expert is loaded when its layer asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fate.core import Prediction, Routing
from fate.predict.base import PREDICTORS, Predictor


@PREDICTORS.register("none")
class NoPredictor(Predictor):
    def predict(self, routing: Routing, gate_input: Any) -> Sequence[Prediction]:
        return ()
