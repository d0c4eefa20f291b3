"""Seeded bugs and the checks that must notice them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=type[Any])


def noted_in(bugs: dict[Any, tuple[str, ...]]) -> Callable[..., Callable[[C], C]]:
    """A decorator that notes which checks a bug must trip, and gives it the docstring of the sound class."""

    def trips(*checks: str) -> Callable[[C], C]:
        def note(cls: C) -> C:
            bugs[cls] = checks
            if cls.__doc__ is None:
                cls.__doc__ = cls.__mro__[1].__doc__
            return cls

        return note

    return trips
