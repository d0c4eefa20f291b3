"""Adapters between a model and files: what is read goes to the model's layers, what is saved comes from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from .. import algebra, sketch
from ..adapter import Adapter
from ..delta import LowRank
from ..errors import FileError, UnknownName, nearest
from ..protocol import Params
from ..registry import registry
from ..seed import generator
from ..sharding import whole
from ..site.linear import LinearSite
from ..source import Held
from .targets import kind_of, kinds_for, site_of
from .training import parts_of
from .tree import SLOT, Common, Part, Slot, base_modules, common_of, state_of, trained

if TYPE_CHECKING:
    from ..format import Contents
    from ..protocol import Method
    from ..site import Site
    from ..source import Single


def read(model: nn.Module, value: Adapter, ref: object, *, any_base: bool) -> tuple[Method, list[Part], Common | None]:
    """The parts of `value` for the layers of `model`; nothing is attached yet. `ref` is what messages call it."""
    for own in value.source.contents.values():
        if own.kept:
            raise FileError(
                f"has whole values of the base beside the adapter, {next(iter(own.kept))!r} among them, "
                "which a live model cannot take",
                where=ref,
                fix="save it without modules_to_save, biases and token rows, or load it with PEFT",
            )
    single = value.single
    contents, tensors_of = _summed(value) if single is None else (single.own, _own(single))
    sites = _sites(model, contents, ref)
    if not any_base:
        for own in value.source.contents.values():
            check_base(sketch.told(own.facts), sites, ref)
    method = contents.method
    common = None if single is None else common_of(single.shared_at(sites), list(sites.values()))
    names: dict[str, list[str]] = {}
    parts = []
    for name, site in sites.items():
        here = method.at(site.name)
        if site.kind not in names:  # which are trained does not depend on which layer of a kind it is
            names[site.kind] = trained(here.init(site, generator(0, site.name)))
        tensors = tensors_of(here, site, name)
        parts.append(Part(here, site, tensors, names[site.kind], common))
    return method, parts, common


def held(model: nn.Module, name: str) -> Held:
    """Adapter `name` of `model` as it is now, with a sketch of the base; sharded tensors are gathered."""
    parts = {part.site.name: part for part in parts_of(model, name)}
    common = next(iter(parts.values())).common
    return Held(
        state_of(model).methods[name],
        {site: part.site for site, part in parts.items()},
        {site: Params({key: whole(t) for key, t in part.own().items()}) for site, part in parts.items()},
        shared={} if common is None else {key: whole(t) for key, t in common.tensors().items()},
        base=_base_name(model),
        facts={"base": sketch.of({site: original(parts[site].site) for site in sketch.sampled(list(parts))})},
    )


def original(site: Site) -> Tensor:
    """The values that the adapters were made for, a matrix, also while some are merged into it."""
    slot = cast("Slot", cast("nn.Module", site.module)._modules[SLOT])
    weight = slot.originals.get("weight")
    return site.sample if weight is None else site.unfold(weight)


def check_base(told: sketch.Sketch, sites: Mapping[str, Site], ref: object) -> None:
    """Raise `FileError` if these sites are not of the base that was told of."""
    other = sketch.differing(told, sketch.of({name: sites[name].sample for name in told if name in sites}))
    if other is not None:
        raise FileError(
            f"was trained on other weights at {other!r} than this model has: on another base model",
            where=ref,
            fix="load it on that one, or pass any_base=True",
        )


def _sites(model: nn.Module, contents: Contents, ref: object) -> dict[str, Site]:
    """The live sites of an adapter that comes from elsewhere, by its own names and in its order."""
    modules = dict(base_modules(model))
    places = _counted(model, contents, ref) if contents.numbered else {name: name for name in contents.sites}
    if missing := [name for name in places.values() if name not in modules]:
        kinds = kinds_for(contents.method)
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UnknownName(
            f"adapts a module {missing[0]!r}{more}, which the model does not have",
            where=ref,
            fix=nearest(missing[0], [n for n, module in modules.items() if kind_of(module, kinds)]),
        )
    sites = {}
    for own, part in contents.sites.items():
        name = places[own]
        here, there = site_of(model, name, contents.method), registry().site_kind(part.kind)
        # Files do not tell apart the kinds of linear layers, and their matrix forms are alike.
        if there.kind == here.kind:
            fits = _fits(part.weight_shape, here.weight_shape)
        else:
            fits = issubclass(there, LinearSite) and isinstance(here, LinearSite) and _fits(part.shape, here.shape)
        if not fits:
            raise FileError(
                f"adapts a {there.kind} of shape {list(part.weight_shape)} at {name!r}, which is a {here.kind} "
                f"of shape {list(here.weight_shape)} in this model",
                where=ref,
                fix="load it on the model that it was made for",
            )
        sites[own] = here
    return sites


def _counted(model: nn.Module, contents: Contents, ref: object) -> dict[str, str]:
    """The model's modules for the sites of a file that names none: as many there must be, in the model's order."""
    kinds = kinds_for(contents.method)
    names = [name for name, module in base_modules(model) if kind_of(module, kinds)]
    if len(names) != len(contents.sites):
        raise FileError(
            f"is for {len(contents.sites)} modules that {contents.method.name!r} adapts, and the model has "
            f"{len(names)}",
            where=ref,
            fix="load it on the model that it was made for",
        )
    return dict(zip(contents.sites, names, strict=True))


def _fits(told: Sequence[int], there: Sequence[int]) -> bool:
    """Whether a layer has the shape that a file tells, as far as it does."""
    return len(told) == len(there) and all(a in (b, -1) for a, b in zip(told, there, strict=True))


TensorsOf = Callable[["Method", "Site", str], Mapping[str, Tensor]]


def _own(single: Single) -> TensorsOf:
    """One adapter's tensors at a site, by the method as it holds there and the name that the adapter has for it."""
    return lambda method, site, name: method.unpack(single.saved(name), site)


def _summed(value: Adapter) -> tuple[Contents, TensorsOf]:
    """What a sum would be saved as, and its tensors at a site."""
    planned = value.plan()

    def tensors(method: Method, site: Site, name: str) -> Mapping[str, Tensor]:
        piece, scale = value.source.piece(name), planned.scale
        low = algebra.low_rank(piece.delta)
        factors = method.factors(LowRank(low.B.double() * (low.scale / scale), low.A, scale), piece.bias)
        return {key: factors[key].reshape(t.shape) for key, t in planned.contents.sites[name].tensors.items()}

    return planned.contents, tensors


def _base_name(model: nn.Module) -> str | None:
    """What transformers calls the base model, if it is one of theirs."""
    for holder, attribute in ((getattr(model, "config", None), "_name_or_path"), (model, "name_or_path")):
        name = getattr(holder, attribute, None)
        if isinstance(name, str) and name:
            return name
    return None
