from fate.engine.slots import SlotPool
from fate.plan.machine import resident_bytes
from fate.units import MIB


def test_pages_become_resident_when_written_or_populated_and_go_on_close():
    pool = SlotPool(num_slots=64, slot_bytes=4 * MIB)
    empty = resident_bytes()
    pool.view(3)[:] = b"x" * (4 * MIB)
    written = resident_bytes() - empty
    assert 2 * MIB <= written <= 64 * MIB, "one slot, and what it shares a large page with"
    pool.populate()
    assert resident_bytes() - empty >= 248 * MIB
    pool.close()
    assert resident_bytes() - empty <= 32 * MIB
