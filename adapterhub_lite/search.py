"""Numbers in a box that make a function small, by its values alone: CMA-ES (Hansen and Ostermeier 2001).

https://arxiv.org/abs/1604.00772 is the author's tutorial, and the package `cma` his code. With one number there is no
covariance to adapt, and `cma` does not support it: then a grid and a golden section take its place.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from .errors import ConfigError

DIGITS = 6  # decimals of a number: what is printed can be typed again
GRID = 8  # intervals that a single number's range is first cut into
NARROW = 1e-4  # of the range: where the golden section ends
GOLDEN = (math.sqrt(5) - 1) / 2

Points = Generator[tuple[float, ...], float, None]


def points(start: Sequence[float], low: float, high: float, seed: int) -> Points:
    """Where to look next, beginning with `start`; what is sent back is the value there.

    It ends when the numbers have settled. The points depend on the arguments and the values, and on nothing else.
    """
    yield from _line(start[0], low, high) if len(start) == 1 else _evolution(start, low, high, seed)


def check() -> None:
    """Raise `ConfigError` unless the package `cma` is installed."""
    _cma()


def _evolution(start: Sequence[float], low: float, high: float, seed: int) -> Points:
    import numpy as np

    rng = np.random.default_rng(seed)
    asked: dict[str, Any] = {
        "bounds": [low, high],
        "randn": lambda *shape: rng.standard_normal(shape),  # its own would be the process's generator
        "seed": math.nan,
        "verbose": -10,  # nor does it read or write files
        "verb_log": 0,
        "tolx": 10.0**-DIGITS * (high - low),
    }
    with _quiet():
        strategy = _cma().CMAEvolutionStrategy(list(start), (high - low) / 6, asked)
    yield tuple(start)
    while not strategy.stop():
        with _quiet():
            found = strategy.ask()
        values = []
        for point in found:
            values.append((yield tuple(_within(x, low, high) for x in point)))
        with _quiet():
            strategy.tell(found, values)


def _line(start: float, low: float, high: float) -> Points:
    at = {start: (yield (start,))}
    for i in range(GRID + 1):
        x = _within(low + i * (high - low) / GRID, low, high)
        if x not in at:
            at[x] = yield (x,)
    best = min(at, key=lambda x: at[x])
    a = max((x for x in at if x < best), default=low)
    b = min((x for x in at if x > best), default=high)
    left, right = _within(b - GOLDEN * (b - a), low, high), _within(a + GOLDEN * (b - a), low, high)
    at_left = yield (left,)
    at_right = yield (right,)
    while b - a > NARROW * (high - low):
        if at_left <= at_right:
            b, right, at_right = right, left, at_left
            left = _within(b - GOLDEN * (b - a), low, high)
            at_left = yield (left,)
        else:
            a, left, at_left = left, right, at_right
            right = _within(a + GOLDEN * (b - a), low, high)
            at_right = yield (right,)


def _within(x: float, low: float, high: float) -> float:
    return min(max(round(float(x), DIGITS), low), high)


def _cma() -> Any:
    try:
        with _quiet():
            return importlib.import_module("cma")
    except ModuleNotFoundError as e:
        if e.name != "cma":
            raise
        raise ConfigError(
            "the search needs the package 'cma'", fix="pip install 'adapterhub-lite[search]', or pip install cma"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It warns of a missing plotting library, and of ties."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
