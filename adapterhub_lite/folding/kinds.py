"""What kind of layer each is: by what its adapters say and the shape that the base has."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import NotMergeable
from ..format import SiteContents
from ..registry import registry
from ..site import Site
from ..site.linear import LinearSite
from ..source import Single, Source
from .places import Layer, gives_delta, other_shape

if TYPE_CHECKING:
    from .planning import Plan


def site_for(layer: Layer, terms: Sequence[Source]) -> Site:
    """The layer's site, from the shape of the base's weight. `NotMergeable` if an adapter is for another shape."""
    kinds = [_kind(layer, terms[part.term], part.site) for part in layer.parts]
    for part, kind in zip(layer.parts, kinds, strict=True):
        if kind is not kinds[0]:
            raise NotMergeable(
                f"{next(iter(terms[part.term].contents))} takes {layer.name!r} for a {kind.kind}, and the adapters "
                f"before it for a {kinds[0].kind}",
                fix="merge adapters of one base model",
            )
    return kinds[0](layer.name, layer.weight.shape)


def settled_all(plan: Plan, sites: Mapping[str, Site]) -> list[Source]:
    """The plan's terms, ready to be computed with, at its `sites` by layer."""
    places: list[dict[str, Site]] = [{} for _ in plan.terms]
    for name, layer in plan.layers.items():
        for part in layer.parts:
            places[part.term][part.site] = sites[name]
    for source in plan.sources:
        source.prepare()
    return [settled(source, own) for source, own in zip(plan.sources, places, strict=True)]


def settled(source: Source, places: Mapping[str, Site]) -> Source:
    """The same, with kinds and shapes of its layers as the base has them; `places` by the names it has for them."""
    if not isinstance(source, Single):
        return source
    twin = copy.copy(source)
    twin.__dict__.pop("shared", None)  # which depends on the shapes
    sites = dict(source.own.sites)
    for name, site in places.items():
        sites[name] = replace(sites[name], kind=site.kind, weight_shape=site.weight_shape, shape=site.shape)
    twin.own = replace(source.own, sites=sites)
    return twin


def _kind(layer: Layer, source: Source, name: str) -> type[Site]:
    part, label = source.sites[name], next(iter(source.contents))
    told = registry().site_kind(part.kind)
    fitting = [kind for kind in _alike(told) if _fits(part, kind(layer.name, layer.weight.shape))]
    if not fitting:
        raise other_shape(layer, part, name, label)
    if len(fitting) > 1:  # as many inputs as outputs: the base's other layers tell which way it lies, or else the flag
        transposed = layer.by_inputs
        if transposed is None:  # PEFT's flag is that of the last layer that it adapted
            transposed = any(own.transposed for own in source.contents.values())
        fitting = [kind for kind in fitting if kind.by_inputs == transposed]
    kind = fitting[0]
    if isinstance(source, Single) and not gives_delta(source) and kind.kind not in source.own.method.site_kinds:
        raise NotMergeable(f"{label}: a {source.own.method.name!r} adapter is for no {kind.kind}", where=layer.name)
    return kind


def _alike(told: type[Site]) -> list[type[Site]]:
    """Kinds that files do not tell apart: linear layers lie either way. None that stores anything but the numbers."""
    if not issubclass(told, LinearSite):
        return [told]
    plain = Site.stored.__func__  # type: ignore[attr-defined]
    kinds = registry().site_kinds().values()
    return [kind for kind in kinds if issubclass(kind, LinearSite) and kind.stored.__func__ is plain]  # type: ignore[attr-defined]


def _fits(part: SiteContents, site: Site) -> bool:
    if len(part.weight_shape) != len(site.weight_shape):
        return False
    return all(
        a in (b, -1) for a, b in zip((*part.shape, *part.weight_shape[2:]), (*site.shape, *site.kernel), strict=True)
    )
