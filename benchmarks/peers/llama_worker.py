"""llama.cpp in a process of its own, run by the Python that has llama-cpp-python: `python llama_worker.py JOB`.

The low-level interface, so that nothing but llama.cpp is timed. Its defaults stand (mmap, flash attention where it
wants it, batches of 512); the job says whether weights are repacked. The last line of output is the result.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from measurement import measure  # beside this script

_BATCH = 512


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:
    """Errors only."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaEngine:
    """See `measurement.Engine`."""

    def __init__(self, job: dict[str, Any]) -> None:
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = job["repack"]
        self._model = llama_cpp.llama_model_load_from_file(job["model"].encode(), model_params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {job['model']}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = job["max_context"]
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = job["threads"][0]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp has no memory for a context of {job['max_context']} tokens")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._position = 0

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._position = 0

    def set_threads(self, threads: int) -> None:
        llama_cpp.llama_set_n_threads(self._context, threads, threads)

    def feed(self, ids: Sequence[int]) -> None:
        for first in range(0, len(ids), _BATCH):
            self._decode(ids[first : first + _BATCH], every=False)
        llama_cpp.llama_get_logits_ith(self._context, -1)

    def write_logits(self, ids: Sequence[int], path: str) -> None:
        self._decode(ids, every=True)
        rows = [llama_cpp.llama_get_logits_ith(self._context, i) for i in range(len(ids))]
        np.save(path, np.stack([np.ctypeslib.as_array(row, (self._vocabulary,)) for row in rows]))

    def counters(self) -> dict[str, float]:
        return {}

    def _decode(self, ids: Sequence[int], every: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = self._position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i == len(ids) - 1
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp cannot decode")
        self._position += len(ids)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    result = measure(LlamaEngine(given), given)
    result["version"] = llama_cpp.__version__
    result["system"] = llama_cpp.llama_print_system_info().decode()
    print(json.dumps(result))
