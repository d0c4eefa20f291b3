"""Compositions: what is on, as a tree of adapters, `0.7 * use("a") + 0.3 * use("b")`.

At each layer a tree maps the layer's input x and an output v to another output; it begins with v = y, the base's.

    Use(a)      f(x, v), what the adapter makes of v; v where it adapts nothing
    Base()      v
    Sum         v + Σ wᵢ (fᵢ(v) − v)
    Mean        the same with 1/N
    Chain       fₙ(… f₁(v)), with the same x for all
    Route       v + Σ gᵢ(x) (fᵢ(v) − v), with weights from a trained gate, or a router
    Fuse        v + V Σ aᵢ uᵢ, attention from v over what the adapters add, uᵢ: AdapterFusion
    Rows        each row of a batch its own; the root alone can be this

Nothing here imports torch: trees are made, read and written without a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from . import options
from .errors import ConfigError, NotMergeable, nearest
from .routing import Router

MAX_DEPTH = 100  # of a tree: far below where Python's stack ends


@dataclass(frozen=True)
class Gate:
    """A trained weight, σ(W h + b) in (0, 1) with tensors of its own at each layer; `adapters.add_gate` makes it.

    `gate * use("a")` is a term whose weight it is. h is the layer's input, or with `reads="output"` what the term
    begins with. With `per="sample"` it is the mean over a sample's tokens, with `per="token"` each token has its own.
    A gate of several `outputs` belongs to a `Route`, and is a softmax over them, or what the router `by` makes of the
    input; `adapters.add_router` makes that. `way` is one way of a router by itself: see `Route.alone`. One that
    `fuses` has the tensors of a `Fuse`, and `adapters.add_fusion` makes it.
    """

    name: str
    per: Literal["sample", "token"] = "sample"
    reads: Literal["input", "output"] = "input"
    outputs: int = 1
    by: Router | None = None
    way: int | None = None
    fuses: bool = False

    def __post_init__(self) -> None:
        options.validate(self, owner=f"gate {self.name!r}")
        if self.outputs < 1:
            raise ConfigError(f"a gate of {self.outputs} outputs weighs nothing", where=self.name, fix="give one")
        if self.by is not None and self.reads != "input":
            raise ConfigError(f"router {self.by.name!r} reads the layer's input", where=self.name)
        if self.fuses and (self.per, self.reads, self.by) != ("token", "output", None):
            raise ConfigError("a fusion reads the output, token by token", where=self.name)
        if self.way is not None and (self.by is None or not 0 <= self.way < self.outputs):
            what = f"a gate of {self.outputs} outputs has no way {self.way} that could be on alone"
            raise ConfigError(what, where=self.name, fix="make the router with adapters.add_router()")

    @property
    def fixed(self) -> bool:
        """Whether a router gives its weights that has the same for every input."""
        return self.by is not None and self.by.defines("fixed")

    def __mul__(self, node: Node) -> Sum:
        return Sum(((self, _node(node)),))


Weight: TypeAlias = "float | Gate"


class Node:
    """A part of a tree. `+`, `-`, and `*` and `/` with numbers make sums of them."""

    def __add__(self, other: object) -> Sum:
        if not isinstance(other, Node):
            return NotImplemented
        return Sum((*_terms(self), *_terms(other)))

    def __radd__(self, other: object) -> Node:
        return self if other == 0 and not isinstance(other, Node) else NotImplemented  # so that sum([…]) works

    def __mul__(self, weight: object) -> Sum:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            return NotImplemented
        terms = _terms(self)
        if any(isinstance(own, Gate) for own, _ in terms):
            return Sum(((weight, self),))
        return Sum(tuple((weight * own, node) for own, node in terms if not isinstance(own, Gate)))

    __rmul__ = __mul__

    def __neg__(self) -> Sum:
        return self * -1

    def __sub__(self, other: object) -> Sum:
        return self + -other if isinstance(other, Node) else NotImplemented

    def __truediv__(self, number: object) -> Sum:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return NotImplemented
        if number == 0:
            raise ConfigError("a composition cannot be divided by zero")
        return self * (1 / number)


@dataclass(frozen=True)
class Use(Node):
    """One adapter, by its name."""

    name: str

    def __post_init__(self) -> None:
        options.validate(self, owner="use")


@dataclass(frozen=True)
class Base(Node):
    """The base alone: it leaves what comes in as it is."""


@dataclass(frozen=True)
class Sum(Node):
    """v + Σ wᵢ (fᵢ(v) − v). A weight is a number or a gate of one output."""

    terms: tuple[tuple[Weight, Node], ...]

    def __post_init__(self) -> None:
        _children([node for _, node in _pairs(self.terms)], "Sum")
        for weight, _ in self.terms:
            if isinstance(weight, Gate):
                if weight.fuses:
                    raise ConfigError(f"the fusion {weight.name!r} is no weight of a term", fix="give it to a Fuse")
                if weight.outputs != 1 and weight.way is None:
                    what = f"the gate {weight.name!r} has {weight.outputs} outputs, and a term has one weight"
                    raise ConfigError(what, fix="give it to a Route")
            elif isinstance(weight, bool) or not isinstance(weight, (int, float)) or not _finite(weight):
                raise ConfigError(f"the weight {weight!r} of a term is not a finite number", fix="give one, or a gate")


@dataclass(frozen=True)
class Mean(Node):
    """v + 1/N Σ (fᵢ(v) − v): N equal ones are one of them."""

    of: tuple[Node, ...]

    def __post_init__(self) -> None:
        _children(self.of, "Mean")


@dataclass(frozen=True)
class Chain(Node):
    """One after the other: the output of each is the v of the next. All have the layer's own input x.

    So LoRAs add up, a bottleneck reads what those before it made, and IA3 scales it.
    """

    of: tuple[Node, ...]

    def __post_init__(self) -> None:
        _children(self.of, "Chain")


@dataclass(frozen=True)
class Route(Node):
    """v + Σ gᵢ(x) (fᵢ(v) − v), where a gate of as many outputs, or a router, gives the weights."""

    gate: Gate
    of: tuple[Node, ...]

    def __post_init__(self) -> None:
        _children(self.of, "Route")
        if not isinstance(self.gate, Gate):
            raise ConfigError(f"{self.gate!r} is not a gate", fix="make one with adapters.add_gate()")
        if self.gate.outputs != len(self.of):
            raise ConfigError(
                f"the gate {self.gate.name!r} has {self.gate.outputs} outputs for {len(self.of)} ways",
                fix=f"make one with outputs={len(self.of)}",
            )
        if self.gate.fuses:
            raise ConfigError(f"the fusion {self.gate.name!r} is no gate", fix="give it to a Fuse")
        if self.gate.way is not None:
            raise ConfigError(f"{self.gate.name!r} is one way by itself, and a Route has all", fix="give the gate")

    def alone(self, way: int) -> Sum:
        """The way of that number by itself, weighed by what its router trains: see `Router.alone`."""
        return replace(self.gate, way=way) * self.of[way]


@dataclass(frozen=True)
class Fuse(Node):
    """v + V Σ aᵢ uᵢ, where uᵢ is what each adds, and a the softmax of (Q v + q) · K uᵢ: AdapterFusion.

    Ways that add nothing at a layer are left out there. `adapters.add_fusion` makes it.
    """

    gate: Gate
    of: tuple[Node, ...]

    def __post_init__(self) -> None:
        _children(self.of, "Fuse")
        if not isinstance(self.gate, Gate) or not self.gate.fuses:
            raise ConfigError(f"{self.gate!r} is not a fusion", fix="make one with adapters.add_fusion()")
        if self.gate.outputs != len(self.of):
            what = f"the fusion {self.gate.name!r} is of {self.gate.outputs} ways, and here are {len(self.of)}"
            raise ConfigError(what, fix="give those that it was made for")


@dataclass(frozen=True)
class Rows(Node):
    """Each row of the batch has a composition of its own. It is no part of another one."""

    of: tuple[Node, ...]

    def __post_init__(self) -> None:
        _children(self.of, "batch")


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
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not _finite(weight):
                raise ConfigError(f"the weight {weight!r} of {name!r} is not a finite number")
        return Sum(tuple((weight, Use(name)) for name, weight in which.items())) if which else Base()
    if isinstance(which, (list, tuple)):
        return Rows(tuple(tree(row) for row in which))
    raise ConfigError(f"{which!r} is no composition", fix="give a name, names with weights, None, or a tree of use(…)")


# What is in a tree ------------------------------------------------------------------------------------------


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


# As JSON has it ---------------------------------------------------------------------------------------------


def plain(node: Node) -> dict[str, Any]:
    """As JSON can carry it; `from_plain` gives the tree back.

    >>> plain(0.5 * use("a"))
    {'kind': 'sum', 'terms': [{'weight': 0.5, 'of': {'kind': 'use', 'name': 'a'}}]}
    """
    if isinstance(node, Use):
        return {"kind": "use", "name": node.name}
    if isinstance(node, Base):
        return {"kind": "base"}
    if isinstance(node, Sum):
        terms = [
            {"weight": _plain_gate(weight) if isinstance(weight, Gate) else float(weight), "of": plain(own)}
            for weight, own in node.terms
        ]
        return {"kind": "sum", "terms": terms}
    if isinstance(node, Rows):
        raise ConfigError("rows of a batch are no composition to keep", fix="save the composition of one row")
    of = [plain(own) for own in children(node)]
    if isinstance(node, (Route, Fuse)):
        return {"kind": type(node).__name__.lower(), "gate": _plain_gate(node.gate), "of": of}
    return {"kind": type(node).__name__.lower(), "of": of}


def _plain_gate(gate: Gate) -> dict[str, Any]:
    own: dict[str, Any] = {"name": gate.name, "per": gate.per, "reads": gate.reads, "outputs": gate.outputs}
    if gate.by is not None:
        own["router"] = {"name": gate.by.name, "options": options.plain(gate.by)}
    if gate.fuses:
        own["fuses"] = True
    return own if gate.way is None else {**own, "way": gate.way}


_ENTRIES = {
    "use": {"name"},
    "base": set[str](),
    "sum": {"terms"},
    "mean": {"of"},
    "chain": {"of"},
    "route": {"gate", "of"},
    "fuse": {"gate", "of"},
}


Routers: TypeAlias = Callable[[str], type[Router]]  # by name


def from_plain(value: Any, routers: Routers, depth: int = 1) -> Node:
    """The tree that `plain` wrote; `ConfigError` for anything else."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"the composition is more than {MAX_DEPTH} levels deep")
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _ENTRIES:
        raise ConfigError(f"{_shown(value)} is no part of a composition", fix=f"its kinds are: {', '.join(_ENTRIES)}")
    _exactly(value, {"kind", *_ENTRIES[kind]}, kind)
    if kind == "use":
        return Use(value["name"])
    if kind == "base":
        return Base()
    if kind == "sum":
        terms = []
        for term in _listed(value["terms"], kind):
            if not isinstance(term, dict):
                raise ConfigError(f"{_shown(term)} is no term of a sum", fix='give {"weight": …, "of": …}')
            _exactly(term, {"weight", "of"}, "term")
            weight = term["weight"]
            weight = gate_from_plain(weight, routers) if isinstance(weight, dict) else weight
            terms.append((weight, from_plain(term["of"], routers, depth + 1)))
        return Sum(tuple(terms))
    of = tuple(from_plain(own, routers, depth + 1) for own in _listed(value["of"], kind))
    if kind in ("route", "fuse"):
        gate = gate_from_plain(value["gate"], routers)
        return Route(gate, of) if kind == "route" else Fuse(gate, of)
    return Mean(of) if kind == "mean" else Chain(of)


