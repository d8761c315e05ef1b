"""Sizes, shares and speeds as people write them."""

from typing import Any

import pytest

from fate.errors import ExpertShareError, LinkSpeedError, MemorySizeError
from fate.units import GIB, MIB, format_bytes, parse_experts, parse_link, parse_memory


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


@pytest.mark.parametrize(
    "value, speed",
    [
        ("12GB/s", 12e9),
        ("1.5 GB/s", 1.5e9),
        (" 800MB/s ", 8e8),
        ("800 kB/s", 8e5),
        ("1GiB/s", 2.0**30),
        ("2KiB/s", 2048.0),
        ("100B/s", 100.0),
        ("2TB/s", 2e12),
        (5e9, 5e9),
        (4096, 4096.0),
    ],
)
def test_a_speed(value: str | float, speed: float) -> None:
    assert parse_link(value) == speed


@pytest.mark.parametrize(
    "value",
    [
        *("0", "0GB/s", "-1GB/s", "12GB", "12Gb/s", "12", "fast", "", "infGB/s", "nan", "1iB/s", "1 PB/s", "0.0001B/s"),
        *("9" * 400 + "GB/s", 0, -1.0, float("inf"), float("nan"), True, None),
    ],
)
def test_a_speed_that_is_none(value: Any) -> None:
    with pytest.raises(LinkSpeedError) as error:
        parse_link(value)
    assert str(error.value).startswith(f"link speed {value!r} is not valid: write a positive")
    assert "12GB/s" in str(error.value)
    assert "\n" not in str(error.value)
