"""A composition at one site, with the parts in the place of the names: what is run and folded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from .. import compose
from ..errors import ConfigError
from .gating import Fusion, GatePart, OneWay

if TYPE_CHECKING:
    from torch import Tensor

    from .batches import Batch
    from .tree import Part


class Call(NamedTuple):
    """A call of the layer: its input, the base's output, and all arguments."""

    x: Tensor
    y: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Leaf(NamedTuple):
    """One adapter."""

    part: Part
    calls: bool  # whether it may change the input, and then has a call of the layer of its own

    def run(self, call: Call, v: Tensor) -> Tensor:
        if not self.calls:
            return self.part.adapted(call.x, v)
        args, kwargs = self.part.before(call.args, call.kwargs)
        if args is call.args and kwargs is call.kwargs:
            return self.part.adapted(call.x, v)
        site = self.part.site
        theirs = site.hidden(site.call(args, kwargs))
        x = args[0] if args else next(iter(kwargs.values()))
        return self.part.adapted(x, theirs if v is call.y else v + (theirs - call.y))


class Added(NamedTuple):
    """v + Σ wᵢ (fᵢ(v) − v)."""

    terms: tuple[tuple[float | GatePart | OneWay, Program], ...]

    def run(self, call: Call, v: Tensor) -> Tensor:
        total = v
        for weight, own in self.terms:
            change = own.run(call, v) - v
            total = total + (weight if isinstance(weight, float) else weight.weights(call.x, v)) * change
        return total


class Chained(NamedTuple):
    """fₙ(… f₁(v))."""

    links: tuple[Program, ...]

    def run(self, call: Call, v: Tensor) -> Tensor:
        for own in self.links:
            v = own.run(call, v)
        return v


class Routed(NamedTuple):
    """v + Σ gᵢ(x) (fᵢ(v) − v); ways that lead through nothing are left out."""

    gate: GatePart
    ways: tuple[tuple[int, Program], ...]

    def run(self, call: Call, v: Tensor) -> Tensor:
        g, total = self.gate.weights(call.x, v), v  # (…, outputs)
        for i, own in self.ways:
            total = total + g[..., i : i + 1] * (own.run(call, v) - v)
        return total


class Fused(NamedTuple):
    """v + V Σ aᵢ uᵢ, uᵢ what the way i adds to v; ways that lead through nothing are left out."""

    gate: Fusion
    ways: tuple[Program, ...]
    joins: Part | None  # whose method says what comes behind, if one does: the last

    def run(self, call: Call, v: Tensor) -> Tensor:
        adds = [
            own.part.added(call.x, v) if isinstance(own, Leaf) and not own.calls else own.run(call, v) - v
            for own in self.ways
        ]
        u = self.gate.fused(v, adds)
        return v + u if self.joins is None else self.joins.joined(u, call.x, v)


Program: TypeAlias = "Leaf | Added | Chained | Routed | Fused | Batch"


def program(node: compose.Node, parts: Mapping[str, Part], gates: Mapping[str, GatePart]) -> Program:
    """What a tree that is `reduced` to the adapters at a site, and is not the base, does there."""
    if isinstance(node, compose.Use):
        part = parts[node.name]
        return Leaf(part, part.method.defines("before"))
    if isinstance(node, compose.Sum):
        terms = ((_weight(weight, gates), program(own, parts, gates)) for weight, own in node.terms)
        return Added(tuple(terms))
    if isinstance(node, compose.Route):
        ways = ((i, own) for i, own in enumerate(node.of) if not isinstance(own, compose.Base))
        return Routed(gates[node.gate.name], tuple((i, program(own, parts, gates)) for i, own in ways))
    if isinstance(node, compose.Fuse):
        fused = tuple(program(own, parts, gates) for own in node.of if not isinstance(own, compose.Base))
        leaves = (own.part for own in reversed(fused) if isinstance(own, Leaf) and not own.calls)
        joins = next((part for part in leaves if part.method.defines("joined")), None)
        return Fused(cast("Fusion", gates[node.gate.name]), fused, joins)
    return Chained(tuple(program(own, parts, gates) for own in compose.children(node)))


def _weight(weight: compose.Weight, gates: Mapping[str, GatePart]) -> float | GatePart | OneWay:
    if not isinstance(weight, compose.Gate):
        return float(weight)
    gate = gates[weight.name]
    return gate if weight.way is None else OneWay(gate, weight.way)


# What cannot be computed ------------------------------------------------------------------------------------


def wrapping(node: compose.Node, parts: Mapping[str, Part]) -> list[str]:
    """The adapters in a reduced tree that wrap the call of the layer."""
    return [name for name in compose.names(node) if parts[name].method.wraps_call]


def refuse(node: compose.Node, parts: Mapping[str, Part], gates: Mapping[str, GatePart]) -> None:
    """Raise `ConfigError` for a tree, reduced to the adapters at a site, that cannot be computed there."""
    if isinstance(node, compose.Base):
        return
    where = next(iter(parts.values())).site.name
    for gate in compose.gates(node):
        if gate.name not in gates:
            what = f"the gate {gate.name!r} was not made for this layer, where it weighs {compose.names(node)[0]!r}"
            raise ConfigError(what, where=where, fix="make it for all adapters that it weighs: add_gate(…, of=[…])")
    if wraps := wrapping(node, parts):
        if isinstance(node, compose.Rows):
            if len(set(node.of)) > 1:
                what = f"{wraps[0]!r} wraps the call of the layer, so it cannot be on in some rows of a batch alone"
                raise ConfigError(what, where=where, fix="use it in all rows or in none")
            node = node.of[0]
        _refuse_beside(node, wraps[0], parts[wraps[0]], where)
    _refuse_links(node, parts, where, first=True)


def _refuse_beside(node: compose.Node, name: str, part: Part, where: str) -> None:
    """For an adapter that wraps the call of its layer and is not alone there, or is weighed in a way it has not."""
    if isinstance(node, compose.Use):
        return
    who = f"{name!r} wraps the call of the layer (method {part.method.name!r}), so it cannot "
    other = next((other for other in compose.names(node) if other != name), None)
    if other is not None:
        raise ConfigError(who + f"be on beside {other!r}", where=where, fix="activate it alone, with weight 1")
    weight = node.terms[0][0] if isinstance(node, compose.Sum) and len(node.terms) == 1 else None
    if isinstance(weight, compose.Gate) and isinstance(compose.children(node)[0], compose.Use):
        if (weight.per, weight.reads) != ("sample", "input"):
            raise ConfigError(who + "be weighed by token, or by its output", where=where, fix="make another gate")
        if not part.method.defines("weighed") or weight.by is not None:
            raise ConfigError(who + "be weighed by a gate", where=where, fix="activate it with weight 1")
        return
    how = f"have the weight {weight:g}" if isinstance(weight, (int, float)) else "be part of more than a term"
    raise ConfigError(who + how, where=where, fix="activate it alone, with weight 1")


def _refuse_links(node: compose.Node, parts: Mapping[str, Part], where: str, *, first: bool) -> None:
    """For an adapter that is behind another in a chain, and does not look at what that made."""
    if isinstance(node, compose.Use):
        method = parts[node.name].method
        if not first and not method.takes_any_output:
            raise ConfigError(
                f"{node.name!r} computes the layer anew (method {method.name!r}), so in a chain nothing of those "
                "before it would be left",
                where=where,
                fix="let it come first, or add them up",
            )
    for i, own in enumerate(compose.children(node)):
        _refuse_links(own, parts, where, first=first and not (isinstance(node, compose.Chain) and i))
