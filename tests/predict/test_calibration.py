"""Calibration: how many candidates are named, and how likely each is said to be."""

import random

import pytest

from fate.predict.calibration import Calibration, GateOutput

NUM_EXPERTS, TOP_K, LIMIT = 24, 4, 12


def saying(rng, noise, absent=range(NUM_EXPERTS)):
    """A gate's probabilities, and the experts that are needed: the best of its scores with noise added."""
    scores = [rng.random() ** 4 for _ in range(NUM_EXPERTS)]
    total = sum(scores)
    order = sorted(range(NUM_EXPERTS), key=scores.__getitem__, reverse=True)[:LIMIT]
    truth = [score + noise * rng.random() for score in scores]
    needed = sorted(range(NUM_EXPERTS), key=truth.__getitem__, reverse=True)[:TOP_K]
    return GateOutput(
        [(expert, scores[expert] / total) for expert in order], set(range(NUM_EXPERTS)) - set(absent)
    ), needed


def settled(noise, steps=3000):
    """A calibration after many tokens; the coverage and the number of candidates of the last 500."""
    rng, calibration, covered, named_count = random.Random(0), Calibration(TOP_K, LIMIT), 0, 0
    for step in range(steps):
        said, needed = saying(rng, noise)
        if step >= steps - 500:
            named = {expert for expert, _ in calibration.confident(said)}
            covered += len(named & set(needed))
            named_count += len(named)
        calibration.learn(said, needed)
    return calibration, covered / (500 * TOP_K), named_count / 500


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_enough_candidates_are_named(noise):
    _, coverage, named = settled(noise)
    assert coverage > 0.93
    assert TOP_K < named < LIMIT


def test_a_surer_gate_names_fewer():
    assert settled(0.1)[2] < settled(0.3)[2] - 0.5


def test_confidences_are_the_frequencies_of_ranks():
    calibration, _, _ = settled(0.3)
    rng, hits, said_sum, count = random.Random(1), 0, 0.0, 0
    for _ in range(2000):
        said, needed = saying(rng, 0.3)
        for expert, confidence in calibration.confident(said):
            hits += expert in needed
            said_sum += confidence
            count += 1
    assert said_sum / count == pytest.approx(hits / count, abs=0.08)


def test_what_is_in_memory_is_named_but_not_read_and_teaches_nothing():
    rng, calibration = random.Random(0), Calibration(TOP_K, LIMIT)
    said, needed = saying(rng, 0.1, absent=())
    before = calibration.confident(GateOutput(said.ranked, ()))
    assert all(confidence == 0.0 for _, confidence in calibration.confident(said))
    calibration.learn(said, needed)
    after = dict(calibration.confident(GateOutput(said.ranked, ())))
    assert {expert: confidence for expert, confidence in before if expert in after} == after
