"""The cross-layer gate with gates that the test answers for."""

import random

from fate.core import Routing
from fate.predict import PREDICTORS, PredictorContext
from fate.predict.cross_layer import BUSY_CONFIDENCE, MIN_CONFIDENCE, PATIENCE

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 16, 2


class Gate:
    """Ranks experts as the gate input, a list of experts, says."""

    def rank(self, gate_input, limit):
        others = [expert for expert in range(NUM_EXPERTS) if expert not in gate_input]
        order = [*gate_input, *others][:limit]
        return [tuple((expert, 0.4 / (rank + 1)) for rank, expert in enumerate(order))]


def make(cached=lambda layer: (), gates=None, incomplete=lambda layer: True, load=lambda: 0.0):
    gates = gates or [Gate()] * NUM_LAYERS
    context = PredictorContext(gates, incomplete, [NUM_EXPERTS] * NUM_LAYERS, TOP_K, cached, load)
    return PREDICTORS.get("cross-layer")(context)


def routing(layer, experts):
    return Routing(layer, dict.fromkeys(experts, 1))


def test_the_next_two_layers_the_nearer_first_and_worth_more():
    near, far = make().predict(routing(0, (3, 5)), [3, 5])
    assert (near.layer, far.layer) == (1, 2)
    assert near.experts[:2] == far.experts[:2] == (3, 5)
    assert far.ranked[0][1] == near.ranked[0][1] * PATIENCE


def test_what_is_cached_is_named_with_confidence_zero():
    near, _ = make(cached=lambda layer: {3}).predict(routing(0, (3, 5)), [3, 5])
    assert dict(near.ranked)[3] == 0.0
    assert dict(near.ranked)[5] > 0.0


def test_a_busy_link_is_left_to_what_is_more_likely():
    """The gate's third word on layer 1 is right for three tokens in ten: worth a read on an idle link."""
    load = [0.0]
    predictor = make(load=lambda: load[0])
    for token in range(200):
        (near, _) = predictor.predict(routing(0, (3, 5)), [3, 5, 7])
        predictor.predict(routing(1, (3, 7) if token % 10 < 3 else (3, 5)), [0])
    idle = {expert for expert, confidence in near.ranked if confidence}
    load[0] = 1.0
    (near, _) = predictor.predict(routing(0, (3, 5)), [3, 5, 7])
    full = {expert: confidence for expert, confidence in near.ranked if confidence}
    assert {3, 5} == set(full) < idle
    assert min(full.values()) >= BUSY_CONFIDENCE
    assert 7 in near.experts, "named all the same"


def test_complete_layers_and_gates_that_cannot_be_asked_are_left_out():
    assert [p.layer for p in make(incomplete=lambda layer: layer != 1).predict(routing(0, (3,)), [3])] == [2]
    assert [p.layer for p in make(gates=[Gate(), None, Gate(), Gate()]).predict(routing(0, (3,)), [3])] == [2]
    assert list(make().predict(routing(0, (3,)), None)) == []


def test_the_first_layers_of_the_next_token_from_what_tokens_used_lately():
    predictor = make()
    for _ in range(30):
        for layer in range(NUM_LAYERS):
            predictions = predictor.predict(routing(layer, (7, 9)), [7, 9])
    assert [p.layer for p in predictions] == [0, 1]
    assert set(predictions[0].experts[:2]) == {7, 9}
    assert predictions[0].ranked[0][1] > 0.5, "always needed, so worth a read"


def test_layers_that_have_nothing_in_common_are_no_longer_guessed():
    """An adversarial model: what a gate says of the next layer's input means nothing."""
    rng, predictor = random.Random(0), make()
    for _ in range(300):
        for layer in range(NUM_LAYERS):
            needed = rng.sample(range(NUM_EXPERTS), TOP_K)
            predictions = predictor.predict(routing(layer, needed), rng.sample(range(NUM_EXPERTS), TOP_K))
    reads = [confidence for prediction in predictions for _, confidence in prediction.ranked if confidence]
    assert all(confidence >= MIN_CONFIDENCE for confidence in reads)
    named = sum(len(prediction.ranked) for prediction in predictions)
    assert len(reads) < named / 3, "a wrong read in eight is chance here: most are not worth it"


def test_of_a_prompt_the_next_layer_alone_by_share():
    gate = Gate()
    gate.shares = lambda gate_input: ((4, 0.9), (2, 0.1))
    prompt = Routing(1, {4: 30, 2: 10}, tokens=20, prefill=True)
    (prediction,) = make(gates=[gate] * NUM_LAYERS).predict(prompt, object())
    assert (prediction.layer, prediction.ranked) == (2, ((4, 0.9), (2, 0.1)))
    assert not make(gates=[gate] * NUM_LAYERS).predict(Routing(3, {1: 5}, tokens=5, prefill=True), object())


def test_rows_of_several_sequences_are_predicted_one_by_one():
    """What one of two rows will need is likelier than what each of them may."""

    class Rows(Gate):
        def rank(self, gate_input, limit):
            return [row for experts in gate_input for row in super(Rows, self).rank(experts, limit)]

    predictor = make(gates=[Rows()] * NUM_LAYERS)
    near, _ = predictor.predict(Routing(0, {3: 1, 5: 1, 9: 2}, tokens=2), [[3, 9], [5, 9]])
    confidence = dict(near.ranked)
    assert near.experts[0] == 9
    assert {3, 5} <= set(near.experts)
    assert confidence[9] > confidence[3] > 0
