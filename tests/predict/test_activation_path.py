"""The activation-path predictor: planted requests are recognised, the matching is right, the collection is bounded."""

import random
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fate.core import Routing
from fate.predict import PREDICTORS, PredictorContext
from fate.predict.activation_path import LAYERS_AHEAD, ActivationMatrix, MatrixCollection

LAYERS, EXPERTS, TOP_K = 6, 16, 2


def predictor(num_experts=(EXPERTS,) * LAYERS, top_k=TOP_K, incomplete=lambda layer: True):
    context = PredictorContext([None] * len(num_experts), incomplete, num_experts, top_k)
    return PREDICTORS.get("activation-path")(context)


def path(seed):
    """TOP_K experts of every layer: what a planted topic uses."""
    rng = random.Random(seed)
    return [rng.sample(range(EXPERTS), TOP_K) for _ in range(LAYERS)]


def run(guesser, experts_of_layers, tokens=1):
    """Predictions of each layer of the last of `tokens` decode steps that all use the same experts."""
    for _ in range(tokens):
        last = [guesser.predict(Routing(at, dict.fromkeys(e, 1)), None) for at, e in enumerate(experts_of_layers)]
    return last


def test_a_recorded_request_is_recognised_by_its_first_layer():
    guesser = predictor()
    for topic in range(5):
        guesser.begin_request()
        run(guesser, path(topic), tokens=3)
    for topic in range(5):
        guesser.begin_request()
        first, *_ = run(guesser, path(topic))
        assert [prediction.layer for prediction in first] == [1, 2, 3]
        for prediction in first:
            assert set(prediction.experts) == set(path(topic)[prediction.layer])


def test_nearer_layers_are_preferred_and_the_first_follow_the_last():
    guesser = predictor()
    guesser.begin_request()
    last = run(guesser, path(0), tokens=2)[-1]
    assert [prediction.layer for prediction in last] == [0, 1, 2]
    for ahead, prediction in enumerate(last, 1):
        assert [confidence for _, confidence in prediction.ranked] == [pytest.approx(0.5 * (1 - ahead / LAYERS))] * 2


def test_before_anything_is_recorded_the_request_stands_in_for_itself():
    guesser = predictor()
    guesser.begin_request()
    assert run(guesser, path(0))[0] == [], "nothing is known of the layers ahead"
    for prediction in run(guesser, path(0))[0]:
        assert set(prediction.experts) == set(path(0)[prediction.layer])


def test_nothing_is_named_for_a_layer_whose_experts_are_all_in_memory():
    guesser = predictor(incomplete=lambda layer: layer != 2)
    guesser.begin_request()
    assert [prediction.layer for prediction in run(guesser, path(0), tokens=2)[0]] == [1, 3]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_of_few_layers_names_each_other_layer_once(layers):
    guesser = predictor(num_experts=(EXPERTS,) * layers)
    guesser.begin_request()
    last = run(guesser, path(0)[:layers], tokens=2)[-1]
    assert [prediction.layer for prediction in last] == list(range(min(LAYERS_AHEAD, layers - 1)))


def test_candidates_are_bounded_by_twice_a_tokens_experts_and_by_chance():
    guesser = predictor()
    guesser.begin_request()
    for count in (7, 6, 5, 4, 3, 2, 1):  # seven experts of layer 1, popular in this order; the last two below chance
        for expert in range(count):
            guesser.predict(Routing(1, {expert: 1}), None)
    (named,) = guesser.predict(Routing(0, {0: 1, 1: 1}), None)
    assert named.experts == (0, 1, 2, 3)
    (named,) = guesser.predict(Routing(0, dict.fromkeys(range(10), 1), tokens=5, prefill=True), None)
    assert named.experts == (0, 1, 2, 3, 4, 5), "many tokens need more; the seventh has 1 of 28, less than 1 of 16"


counts = st.dictionaries(st.integers(0, 4), st.integers(1, 3), max_size=3)
request_steps = st.lists(st.tuples(st.integers(0, 2), counts), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(past=st.lists(request_steps, max_size=7), current=request_steps)
def test_nearness_kept_up_to_date_is_nearness_computed_anew(past, current):
    num_experts, capacity = (5, 5, 5), 4
    collection, matrix = MatrixCollection(num_experts, capacity), ActivationMatrix(num_experts)
    for request in past:
        follow(collection, matrix, request)
        collection.add(matrix)
        matrix.clear()
        collection.restart()
    follow(collection, matrix, current)
    assert len(collection) == min(len(past), capacity)
    kept = [[collection.row(at, layer) for layer in range(3)] for at in range(len(collection))]
    anew = [sum(cosine(a, b) for a, b in zip(matrix.counts, rows, strict=True)) for rows in kept]
    assert collection.nearness == pytest.approx(anew, abs=1e-5)
    if anew:
        assert anew[collection.nearest()] == pytest.approx(max(anew), abs=1e-5)


def follow(collection, matrix, steps):
    for layer, pairs in steps:
        matrix.count(layer, pairs)
        collection.follow(layer, pairs, matrix)


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0


def test_a_full_collection_gives_up_what_the_new_matrix_resembles_most():
    collection, matrix = MatrixCollection((4,), capacity=2), ActivationMatrix((4,))
    for pairs in ({0: 1}, {1: 1}, {1: 3, 2: 1}):
        follow(collection, matrix, [(0, pairs)])
        collection.add(matrix)
        matrix.clear()
        collection.restart()
    rows = [collection.row(at, 0) / collection.row(at, 0).sum() for at in range(2)]
    assert len(collection) == 2
    assert rows[0] == pytest.approx([1, 0, 0, 0])
    assert rows[1] == pytest.approx([0, 0.75, 0.25, 0])


def test_an_empty_request_is_not_recorded():
    guesser = predictor()
    for _ in range(3):
        guesser.begin_request()
    assert len(guesser.past) == 0


def test_a_prediction_is_cheap():
    """Some 40 µs are usual with 28 layers, 64 experts and 120 matrices; matching them all anew takes thousands."""
    guesser = predictor(num_experts=(64,) * 28, top_k=8)
    rng = random.Random(0)
    token = [Routing(layer, dict.fromkeys(rng.sample(range(64), 8), 1)) for layer in range(28)]
    for _ in range(121):
        guesser.begin_request()
        for routing in token:
            guesser.predict(routing, None)
    assert len(guesser.past) == 120
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for routing in token:
            guesser.predict(routing, None)
        times.append(time.perf_counter() - start)
    assert min(times) / 28 < 500e-6
