"""A tree as JSON has it, and back, strictly."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

from .. import options
from ..errors import ConfigError, nearest
from ..routing import Router
from .node import Base, Chain, Fuse, Gate, Mean, Node, Route, Rows, Sum, Use
from .reading import MAX_DEPTH, children


def plain(node: Node) -> dict[str, Any]:
    """As JSON can carry it; `from_plain` gives the tree back.

    >>> from adapterhub_lite import use
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
