"""Where deltas come from: an adapter folder, read one site at a time, or tensors in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .checkpoint import TensorInfo, check_finite, dtype_name, sha256
from .delta import Delta, LowRank, Outline
from .errors import FileError, NotMergeable, nearest
from .format import Contents, Format, Planned, SiteContents
from .hub.reference import on_hub, parse
from .protocol import Params
from .registry import Registry, registry

if TYPE_CHECKING:
    from torch import Tensor

    from .hub.headers import Found
    from .protocol import Method
    from .site import Site


DEFAULT = "peft"  # the format adapters are written in


class Piece(NamedTuple):
    """What a source gives at one site."""

    delta: Delta
    lost: tuple[Delta, ...] = ()  # they sum to `delta` minus the exact value: what was cut off so far
    bias: Tensor | None = None  # (out,)
    measured: Callable[[LowRank], tuple[float, float]] | None = None
    """For what is stored instead, ‖stored - exact‖² and ‖exact‖² without the bias.

    Given where the exact value is no delta in memory but is read again, in pieces; `lost` is then empty.
    """


class Extent(NamedTuple):
    """What is known of a `Piece` before any tensor is read."""

    rank: int
    scales: frozenset[float]  # |factor| that each of its low-rank parts is multiplied by
    bias: bool


class Factors(NamedTuple):
    """ΔW = scale · B A by where B (out, r, …) and A (r, …) lie; axes behind the second are 1 or flattened into it."""

    B: TensorInfo
    A: TensorInfo
    scale: float


class Source(Protocol):
    """A term of a sum of adapters."""

    @property
    def contents(self) -> Mapping[str, Contents]:
        """The adapters it is made of, by a name to call them in messages."""

    @property
    def sites(self) -> Mapping[str, SiteContents]:
        """What layers it adapts; the tensors are described as far as they are known."""

    @property
    def written_out(self) -> frozenset[str]:
        """The rules whose results are of full rank and not truncated since: as they are, they are not saved."""

    def extent(self, site: str) -> Extent: ...

    def prepare(self) -> None:
        """Compute what all sites need, before they are asked for one by one, maybe by several threads."""

    def piece(self, site: str) -> Piece: ...

    def recipe(self) -> dict[str, Any]:
        """How to make it again."""


class Single(ABC):
    """One adapter: a method, and its tensors at each site."""

    name: str
    own: Contents

    @property
    def contents(self) -> Mapping[str, Contents]:
        return {self.name: self.own}

    @property
    def sites(self) -> Mapping[str, SiteContents]:
        return self.own.sites

    @property
    def written_out(self) -> frozenset[str]:
        return frozenset()

    def prepare(self) -> None:  # noqa: B027 - sites are read one by one: there is nothing to prepare
        """Nothing."""

    @abstractmethod
    def saved(self, site: str) -> Params:
        """The tensors at one site as they are saved; `FileError` if one is not finite."""

    @abstractmethod
    def saved_shared(self) -> Mapping[str, Tensor]:
        """Those that all sites have in common and that are saved."""

    def factors(self, site: str) -> Factors | None:
        """Where the tensors of a site's `piece` lie, if it is two in a file and no bias; else None."""
        return None

    def params(self, site: str, place: Site | None = None) -> Params:
        """The tensors at one site, as the rules take them; `place` is the live site, if there is one."""
        tensors = self.own.method.at(site).unpack(self.saved(site), place or self.site(site))
        return Params({**self.shared, **tensors}) if self.shared else Params(tensors)

    @cached_property
    def shared(self) -> Mapping[str, Tensor]:
        """The tensors that all sites have in common: saved, or made again."""
        return self.shared_at({})

    def shared_at(self, places: Mapping[str, Site]) -> Mapping[str, Tensor]:
        """As `shared`, for live sites: files may not tell the shapes that the tensors depend on."""
        if not self.own.method.defines("shared"):
            return {}
        return self.saved_shared() or self.own.method.shared([places.get(n) or self._known(n) for n in self.sites])

    def site(self, name: str) -> Site:
        return make_site(name, self.own.sites[name])

    def _known(self, name: str) -> Site:
        self._check_known(name)
        return self.site(name)

    def _check_known(self, name: str) -> None:
        """By the header: a plan makes no site, whose kind would import torch."""
        if -1 in self.own.sites[name].weight_shape:
            raise NotMergeable(
                f"the file does not tell the shape of the layer, which {self.own.method.name!r} needs",
                where=name,
                fix="load it on the model, with adapters.load(), and save it again: then it does",
            )

    def extent(self, site: str) -> Extent:
        if self.own.method.reads_weight:
            raise NotMergeable(
                f"{self.name}: what a {self.own.method.name!r} adapter adds depends on the base weights",
                fix="merge it into the model instead, with adapters.load() and adapters.merge()",
            )
        if not self.own.method.defines("delta"):
            raise NotMergeable(
                f"{self.name}: a {self.own.method.name!r} adapter is no change of weights, so it has no sums",
                fix="activate one at a time on a live model"
                if self.own.method.wraps_call
                else "weigh adapters on a live model, with adapters.load() and adapters.activate()",
            )
        self._check_known(site)
        outline = self.own.method.at(site).outline(self.own.sites[site].shapes)
        shape = self.own.sites[site].shape
        rank = min(shape) if outline.rank is None else min(outline.rank, *shape)
        return Extent(rank, frozenset({abs(outline.scale)}), outline.bias)

    def piece(self, site: str) -> Piece:
        here, place, p = self.own.method.at(site), self._known(site), self.params(site)
        delta = here.delta(p, place)
        if _only_placed(delta, p) and not here.outline(self.own.sites[site].shapes).bias:
            return Piece(delta)
        # Something is computed: in float64, so that no rounding goes uncounted.
        p = Params({name: t.double() if t.is_floating_point() else t for name, t in p.items()})
        return Piece(here.delta(p, place), (), here.delta_bias(p, place))


