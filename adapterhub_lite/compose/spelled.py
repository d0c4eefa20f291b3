"""How people write a tree: `chain("a", 0.5 * use("b"))`, a name, a mapping, a list for the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ..errors import ConfigError
from .node import Base, Chain, Gate, Mean, Node, Route, Rows, Sum, Use, finite

Composition: TypeAlias = "Node | str | Mapping[str, float] | None"


def use(name: str) -> Use:
    """The adapter of that name, as a composition.

    >>> 0.7 * use("a") - use("b") / 2
    Sum(terms=((0.7, Use(name='a')), (-0.5, Use(name='b'))))
    """
    return Use(name)


def chain(*nodes: Composition) -> Chain:
    """One after the other.

    >>> chain("a", 0.5 * use("b")).of[0]
    Use(name='a')
    """
    return Chain(tuple(tree(node) for node in nodes))


def mean(*nodes: Composition) -> Mean:
    """Each with weight 1/N."""
    return Mean(tuple(tree(node) for node in nodes))


def route(gate: Gate, *nodes: Composition) -> Route:
    """Weighed by a trained gate."""
    return Route(gate, tuple(tree(node) for node in nodes))


def tree(which: Composition | Sequence[Composition]) -> Node:
    """A composition spelled as a name, a mapping from names to weights, or None for the base, as the tree that it is.

    A list of them is for the rows of a batch.

    >>> tree({"a": 0.5, "b": 0.5}) == 0.5 * use("a") + 0.5 * use("b")
    True
    """
    if isinstance(which, Node):
        return which
    if which is None:
        return Base()
    if isinstance(which, str):
        return Use(which)
    if isinstance(which, Mapping):
        for name, weight in which.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not finite(weight):
                raise ConfigError(f"the weight {weight!r} of {name!r} is not a finite number")
        return Sum(tuple((weight, Use(name)) for name, weight in which.items())) if which else Base()
    if isinstance(which, (list, tuple)):
        return Rows(tuple(tree(row) for row in which))
    raise ConfigError(f"{which!r} is no composition", fix="give a name, names with weights, None, or a tree of use(…)")
