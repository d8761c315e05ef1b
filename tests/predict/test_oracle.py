"""A predictor that is told the future: it names just that, as far ahead as others could."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from fate.core import Routing
from fate.errors import UsageError
from fate.predict import PREDICTORS, PredictorContext
from fate.predict.oracle import Oracle
from fate.systems import ORACLES, resolve_system
from fate.trace import TraceStep

LAYERS = 4


def steps(*decoded: int) -> list[TraceStep]:
    """A prompt of 3 tokens, then one token each: layer l of token t uses expert 10 t + l."""
    prompt = TraceStep(0, True, 3, tuple({0: 2, 1 + layer: 1} for layer in range(LAYERS)))
    return [prompt, *(TraceStep(0, False, 1, tuple({10 * t + at: 1} for at in range(LAYERS))) for t in decoded)]


def oracle(name: str = "oracle", *decoded: int, start: int = 0, complete: int | None = None) -> Oracle:
    """That was told of a request, from its step `start` on, and a layer of whose experts all are in memory."""
    made = PREDICTORS.get(name)(PredictorContext([None] * LAYERS, lambda layer: layer != complete))
    assert isinstance(made, Oracle)
    made.foretell(steps(*decoded)[start:])
    made.begin_request()
    return made


def named(made: Oracle, routing: Routing) -> dict[int, dict[int, float]]:
    return {said.layer: dict(said.ranked) for said in made.predict(routing, None)}


def test_as_far_ahead_as_the_cross_layer_gate() -> None:
    made = oracle("oracle", 1, 2, start=1)
    assert named(made, Routing(0, {10: 1})) == {1: {11: 1.0}, 2: {12: pytest.approx(0.7)}}
    named(made, Routing(1, {11: 1}))
    assert named(made, Routing(2, {12: 1})) == {3: {13: 1.0}, 0: {20: pytest.approx(0.7)}}, "the next token's first"
    assert list(named(made, Routing(3, {13: 1}))) == [0, 1]
    for layer in range(3):
        assert named(made, Routing(layer, {20 + layer: 1}))[layer + 1] == {21 + layer: 1.0}
    assert named(made, Routing(3, {23: 1})) == {}, "nothing follows the last token"


def test_of_a_prompt_the_next_layer_by_popularity() -> None:
    made = oracle()
    prompt = Routing(0, {0: 2, 1: 1}, tokens=3, prefill=True)
    assert named(made, prompt) == {1: {0: pytest.approx(2 / 3), 2: pytest.approx(1 / 3)}}
    assert named(made, Routing(3, {0: 2, 4: 1}, tokens=3, prefill=True)) == {}


def test_further_ahead() -> None:
    made = oracle("oracle-far", 1, 2, start=1)
    assert list(named(made, Routing(0, {10: 1}))) == [1, 2, 3], "every layer but the one that spoke"
    assert list(named(made, Routing(1, {11: 1}))) == [2, 3, 0]
    assert list(named(oracle("oracle-far"), Routing(0, {0: 2, 1: 1}, tokens=3, prefill=True))) == [1, 2, 3]


def test_layers_all_in_memory_are_left_out() -> None:
    assert list(named(oracle("oracle", 1, start=1, complete=1), Routing(0, {10: 1}))) == [2]


def test_a_layer_asked_again_is_in_the_same_step() -> None:
    """Early routing is asked first; where it does not stand, the layer is asked again, with other experts."""
    made = oracle("oracle", 1, 2, start=1)
    for layer, experts in ((0, {99: 1}), (0, {10: 1}), (1, {21: 1}), (1, {11: 1})):
        assert named(made, Routing(layer, experts))[layer + 1] == {11 + layer: 1.0}


def test_a_request_that_was_not_foretold() -> None:
    made = oracle()
    made.begin_request()
    with pytest.raises(UsageError, match="fate bench systems"):
        made.predict(Routing(0, {10: 1}), None)


@pytest.mark.parametrize("name", ORACLES)
def test_an_oracle_is_fate_but_for_its_predictor(name: str) -> None:
    """Else a comparison with it would measure something else too."""
    fate, oracle = (asdict(system) for system in (resolve_system("fate"), ORACLES[name]))
    assert {key for key in fate if fate[key] != oracle[key]} == {"name", "predictor", "switches_off", "source"}
