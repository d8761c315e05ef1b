"""The engine's own time for a decoded token: what is neither native kernels nor waiting for experts.

own_processor_ms counts the main thread's time on a processor, which other programs on the machine disturb less.

One process, one engine; run it in turns with another commit's to compare. Prints one JSON line.

    python benchmarks/own_time.py STORE --experts 50% --system fate --tokens 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from typing import Any


class Timed:
    """Calls what it wraps, and adds up the time that the main thread spends in it, by the clock and on a processor."""

    seconds = 0.0
    processor_s = 0.0

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if not callable(value) or isinstance(value, type):
            return value

        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return value(*args, **kwargs)
            start, began = time.perf_counter(), time.thread_time()
            try:
                return value(*args, **kwargs)
            finally:
                Timed.seconds += time.perf_counter() - start
                Timed.processor_s += time.thread_time() - began

        self.__dict__[name] = timed
        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--experts", default="50%")
    parser.add_argument("--system", default="fate")
    parser.add_argument("--link", default=None)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warm", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--instructions", default=None)
    parser.add_argument("--site", default=None, help="import fate from this folder")
    options = parser.parse_args()
    if options.site:
        sys.meta_path = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
        sys.path.insert(0, options.site)

    import torch

    import fate
    from fate.kernels import native

    if options.instructions:
        native.select(options.instructions)
    torch.manual_seed(0)
    with fate.load(
        options.store, experts=options.experts, system=options.system, link=options.link, on_plan=lambda *a: None
    ) as model:
        model.fate.engine.pool.populate()
        vocabulary = model.config.vocab_size
        ids = torch.randint(0, vocabulary, (1, options.prompt + options.warm + options.tokens))
        with torch.inference_mode():
            cache = model.fate.new_cache(model.config)
            for part in ids[:, : options.prompt].split(512, dim=1):
                model(part, past_key_values=cache, logits_to_keep=1)
            native._extension = Timed(native._extension)
            for layer in [m for m in model.modules() if hasattr(m, "__dict__")]:
                for held in layer.__dict__.values():
                    for part in (held, getattr(held, "_attend", None), getattr(held, "_half", None)):
                        state = getattr(part, "__dict__", {})
                        if "_native" in state and not isinstance(state["_native"], Timed):
                            state["_native"] = Timed(state["_native"])
            times: list[float] = []
            for at in range(options.prompt, ids.shape[1]):
                if at == options.prompt + options.warm:
                    before = model.fate.stats().decode
                    Timed.seconds, Timed.processor_s, times = 0.0, 0.0, []
                    began = time.thread_time()
                start = time.perf_counter()
                model(ids[:, at : at + 1], past_key_values=cache, logits_to_keep=1)
                times.append(time.perf_counter() - start)
        processor_s = time.thread_time() - began - Timed.processor_s
        stats = model.fate.stats().decode - before
        per_token = 1000 / options.tokens
        wall, kernels, waited = (per_token * s for s in (sum(times), Timed.seconds, stats.stall_s))
        result = {
            "experts": options.experts,
            "system": options.system,
            "link": options.link,
            "instructions": native.active().name if not options.instructions else options.instructions,
            "tokens": options.tokens,
            "ms_per_token": round(wall, 2),
            "median_ms": round(1000 * statistics.median(times), 2),
            "kernels_ms": round(kernels, 2),
            "waiting_ms": round(waited, 2),
            "own_ms": round(wall - kernels - waited, 2),
            "own_processor_ms": round(per_token * processor_s, 2),
            "hit_rate": round(stats.hit_rate, 4),
            "mib_per_token": round(stats.bytes_moved / options.tokens / 2**20, 1),
            "notes": model.fate.notes,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
