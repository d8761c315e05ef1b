"""Sizes, shares and speeds as people write them."""

import pytest

from fate.errors import ExpertShareError, MemorySizeError
from fate.units import GIB, MIB, format_bytes, parse_experts, parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * GIB), ("6gib", 6 * GIB), ("1.5 GB", 1_500_000_000), ("900MB", 900_000_000), ("4G", 4 * GIB), (7, 7)],
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "lots", "4XB", "", "GiB", "1e3", "inf", "nan", 0, -5, True, "6 Gi B"])
def test_sizes_that_are_none(text):
    with pytest.raises(MemorySizeError, match="write a positive size such as 6GiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("value", "slots"), [("25%", 240), (0.25, 240), ("0.25", 240), (240, 240), ("100%", 960), (5000, 960)]
)
def test_expert_shares(value, slots):
    assert parse_experts(value, 960) == slots


@pytest.mark.parametrize("value", ["0%", "-3", "many", "%", 0, -0.5])
def test_expert_shares_that_are_none(value):
    with pytest.raises(ExpertShareError):
        parse_experts(value, 960)


def test_sizes_are_written_with_two_digits():
    assert format_bytes(3 * MIB // 2) == "1.50 MiB"