def factors_told(method: Method, outline: Outline) -> tuple[str, str] | None:
    """The saved tensors B and A that an outline names, if it was written for the method's own delta."""
    own = type(method)
    speaks_of = next(cls for cls in own.__mro__ if "outline" in vars(cls))
    # A subclass with another delta may not have thought of the outline that it inherits.
    other = any(getattr(own, rule) is not getattr(speaks_of, rule) for rule in ("delta", "unpack"))
    return None if other or method.reads_weight else outline.factors


def _only_placed(delta: Delta, p: Params) -> bool:
    """Whether the delta's tensors are those of the adapter, or views of them."""
    own = {t.untyped_storage().data_ptr() for t in p.values()}
    return all(t.untyped_storage().data_ptr() in own for t in delta if hasattr(t, "untyped_storage"))


def _planned(tensors: Mapping[str, Tensor]) -> dict[str, Planned]:
    return {key: Planned(dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}


class Stored(Single):
    """An adapter folder. Its header is in memory; tensors are read when asked for and not kept."""

    def __init__(self, folder: Path, name: str, contents: Contents, files: Iterable[Path]) -> None:
        self.folder, self.name, self.own, self.files = folder, name, contents, tuple(files)

    def saved(self, site: str) -> Params:
        return Params({name: read(info) for name, info in self.own.sites[site].tensors.items()})

    def saved_shared(self) -> Mapping[str, Tensor]:
        return {name: read(info) for name, info in self.own.shared.items()}

    def factors(self, site: str) -> Factors | None:
        part = self.own.sites[site]
        outline = self.own.method.at(site).outline(part.shapes)
        names = factors_told(self.own.method, outline)
        if names is None or outline.bias:
            return None
        B, A = (part.tensors[name] for name in names)
        whole = isinstance(B, TensorInfo) and isinstance(A, TensorInfo)  # not some columns of one
        return Factors(B, A, outline.scale) if whole else None

    def recipe(self) -> dict[str, Any]:
        # Somebody's local path tells a reader nothing, and strangers where it lay.
        name = self.folder.resolve().name if Path(self.name).is_absolute() else self.name
        return {"adapter": name, "sha256": {file.name: sha256(file) for file in self.files}}


class Held(Single):
    """An adapter in memory: a method and its tensors at live sites."""

    name = "the adapter in memory"

    def __init__(
        self,
        method: Method,
        sites: Mapping[str, Site],
        params: Mapping[str, Params],
        *,
        shared: Mapping[str, Tensor] | None = None,
        base: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """`params` are each site's own tensors, `shared` those that they have in common."""
        self._method = method
        self._sites, self._shared = sites, {name: t.detach() for name, t in (shared or {}).items()}
        self._params = {n: Params({key: t.detach() for key, t in p.items()}) for n, p in params.items()}
        self.own = Contents(
            method.as_saved(),
            {
                name: SiteContents(site.kind, site.weight_shape, site.shape, _planned(self.saved(name)))
                for name, site in sites.items()
            },
            base=base,
            shared={name: t for name, t in _planned(self._shared).items() if name in method.peft_shared()},
            transposed=any(site.kind == "transposed_linear" for site in sites.values()),
            facts=facts or {},
        )

    def saved(self, site: str) -> Params:
        return Params(self._method.at(site).pack(self._params[site]))

    def saved_shared(self) -> Mapping[str, Tensor]:
        return {name: self._shared[name] for name in self.own.shared}

    def params(self, site: str, place: Site | None = None) -> Params:
        if self.own.method is not self._method:  # what is kept is for training; the rules are those of what is saved
            return super().params(site, place)
        return Params({**self._shared, **self._params[site]})

    def site(self, name: str) -> Site:
        return self._sites[name]

    def recipe(self) -> dict[str, Any]:
        return {"adapter": None}


class OnHub(Stored):
    """An adapter of which only the headers are here; a tensor is read from the cache, fetched if it is not there."""

    def __init__(self, found: Found, name: str, contents: Contents, files: Iterable[Path]) -> None:
        super().__init__(found.folder, name, contents, files)
        self.found = found

    @property
    def pinned(self) -> bool:
        """Whether it was asked for by its commit."""
        reference = parse(self.name)
        return reference is not None and reference.pinned

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "hub": str(self.found.reference)}


def stored(ref: str | Path, name: str | None = None) -> Stored:
    """The adapter in the folder `ref`, or by the reference `ref` on the Hub: headers only, strictly validated.

    It is called `name`. Raises `FileError`, `HubError` among them.
    """
    reference = on_hub(ref)
    if reference is None:
        return _in(Path(ref), ref, name)
    from .hub.headers import find

    found = find(reference)
    try:
        own = _in(found.folder, ref, name)
    except FileError as error:  # about a folder that is gone afterwards
        where = error.where.replace(str(found.folder), str(found.reference))
        raise FileError(error.what, where=where, fix=error.fix) from error
    return OnHub(found, own.name, own.own, own.files)


def _in(folder: Path, ref: str | Path, name: str | None) -> Stored:
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = f"; {nearest(folder.name, near)}" if near and not folder.exists() else ""
        what = "is a file, not an adapter folder" if folder.exists() else "there is no such adapter folder"
        raise FileError(what, where=ref, fix="give a folder with adapter_config.json" + hint)
    found = registry()
    own = _recognise(folder, found)
    contents = own.read(folder, lambda name: found.methods() if name is None else found.method(name))
    return Stored(folder, name or str(ref), contents, own.files(folder))


def _recognise(folder: Path, found: Registry) -> Format:
    usual = found.format(DEFAULT)
    if usual.recognises(folder) and all(file.is_file() for file in usual.files(folder)):
        return usual  # nearly always: no other plugin is imported then
    formats = found.formats()
    for own in (*(other for other in formats.values() if other.name != DEFAULT), usual):
        if own.recognises(folder):
            return own
    raise FileError("is not an adapter folder", where=folder, fix=f"formats that are read: {', '.join(formats)}")


def read(info: TensorInfo) -> Tensor:
    """One tensor from its file; `FileError` that names it if it has a NaN or an infinity."""
    tensor = info.read()
    check_finite(tensor, info)
    return tensor


def make_site(name: str, part: SiteContents) -> Site:
    """The site from header shapes alone."""
    return registry().site_kind(part.kind)(name, part.weight_shape)
