"""What is in a tree, and simpler trees that are the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from ..errors import ConfigError, NotMergeable
from .node import Base, Chain, Fuse, Gate, Mean, Node, Route, Rows, Sum, Use, Weight

MAX_DEPTH = 100  # of a tree: far below where Python's stack ends


def children(node: Node) -> tuple[Node, ...]:
    """Those right below."""
    if isinstance(node, Sum):
        return tuple(child for _, child in node.terms)
    return node.of if isinstance(node, (Mean, Chain, Route, Fuse, Rows)) else ()


def nodes(node: Node) -> Iterator[Node]:
    """It and all below; raises `ConfigError` for a tree that is too deep."""
    waiting = [(node, 1)]
    while waiting:
        own, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ConfigError(f"the composition is more than {MAX_DEPTH} levels deep", fix="nest less")
        yield own
        waiting += [(child, depth + 1) for child in reversed(children(own))]


def names(node: Node) -> tuple[str, ...]:
    """The adapters in it, each once, in order."""
    return tuple(dict.fromkeys(own.name for own in nodes(node) if isinstance(own, Use)))


def gates(node: Node) -> tuple[Gate, ...]:
    """The gates in it, each once, in order; a way by itself is its gate."""
    return tuple(dict.fromkeys(replace(gate, way=None) for gate in _gates(node)))


def ways(node: Node) -> dict[str, set[int | None]]:
    """By the names of the gates in it, which of their ways are on by themselves; None is all together."""
    found: dict[str, set[int | None]] = {}
    for gate in _gates(node):
        found.setdefault(gate.name, set()).add(gate.way)
    return found


def _gates(node: Node) -> Iterator[Gate]:
    for own in nodes(node):
        if isinstance(own, (Route, Fuse)):
            yield own.gate
        elif isinstance(own, Sum):
            yield from (weight for weight, _ in own.terms if isinstance(weight, Gate))


def weights(node: Node) -> dict[str, float] | None:
    """The weight of each adapter, if it is one sum of adapters, whatever its nesting; None if it is more.

    >>> from adapterhub_lite import mean, use
    >>> weights(mean("a", 0.5 * use("b") + use("a")))
    {'a': 1.0, 'b': 0.25}
    """
    if isinstance(node, Base):
        return {}
    if isinstance(node, Use):
        return {node.name: 1.0}
    if isinstance(node, (Sum, Mean)):
        terms = node.terms if isinstance(node, Sum) else tuple((1 / len(node.of), own) for own in node.of)
        total: dict[str, float] = {}
        for weight, child in terms:
            inner = weights(child)
            if inner is None or isinstance(weight, Gate):
                return None
            for name, own in inner.items():
                total[name] = total.get(name, 0.0) + weight * own
        return total
    return None


def lowered(node: Node, fixed: Callable[[Gate], Sequence[float] | None] | None = None) -> dict[str, float]:
    """The weight of each adapter where all are weight changes, which a chain adds up.

    `NotMergeable` for a gate, but for one of a Route whose weights `fixed` tells: they are the same for every input.

    >>> from adapterhub_lite import chain, mean, use
    >>> lowered(chain("a", 0.5 * use("b") + mean("a", "b")))
    {'a': 1.5, 'b': 1.0}
    """
    terms: Sequence[tuple[Weight, Node]]
    if isinstance(node, Sum):
        terms = node.terms
    elif isinstance(node, Route) and node.gate.fixed and fixed and (g := fixed(node.gate)) is not None:
        terms = tuple(zip(g, node.of, strict=True))
    elif isinstance(node, (Route, Fuse)):
        terms = ((node.gate, node),)
    else:
        share = 1 / len(node.of) if isinstance(node, Mean) else 1.0
        terms = tuple((share, own) for own in children(node))
    if gate := next((weight for weight, _ in terms if isinstance(weight, Gate)), None):
        raise NotMergeable(
            f"the gate {gate.name!r} weighs by the input, which no weight change can stand for",
            fix="load the composition on the model, with adapters.load_composition()",
        )
    total = {node.name: 1.0} if isinstance(node, Use) else dict[str, float]()
    for weight, own in terms:
        for name, inner in lowered(own, fixed).items():
            total[name] = total.get(name, 0.0) + float(weight) * inner  # type: ignore[arg-type]  # there is no gate
    return total


def reduced(node: Node, here: Collection[str]) -> Node:
    """The simplest tree that is the same where only the adapters `here` are.

    >>> from adapterhub_lite import chain, mean
    >>> reduced(chain("a", mean("b", "c")), {"c"})
    Sum(terms=((0.5, Use(name='c')),))
    """
    if isinstance(node, Use):
        return node if node.name in here else Base()
    if isinstance(node, Mean):
        return reduced(Sum(tuple((1 / len(node.of), own) for own in node.of)), here)
    if isinstance(node, Sum):
        terms = [(weight, reduced(own, here)) for weight, own in node.terms if weight != 0]
        terms = [(weight, own) for weight, own in terms if not isinstance(own, Base)]
        flat = weights(Sum(tuple(terms))) if terms else {}
        if flat is not None:
            terms = [(weight, Use(name)) for name, weight in flat.items() if weight != 0]
        if len(terms) == 1 and terms[0][0] == 1:
            return terms[0][1]
        return Sum(tuple(terms)) if terms else Base()
    if isinstance(node, Chain):
        links = [own for child in node.of if not isinstance(own := reduced(child, here), Base)]
        return Base() if not links else links[0] if len(links) == 1 else Chain(tuple(links))
    if isinstance(node, (Route, Fuse)):
        ways = tuple(reduced(own, here) for own in node.of)
        return Base() if all(isinstance(own, Base) for own in ways) else type(node)(node.gate, ways)
    if isinstance(node, Rows):
        each = tuple(reduced(own, here) for own in node.of)
        return Base() if all(isinstance(own, Base) for own in each) else Rows(each)
    return node
