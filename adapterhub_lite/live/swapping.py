"""Other tensors in the place of an adapter's, in the same memory, so that what was compiled for it still holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..delta import LowRank
from ..errors import ConfigError
from ..plan import carrier
from .tree import Common, Part

if TYPE_CHECKING:
    from ..protocol import Method
    from ..site import Site


def reserved(parts: Sequence[Part], rank: int) -> tuple[Method, list[Part]]:
    """The same weight changes with room for any of that rank: a method for all sites, and its parts.

    The scale is 1, and the parts' own are in B.
    """
    deltas = [_delta(part) for part in parts]
    bias = any(part.method.delta_bias(part.params(), part.site) is not None for part in parts)
    method = carrier().carry({part.site.name: rank for part in parts}, scale=1.0, bias=bias)
    made = []
    for part, delta in zip(parts, deltas, strict=True):
        here = method.at(part.site.name)
        shapes = here.tensor_shapes(part.site.kind, part.site.shape, part.site.kernel)
        made.append(Part(here, part.site, _tensors(here, part, delta, 1.0, rank, shapes), tuple(shapes)))
    return method, made


def swap(name: str, live: Sequence[Part], new: Sequence[Part]) -> None:
    """Copy the weight changes of `new` into the tensors of `live`; nothing is changed if one does not fit."""
    by_site = {part.site.name: part for part in new}
    if extra := by_site.keys() - {part.site.name for part in live}:
        what = f"the new adapter changes a layer {min(extra)!r}, and {name!r} has nothing there"
        raise ConfigError(what, fix="load it as another adapter")
    copies: list[tuple[Tensor, Tensor]] = []
    for part in live:
        copies += _copies(name, part, by_site.get(part.site.name))
    if common := next((part.common for part in live), None):
        copies += _shared(name, common, next(iter(new)).common)
    with torch.no_grad():
        for old, tensor in copies:
            old.copy_(tensor)


def _copies(name: str, live: Part, new: Part | None) -> list[tuple[Tensor, Tensor]]:
    """The tensors of one site, and what they become."""
    where, own = live.site.name, dict(live.named_parameters())
    if _low_rank(live.method):
        with torch.no_grad():
            old = cast("LowRank", live.method.delta(live.params(), live.site))
            delta = LowRank(old.B[:, :0], old.A[:0], 1.0) if new is None else _delta(new)
            shapes = {key: tuple(t.shape) for key, t in own.items()}
            tensors = _tensors(live.method, new, delta, old.scale, old.rank, shapes, where)
        return [(own[key], t) for key, t in tensors.items()]
    if new is None:
        what = f"the new adapter has nothing here, and method {live.method.name!r} cannot add nothing"
        raise ConfigError(what, where=where, fix=f"load it as another adapter than {name!r}")
    theirs = dict(new.named_parameters())
    if live.method != new.method or {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in theirs.items()}:
        raise ConfigError(
            f"{name!r} is {live.method!r}, and only one with the same options and shapes can take its place, not "
            f"{new.method!r}",
            where=where,
            fix="load it as another adapter",
        )
    return [(own[key], theirs[key]) for key in own]


def _shared(name: str, common: Common, new: Common | None) -> list[tuple[Tensor, Tensor]]:
    own, theirs = common.tensors(), {} if new is None else new.tensors()
    if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in theirs.items()}:
        raise ConfigError(f"the tensors that all layers of {name!r} share have other shapes", fix="load it by its own")
    return [(own[key], theirs[key]) for key in own]


def _low_rank(method: Method) -> bool:
    return method.carries_low_rank and not method.reads_weight


def _delta(part: Part) -> LowRank:
    method = part.method
    if method.defines("delta") and not method.reads_weight and not method.defines("before"):
        with torch.no_grad():
            delta = method.delta(part.params(), part.site)
        if isinstance(delta, LowRank) and delta.B.ndim == 2:
            return delta
    raise ConfigError(
        f"method {method.name!r} has no low-rank ΔW of its own, which is what can be put into others' tensors",
        where=part.site.name,
        fix="load it as another adapter",
    )


def _tensors(
    method: Method,
    part: Part | None,
    delta: LowRank,
    scale: float,
    rank: int,
    shapes: Mapping[str, tuple[int, ...]],
    where: str = "",
) -> dict[str, Tensor]:
    """The tensors by which `method`, with that scale and rank, has this change, and the bias that `part` has."""
    site: Site | None = None if part is None else part.site
    where = where if site is None else site.name
    if delta.rank > rank:
        raise ConfigError(
            f"rank {delta.rank} does not fit into {rank}", where=where, fix=f"begin with reserve={delta.rank}"
        )
    if scale == 0:
        raise ConfigError("with alpha 0 nothing can be put in its place", where=where, fix="load it as another adapter")
    bias = None if part is None or site is None else part.method.delta_bias(part.params(), site)
    room = rank - delta.rank
    A = F.pad(delta.A.detach(), (0, 0, 0, room))  # (rank, in)
    B = F.pad(delta.B.detach().double() * (delta.scale / scale), (0, room))  # (out, rank)
    found = method.factors(LowRank(B, A, scale), None if bias is None else bias.detach())
    if found.keys() != shapes.keys() or (bias is not None and "bias" not in found):
        what = f"method {method.name!r} has the tensors {', '.join(shapes)}, which factors and a bias alone do not give"
        raise ConfigError(what, where=where, fix="load it as another adapter")
    return {key: t.reshape(shapes[key]) for key, t in found.items()}
