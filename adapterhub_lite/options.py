"""Strict options: a frozen dataclass whose values are what its annotations say.

No coercion: `rank="8"` is an error and not eight. Supported annotations are bool, int,
float (finite; an int will do), str, None, Literal, unions, `tuple[X, ...]` and
`Mapping[str, X]`: what JSON can carry there and back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union

from .errors import ConfigError, nearest

T = TypeVar("T")


class Bounds(NamedTuple):
    """What a number may be at most and at least; open where the bound itself is no value."""

    least: float | None = None
    most: float | None = None
    least_open: bool = False
    most_open: bool = False

    def hold(self, value: float) -> bool:
        low = self.least is None or (value > self.least if self.least_open else value >= self.least)
        return low and (self.most is None or (value < self.most if self.most_open else value <= self.most))

    def __str__(self) -> str:
        said = []
        if self.least is not None:
            said.append(f"{'above' if self.least_open else 'at least'} {self.least:g}")
        if self.most is not None:
            said.append(f"{'below' if self.most_open else 'at most'} {self.most:g}")
        return " and ".join(said)


def option(
    default: T,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> T:
    """A field of options with its default, a line of help and its bounds; the command line shows both.

    >>> @dataclasses.dataclass
    ... class Sparse:
    ...     density: float = option(0.2, "The share that is kept.", above=0, most=1)
    >>> validate(Sparse(density=2.0), owner="rule 'sparse'")
    Traceback (most recent call last):
    adapterhub_lite.errors.ConfigError: rule 'sparse': density=2.0 is not above 0 and at most 1; change density
    """
    bounds = Bounds(
        least if above is None else above, most if below is None else below, above is not None, below is not None
    )
    made: T = dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})
    return made


def bounds(field: dataclasses.Field[Any]) -> Bounds:
    """The bounds that a field was given."""
    found: Bounds = field.metadata.get("bounds", Bounds())
    return found


def validate(options: Any, *, owner: str) -> None:
    """Raise `ConfigError` if a field of the dataclass `options` has a value of the wrong type, or out of bounds."""
    hints = _hints(type(options))  # type: ignore[arg-type]  # mypy forgets that a class has a hash
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not _fits(value, hints[field.name]):
            raise ConfigError(
                f"{field.name}={value!r} is not {_describe(hints[field.name])}", where=owner, fix=f"change {field.name}"
            )
        if isinstance(value, (int, float)) and not bounds(field).hold(value):
            raise ConfigError(f"{field.name}={value!r} is not {bounds(field)}", where=owner, fix=f"change {field.name}")


def build(cls: type[T], values: Mapping[str, Any], *, owner: str) -> T:
    """An instance of the dataclass `cls` from plain `values`; unknown names are errors.

    JSON has no tuples: a list is taken where a tuple is meant.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}", where=owner, fix=nearest(name, known))
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def plain(options: Any) -> dict[str, Any]:
    """The fields of `options` as JSON can carry them; `build` gives the instance back."""
    return {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}


def changed(options: Any) -> dict[str, Any]:
    """As `plain`, but only what is not at its default.

    >>> @dataclasses.dataclass
    ... class Sparse:
    ...     density: float
    ...     seed: int = 0
    ...     layers: tuple[str, ...] = ()
    >>> changed(Sparse(0.1, layers=("q_proj",)))
    {'density': 0.1, 'layers': ['q_proj']}
    """
    return {
        f.name: _plain(value) for f in dataclasses.fields(options) if (value := getattr(options, f.name)) != _default(f)
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(k, str) and _fits(v, args[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a table of names to {_describe(args[1])}"
    return {float: "a finite number", int: "an integer", str: "a string", bool: "true or false"}.get(hint, str(hint))
