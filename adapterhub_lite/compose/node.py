"""What a tree is made of; each part refuses what cannot be one when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from .. import options
from ..errors import ConfigError
from ..routing import Router


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
            elif isinstance(weight, bool) or not isinstance(weight, (int, float)) or not finite(weight):
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


# Inside ------------------------------------------------------------------------------------------------------


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


def finite(number: float) -> bool:
    """Whether a number of any size is one."""
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of more than 308 digits
        return False
