"""What a run is held against: the machine's compute with everything resident, and the link's bandwidth.

rho is one expert's transfer time over one layer's compute time; runs on different machines compare at equal rho.
"""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

from fate.bench.passes import Pass
from fate.core import ExpertKey
from fate.store.reader import StoreReader

_READERS = 2  # as many as transfers have
_PROBE_BYTES = 256 << 20


@dataclass(frozen=True)
class Compute:
    """Seconds a token without a byte to move. layer_s: of one decoded token, over the number of MoE layers (so it
    holds that share of embedding and head too). record_bytes: of the largest expert. resident: nothing was read in
    these passes; otherwise the experts do not fit in memory and the time spent waiting for them is taken off."""

    prefill_s_per_token: float
    decode_s_per_token: float
    layer_s: float
    record_bytes: int
    resident: bool

    def s_per_token(self, phase: str) -> float:
        """phase: "prefill" or "decode"."""
        return self.prefill_s_per_token if phase == "prefill" else self.decode_s_per_token

    def transfer_s(self, bytes_per_s: float) -> float:
        """Of one expert."""
        return self.record_bytes / bytes_per_s

    def rho(self, bytes_per_s: float) -> float:
        return self.transfer_s(bytes_per_s) / self.layer_s

    def bytes_per_s(self, rho: float) -> float:
        """The speed of a link that has this `rho`."""
        return self.record_bytes / (rho * self.layer_s)


def compute_limit(passes: list[list[Pass]], moe_layers: int, record_bytes: int) -> Compute:
    """From repeats (each the passes over all requests) of a system that prefetches nothing, all experts cached."""
    prefill = median(
        sum(p.ttft_s - p.stats.prefill.stall_s for p in repeat) / sum(p.prompt_tokens for p in repeat)
        for repeat in passes
    )
    decode = median(
        sum(p.decode_s - p.stats.decode.stall_s for p in repeat) / sum(p.new_tokens for p in repeat)
        for repeat in passes
    )
    resident = all(p.stats.total.bytes_moved == 0 for repeat in passes for p in repeat)
    return Compute(prefill, decode, decode / moe_layers, record_bytes, resident)


def bound_s(compute_s: float, num_bytes: float, bytes_per_s: float) -> float:
    """The least time in which this much can be computed and this many bytes moved, perfectly overlapped."""
    return max(compute_s, num_bytes / bytes_per_s)


def disk_bytes_per_s(reader: StoreReader) -> float:
    """The better of two passes over up to 256 MiB of a store's experts, read as transfers do: record by record, by two
    threads, past the page cache where the file system allows it."""
    header = reader.header
    keys = [ExpertKey(at, e) for at, layer in enumerate(header.layers) for e in range(layer.num_experts)]
    keys = keys[: max(_READERS, _PROBE_BYTES // header.max_record_bytes)]
    return max(_timed_reads(reader, keys) for _ in range(2))


def _timed_reads(reader: StoreReader, keys: list[ExpertKey]) -> float:
    sizes = [layout.record_bytes for layout in map(reader.header.layout, range(len(reader.header.layers)))]

    def read(first: int) -> None:
        with mmap.mmap(-1, max(sizes)) as buffer, memoryview(buffer) as view:
            for key in keys[first::_READERS]:
                with view[: sizes[key.layer]] as record:
                    reader.read_into(key, record, 0)

    start = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, range(_READERS)))
    return sum(sizes[key.layer] for key in keys) / (time.perf_counter() - start)
