"""Predictors of the experts that later layers will need; one file each, found by name in PREDICTORS."""

from fate.predict import activation_path, cross_layer, none, oracle  # noqa: F401 - they register themselves
from fate.predict.base import PREDICTORS, Gate, Predictor, PredictorContext

__all__ = ["PREDICTORS", "Gate", "Predictor", "PredictorContext"]
