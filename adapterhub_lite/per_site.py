"""Numbers and options that differ from site to site: by patterns of names, or along the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from .errors import ConfigError

Number = float | Sequence[float]
Weight = float | Mapping[str, Number]
"""A number; or by pattern (`*` and `?`, the first that matches) a number, or several along the layers."""

T = TypeVar("T")


def first(table: Mapping[str, T], site: str) -> T | None:
    """What stands at the first pattern that matches the site's whole name."""
    return next((value for pattern, value in table.items() if fnmatchcase(site, pattern)), None)


def weight_at(weight: Weight, site: str, depths: Mapping[str, float]) -> float:
    """The weight at one site. `depths`: how far down the model each site is, from 0 to 1.

    >>> weight_at({"*.mlp.*": 0.5, "*": [0.0, 1.0]}, "layers.1.q", {"layers.1.q": 0.25})
    0.25
    """
    if not isinstance(weight, Mapping):
        return weight
    found = first(weight, site)
    if found is None:
        raise ConfigError(
            f"no pattern of the weights matches {site!r}", fix="add '*': 0, or another number for the rest"
        )
    return along(found, depths[site]) if isinstance(found, Sequence) else found


def check(weight: Weight, owner: str) -> None:
    """Raise `ConfigError` unless every number in `weight` is one."""
    table = weight if isinstance(weight, Mapping) else {"": weight}
    for pattern, value in table.items():
        where = f"{owner} at {pattern!r}" if pattern else owner
        numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not numbers:
            raise ConfigError("a weight along the layers has no numbers", where=where, fix="give at least one")
        for number in numbers:
            if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
                raise ConfigError(f"the weight {number!r} is not a finite number", where=where)


def plain(weight: Weight) -> Any:
    """As JSON can carry it."""
    if not isinstance(weight, Mapping):
        return weight
    return {at: [*value] if isinstance(value, Sequence) else value for at, value in weight.items()}


def along(values: Sequence[float], depth: float) -> float:
    """The value at a depth between 0 and 1: linear between the values, which are evenly spaced.

    >>> along([0.0, 1.0, 0.0], 0.75)
    0.5
    """
    at = depth * (len(values) - 1)
    low = min(int(at), max(len(values) - 2, 0))
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def depths(sites: Sequence[str]) -> dict[str, float]:
    """Each site's depth: 0 in the first layer that has one, 1 in the last.

    The layer is the first number in the name. Sites without one are in the first layer.

    >>> depths(["h.2.q", "h.3.q", "h.6.q", "head"])
    {'h.2.q': 0.0, 'h.3.q': 0.25, 'h.6.q': 1.0, 'head': 0.0}
    """
    layers = {
        site: next((int(word) for word in site.split(".") if word.isdecimal() and len(word) < 10), None)
        for site in sites
    }
    known = [layer for layer in layers.values() if layer is not None]
    start, end = min(known, default=0), max(known, default=0)
    length = max(end - start, 1)
    return {site: 0.0 if layer is None else (layer - start) / length for site, layer in layers.items()}
