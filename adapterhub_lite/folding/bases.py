"""Whether the base is the one that the adapters were trained on: some of its values tell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .. import sketch
from ..checkpoint import ITEMSIZE, TensorInfo
from ..errors import FileError
from . import numbers
from .places import ANY_BASE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..site import Site
    from .planning import Plan


def check_base(plan: Plan, sites: Mapping[str, Site]) -> None:
    """Raise `FileError` if the base has other values than an adapter's sketch at the layers that both know."""
    for i, source in enumerate(plan.sources):
        for label, own in source.contents.items():
            told = sketch.told(own.facts)
            here = {
                part.site: _values(layer.weight, sites[layer.name])
                for layer in plan.layers.values()
                for part in layer.parts
                if part.term == i and part.site in told
            }
            other = sketch.differing(told, here)
            if other is not None:
                raise FileError(
                    f"was trained on other weights at {other!r} than this base has: on another base model",
                    where=label,
                    fix=ANY_BASE,
                )


def _values(info: TensorInfo, site: Site) -> list[float]:
    """The values of a weight that its sketch has, each read by itself."""
    out, into = site.shape
    at = [j * out + i if site.by_inputs else i * into + j for i, j in sketch.places(out, into)]
    return sketch.rounded([_value(info, place) for place in at])


def _value(info: TensorInfo, at: int) -> float:
    size = ITEMSIZE[info.dtype]
    start = info.start + at * size
    one = replace(info, shape=(), start=start, stop=start + size)
    return float(numbers.float64(numbers.stored(one), info.dtype))
