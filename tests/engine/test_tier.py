"""A tier of slots over another one, over the disk: the right bytes, whichever tier holds them."""

import random
import threading

import pytest

from fate.cache import POLICIES, ExpertCache
from fate.core import ExpertKey, Routing
from fate.engine.accounting import Accounting
from fate.engine.residency import Residency
from fate.engine.slots import SlotPool
from fate.engine.tier import TierSource
from fate.errors import TransferError
from fate.precision import PRECISIONS
from fate.store.reader import StoreReader
from fate.transfer.disk import DiskSource
from fate.transfer.scheduler import TransferScheduler
from tiny import tiny_store


class Tier:
    """Two cached experts more than `each` a layer pass through it."""

    def __init__(self, header, each, make_source):
        counts = [layer.num_experts for layer in header.layers]
        cache = ExpertCache(counts, [each] * len(counts), 2, POLICIES.get("lru"))
        self.pool = SlotPool(cache.num_slots, header.max_record_bytes)
        self.accounting = Accounting(len(counts))
        scheduler = TransferScheduler(make_source(self.pool), meter=self.accounting.count_read)
        precision = PRECISIONS.get("full")(None)
        self.residency = Residency(header, cache, scheduler, precision, self.accounting, threading.RLock())

    @property
    def bytes_read(self):
        return sum(stats.bytes_moved for stats in self.accounting.layers(False))

    def close(self):
        self.residency.close()
        self.pool.close()


@pytest.fixture
def tiers():
    """(reader, lower tier of four experts a layer, upper tier of one)"""
    reader = StoreReader(tiny_store("qwen2_moe"))
    lower = Tier(reader.header, 4, lambda pool: DiskSource(reader, pool.view))
    upper = Tier(reader.header, 1, lambda pool: TierSource(lower.residency, lower.pool.view, pool.view))
    yield reader, lower, upper
    upper.close()
    lower.close()
    reader.close()


def test_every_lease_gives_the_records_of_the_store(tiers):
    reader, lower, upper = tiers
    rng, checked = random.Random(0), 0
    for _ in range(120):
        layer = rng.randrange(len(reader.header.layers))
        experts = rng.sample(range(reader.header.layers[layer].num_experts), 3)
        with upper.residency.lock, upper.residency.begin(Routing(layer, dict.fromkeys(experts, 1))) as lease:
            for group in lease:
                for entry in group:
                    record = reader.header.layout(layer).record_bytes
                    reader.verify(entry.key, upper.pool.view(entry.slot)[:record], prefix=True, rest=True)
                    checked += 1
    assert checked == 360
    assert 0 < lower.bytes_read < upper.bytes_read, "the lower tier held some of what the upper one read"


def test_what_the_lower_tier_cannot_read_reaches_the_layer_that_waits(tiers, monkeypatch):
    _, _, upper = tiers

    def fail(*_):
        raise OSError(5, "planted")

    with monkeypatch.context() as patch:
        patch.setattr(StoreReader, "read_into", fail)
        with pytest.raises(TransferError, match="planted"), upper.residency.lock:
            list(upper.residency.begin(Routing(0, {0: 1})))
    with upper.residency.lock, upper.residency.begin(Routing(0, {0: 1})) as lease:
        assert [entry.key for group in lease for entry in group] == [ExpertKey(0, 0)]
