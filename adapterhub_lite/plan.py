"""What a sum of adapters will be when it is written: sites, ranks, dtype and bytes, from headers, without torch.

Ranks that are chosen by an error or a budget need the numbers; then torch is imported after all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from .agreement import common
from .checkpoint import ITEMSIZE, TensorInfo
from .combine import Truncated, WeightedSum
from .errors import ConfigError, NotMergeable
from .format import Contents, Planned, Shaped, SiteContents, is_floating
from .protocol import Method
from .registry import registry
from .source import DEFAULT, Held, Source, Stored


@dataclass(frozen=True)
class Plan:
    """An adapter to be written."""

    contents: Contents
    ranks: Mapping[str, int]
    scale: float
    """The scaling at every site."""
    dtype: str
    """Of the adapter's tensors, as safetensors spells it."""
    source: WeightedSum
    """What is to be computed."""
    verbatim: Stored | Held | None
    """The one adapter whose own tensors are written as they are."""
    recast: Stored | Held | None = None
    """The one adapter whose own tensors are written in `dtype`, for they alone do not give its delta."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensors."""
        return _nbytes([*_numbers(self.contents), *self.contents.kept.values()])


def plan(source: WeightedSum, *, dtype: str | None = None, any_base: bool = False, keep: str | None = None) -> Plan:
    """How `source` would be written. Raises `NotMergeable` where its parts contradict each other."""
    if rules := source.written_out:
        raise NotMergeable(
            f"what rule {' and '.join(map(repr, sorted(rules)))} gives has full rank: no adapter can hold it whole",
            fix="truncate it: --rank N, --max-error E or --budget SIZE (in Python: truncate)",
        )
    shared = common(source.contents, any_base=any_base, keep=keep)
    source = _storing(source, ITEMSIZE[dtype or widest(source)], _nbytes(shared.kept.values()))
    whole = _one_adapter(source)
    as_it_is = whole is not None and (dtype is None or {t.dtype for t in _numbers(whole.own)} == {dtype})
    if whole is not None and (as_it_is or not _has_delta(whole.own.method)):
        outlines = {name: whole.own.method.at(name).outline(part.shapes) for name, part in whole.own.sites.items()}
        ranks = {name: outline.rank for name, outline in outlines.items() if outline.rank is not None}
        own = replace(shared, sites=whole.own.sites, shared=whole.own.shared, method=whole.own.method)
        if as_it_is or dtype is None:
            return Plan(own, ranks, 1.0, dtype or widest(source), source, whole)
        return Plan(_cast(own, dtype), ranks, 1.0, dtype, source, None, whole)
    dtype = dtype or widest(source)
    extents = {name: source.extent(name) for name in source.sites}
    ranks = {name: extent.rank for name, extent in extents.items() if extent.rank > 0}
    if not ranks:
        raise NotMergeable("nothing is left: every site has rank 0", fix="there is nothing to save")
    scale = common_scale([s for extent in extents.values() for s in extent.scales], ranks.values())
    bias = any(extent.bias for extent in extents.values())
    method = carrier().carry(ranks, scale=scale, bias=bias)
    sites = {}
    for name in ranks:
        part = source.sites[name]
        if part.kind not in method.site_kinds:
            raise NotMergeable(
                f"a sum is saved as a {method.name!r} adapter, which a layer of kind {part.kind!r} cannot have",
                where=name,
                fix="merge the adapters into the model instead, with adapters.load() and adapters.merge()",
            )
        shapes = method.at(name).tensor_shapes(part.kind, part.shape, part.weight_shape[2:])
        sites[name] = SiteContents(
            part.kind, part.weight_shape, part.shape, {key: Planned(dtype, s) for key, s in shapes.items()}
        )
    targets = shared.targets if len(ranks) == len(extents) else None
    return Plan(replace(shared, method=method, sites=sites, targets=targets), ranks, scale, dtype, source, None)


def widest(source: Source) -> str:
    """The dtype that holds every input's numbers; float32 where one is none of fp64, fp32, fp16 and bf16."""
    names = {t.dtype for own in source.contents.values() for t in _numbers(own)}
    if "F64" in names:
        return "F64"
    return names.pop() if len(names) == 1 and names <= {"F16", "BF16"} else "F32"


def common_scale(scales: Collection[float], ranks: Collection[int]) -> float:
    """One scaling α/r for all sites that leaves every factor's bits alone, if there is one; else 1.

    If the parts' scales differ by powers of two only, so do the factors, and nothing is rounded. α stays an
    integer, as many readers expect.

    >>> common_scale([3.0, 1.5], [8, 16]), common_scale([1.4, 0.6], [8]), common_scale([0.125], [8])
    (3.0, 1.0, 0.125)
    """
    top = max(scales)
    alike = top > 0 and all(s == 0 or math.frexp(s)[0] == math.frexp(top)[0] for s in scales)
    return top if alike and all(float(top * rank).is_integer() for rank in ranks) else 1.0


def carrier() -> type[Method]:
    """The method that results of arithmetic are saved as: the format's choice."""
    name = registry().format(DEFAULT).carrier
    method = registry().method(name)
    if not method.carries_low_rank:
        raise ConfigError(f"method {name!r} cannot hold a low-rank delta", fix="enable the bundled plugin of that name")
    return method


def _one_adapter(source: WeightedSum) -> Stored | Held | None:
    """The adapter that `source` is, unchanged, if its own tensors have a place in a file."""
    weight, only = source.terms[0]
    if len(source.terms) > 1 or weight != 1.0 or not isinstance(only, (Stored, Held)):
        return None
    method = only.own.method
    if method.peft_type is None:  # its own tensors have no place in a file; its delta has
        return None
    known = {name for names in method.peft_keys().values() for name in names}
    return only if all(part.tensors.keys() <= known for part in only.sites.values()) else None


def _has_delta(method: Method) -> bool:
    """Whether the tensors alone give ΔW."""
    return method.defines("delta") and not method.reads_weight


def _cast(own: Contents, dtype: str) -> Contents:
    """The same adapter with its floating-point tensors in `dtype`."""

    def planned(tensors: Mapping[str, Shaped]) -> dict[str, Planned]:
        return {k: Planned(dtype if is_floating(t) else t.dtype, t.shape) for k, t in tensors.items()}

    sites = {name: replace(part, tensors=planned(part.tensors)) for name, part in own.sites.items()}
    return replace(own, sites=sites, shared=planned(own.shared))


def _storing(source: WeightedSum, itemsize: int, reserved: int) -> WeightedSum:
    """A budget is shared with what else is stored, and counts in the dtype that is."""
    weight, last = source.terms[0]
    if len(source.terms) > 1 or not isinstance(last, Truncated) or last.budget is None:
        return source
    return WeightedSum([(weight, last.storing(itemsize, reserved))])


def _nbytes(tensors: Iterable[Shaped]) -> int:
    return sum(math.prod(t.shape) * ITEMSIZE[t.dtype] for t in tensors)


def _numbers(own: Contents) -> list[TensorInfo | Planned]:
    return [*own.shared.values(), *(t for part in own.sites.values() for t in part.tensors.values())]
