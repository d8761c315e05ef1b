"""Several sequences decoded together: tokens per second against one.

    python benchmarks/batch.py STORE --experts 50% --sequences 1 4 8 --repeats 3

All decode the same number of tokens after prompts of their own, each with its own KV cache rows. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

import fate
from fate.kernels import native


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--experts", default="50%")
    parser.add_argument("--system", default="fate")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    speeds: dict[int, list[float]] = {count: [] for count in options.sequences}
    hits: dict[int, float] = {}
    with (
        fate.load(
            options.store,
            experts=options.experts,
            system=options.system,
            max_batch=max(options.sequences),
            max_context=512,
            on_plan=lambda *_: None,
        ) as model,
        torch.inference_mode(),
    ):
        model.fate.engine.pool.populate()
        length = options.prompt + 2 * options.tokens
        ids = torch.randint(0, model.config.vocab_size, (max(options.sequences), length))
        for _ in range(options.repeats):
            for count in options.sequences:  # in turns
                cache = model.fate.new_cache(model.config)
                model(ids[:count, : options.prompt], past_key_values=cache, logits_to_keep=1)
                for at in range(options.prompt, length):
                    if at == options.prompt + options.tokens:
                        before, start = model.fate.stats().decode, time.perf_counter()
                    model(ids[:count, at : at + 1], past_key_values=cache, logits_to_keep=1)
                speeds[count].append(count * options.tokens / (time.perf_counter() - start))
                hits[count] = (model.fate.stats().decode - before).hit_rate
    medians = {count: statistics.median(found) for count, found in speeds.items()}
    print(
        json.dumps(
            {
                "experts": options.experts,
                "system": options.system,
                "instructions": native.active().name,
                "tokens_per_s": {count: [round(speed, 2) for speed in found] for count, found in speeds.items()},
                "times_as_one": {count: round(medians[count] / medians[1], 2) for count in medians},
                "hit_rate": {count: round(rate, 3) for count, rate in hits.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
