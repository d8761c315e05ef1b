from __future__ import annotations

import pytest

from fate.errors import UnknownNameError, UsageError
from fate.registry import Registry


@pytest.fixture
def colours() -> Registry[type]:
    registry: Registry[type] = Registry("colour")
    registry.register("red")(int)
    registry.register("blue")(str)
    return registry


def test_a_registered_member_is_found_under_its_name(colours: Registry[type]) -> None:
    assert colours.get("red") is int
    assert colours.get("blue") is str


def test_register_returns_the_member_unchanged() -> None:
    registry: Registry[type] = Registry("colour")

    @registry.register("green")
    class Green:
        pass

    assert isinstance(Green, type)
    assert registry.get("green") is Green


def test_names_are_sorted_whatever_the_order_of_registration(colours: Registry[type]) -> None:
    assert colours.names() == ("blue", "red")


def test_an_unknown_name_is_a_usage_error_that_names_kind_value_and_choices(colours: Registry[type]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        colours.get("gren")
    assert str(caught.value) == "unknown colour 'gren': choose one of blue, red"
    assert isinstance(caught.value, UsageError)
    assert caught.value.exit_code == 2
    # The KeyError behind it is an implementation detail that a traceback should not show.
    assert caught.value.__suppress_context__


def test_registering_a_name_twice_fails_and_keeps_the_first(colours: Registry[type]) -> None:
    with pytest.raises(ValueError, match="colour 'red' is registered twice"):
        colours.register("red")(float)
    assert colours.get("red") is int


def test_registries_do_not_share_members(colours: Registry[type]) -> None:
    other: Registry[type] = Registry("shape")
    assert other.names() == ()
    with pytest.raises(UnknownNameError, match="unknown shape 'red'"):
        other.get("red")
