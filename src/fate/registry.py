"""Named implementations of a seam: `@POLICIES.register("lru")` puts a class where the CLI and the tests find it.

>>> COLOURS: Registry[type] = Registry("colour")
>>> @COLOURS.register("red")
... class Red: ...
>>> COLOURS.names()
('red',)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from fate.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """A name -> implementation table. `kind` is the word an error message uses for its members."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._members: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(member: T) -> T:
            if name in self._members:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._members[name] = member
            return member

        return add

    def get(self, name: str) -> T:
        """The member called `name`; raises UnknownNameError naming what is allowed."""
        try:
            return self._members[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self.names()) from None

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._members))