def gate_from_plain(value: Any, routers: Routers) -> Gate:
    """The gate with these fields, all of which must be there; routers and fusions have more."""
    if not isinstance(value, dict):
        raise ConfigError(f"{_shown(value)} is no gate")
    more = {key: value[key] for key in ("way", "fuses") if key in value}
    own = {key: v for key, v in value.items() if key not in ("router", *more)}
    _exactly(own, {"name", "per", "reads", "outputs"}, "gate")
    if "router" not in value:
        return Gate(**own, **more)
    told = value["router"]
    if not isinstance(told, dict) or not isinstance(told.get("options"), dict):
        raise ConfigError(f"{_shown(told)} is no router")
    _exactly(told, {"name", "options"}, "router")
    if not isinstance(told["name"], str):
        raise ConfigError(f"a router is called {_shown(told['name'])}")
    by = options.build(routers(told["name"]), told["options"], owner=f"router {told['name']!r}")
    return Gate(**own, **more, by=by)


def _exactly(value: dict[str, Any], entries: Collection[str], what: str) -> None:
    for name in value:
        if name not in entries:
            raise ConfigError(f"a {what} has no entry {name!r}", fix=nearest(name, entries))
    for name in entries:
        if name not in value:
            raise ConfigError(f"a {what} lacks its {name!r}")


def _listed(value: Any, kind: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"a {kind} has {_shown(value)} where a list is meant")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


# Inside -----------------------------------------------------------------------------------------------------


def _terms(node: Node) -> tuple[tuple[Weight, Node], ...]:
    return node.terms if isinstance(node, Sum) else ((1.0, node),)


def _node(value: object) -> Node:
    if isinstance(value, Rows):
        raise ConfigError("rows of a batch are no part of a composition", fix="compose within each row")
    if not isinstance(value, Node):
        raise ConfigError(f"{value!r} is no composition", fix="give use(…) or a tree of it")
    return value


def _pairs(terms: Any) -> Sequence[tuple[Any, Any]]:
    if not isinstance(terms, tuple) or not all(isinstance(term, tuple) and len(term) == 2 for term in terms):
        raise ConfigError("a Sum is made of pairs of a weight and a node", fix='write 0.5 * use("a") + use("b")')
    return terms


def _children(of: Any, kind: str) -> None:
    if not isinstance(of, (tuple, list)) or not of:
        raise ConfigError(f"a {kind} of nothing", fix="give at least one, or Base()")
    for node in of:
        _node(node)


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of more than 308 digits
        return False
