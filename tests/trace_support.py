"""Made-up routing traces for the simulator's tests."""

import random

import hypothesis.strategies as st

from fate.trace import RoutingTrace, TraceMeta, TraceStep


def one_layer(steps, experts=6):
    """A trace of one layer that needs these experts, in this order, in one decode step each."""
    meta = TraceMeta("made up", (experts,), top_k=max(map(len, steps), default=1) or 1)
    return RoutingTrace(meta, tuple(TraceStep(0, False, 1, (dict.fromkeys(step, 1),)) for step in steps))


def skewed(layers=3, experts=16, top_k=4, steps=60, seed=0):
    """A prompt and its decoding, twice, with popular experts that differ by layer."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(experts)]
    orders = [rng.sample(range(experts), experts) for _ in range(layers)]

    def pairs(layer, tokens):
        counts = {}
        for _ in range(tokens):
            chosen = set()
            while len(chosen) < top_k:
                chosen.add(orders[layer][rng.choices(range(experts), weights)[0]])
            for expert in chosen:
                counts[expert] = counts.get(expert, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    trace = []
    for at in range(steps):
        prefill = at % (steps // 2) == 0
        tokens = 5 if prefill else 1
        request = at * 2 // steps
        trace.append(TraceStep(request, prefill, tokens, tuple(pairs(layer, tokens) for layer in range(layers))))
    return RoutingTrace(TraceMeta("skewed", (experts,) * layers, top_k), tuple(trace))


# Steps of one layer with 5 experts, each step in the order of its routing.
small_steps = st.lists(st.lists(st.integers(0, 4), max_size=4, unique=True), max_size=12)
