"""An adapter as a value: `0.7 * a + 0.3 * b - c` is one too, and is computed when it is saved, site by site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import ITEMSIZE, dtype_name
from .combine import Truncated, WeightedSum
from .errors import ConfigError
from .merged import Merged
from .options import build
from .plan import Plan, plan, widest
from .registry import registry
from .rule import Rule
from .source import Held, Single, stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .delta import Delta
    from .per_site import Weight
    from .protocol import Method, Params
    from .save import RelativeError
    from .site import Site
    from .source import Source


def load(ref: str | Path) -> Adapter:
    """The adapter in the folder `ref`: headers are read and strictly validated, tensors when they are needed.

    Raises `FileError` for a folder that is missing, broken, hostile or not understood.
    """
    return Adapter(((1.0, stored(ref)),))


def merge(
    adapters: Sequence[Adapter],
    rule: str | Rule | None = None,
    *,
    weights: Sequence[Weight] | None = None,
    at: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Adapter:
    """The adapters merged by a rule, lazily: nothing but headers is read before it is saved or asked for.

    `rule` is a rule's name, with its `options`, or the rule itself; None is the exact weighted sum. A weight may be
    a mapping from patterns of site names to numbers, or to several that are spread along the layers; `at` gives
    options that differ at the sites that a pattern matches. Of patterns, the first that matches counts. By default
    weights are the rule's own, for most 1/N each.
    """
    if isinstance(rule, str) or rule is None:
        cls = registry().rule("sum" if rule is None else rule)
        rule_itself = build(cls, options, owner=f"rule {cls.name!r}")
    elif not isinstance(rule, Rule):
        raise ConfigError(f"{rule!r} is not a rule with its options", fix="give its name, or an instance")
    elif options:
        raise ConfigError(f"options {', '.join(options)} beside a rule that has its own", fix="give them to the rule")
    else:
        rule_itself = rule
    count = len(adapters)
    given = [rule_itself.default_weight(count) for _ in adapters] if weights is None else list(weights)
    return Adapter(((1.0, Merged(rule_itself, [a.inner for a in adapters], given, at)),))


class Adapter:
    """A weighted sum of adapters, Σ wᵢ ΔWᵢ; one that was loaded is the sum with one term.

    `+`, `-`, `*` and `/` with numbers build sums without reading a tensor. Nothing is ever averaged factor by
    factor: the sum is that of the deltas.
    """

    def __init__(self, terms: tuple[tuple[float, Source], ...]) -> None:
        self._terms = terms

    @classmethod
    def of(
        cls,
        method: Method,
        sites: Mapping[str, Site],
        params: Mapping[str, Params],
        shared: Mapping[str, Tensor] | None = None,
    ) -> Adapter:
        """An adapter from tensors in memory: each site's own, by its name, and those that all `shared`."""
        return cls(((1.0, Held(method, sites, params, shared=shared)),))

    # Arithmetic -------------------------------------------------------------------------------------

    def __add__(self, other: object) -> Adapter:
        if not isinstance(other, Adapter):
            return NotImplemented
        weights: dict[int, tuple[float, Source]] = {}
        for w, source in (*self._terms, *other._terms):
            weights[id(source)] = (weights.get(id(source), (0.0, source))[0] + w, source)
        return Adapter(tuple(weights.values()))

    def __mul__(self, weight: object) -> Adapter:
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            return NotImplemented
        if not math.isfinite(weight):
            raise ConfigError(f"an adapter times {weight} is none", fix="give a finite weight")
        return Adapter(tuple((weight * w, source) for w, source in self._terms))

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1

    def __sub__(self, other: object) -> Adapter:
        return self + -other if isinstance(other, Adapter) else NotImplemented

    def __truediv__(self, number: object) -> Adapter:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            return NotImplemented
        if number == 0:
            raise ConfigError("an adapter cannot be divided by zero")
        return Adapter(tuple((w / number, source) for w, source in self._terms))

    def __radd__(self, other: object) -> Adapter:
        # So that sum([a, b, c]) works.
        return self if other == 0 else NotImplemented

    def truncate(
        self,
        rank: int | None = None,
        *,
        max_error: float | None = None,
        budget: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """The nearest adapter that is smaller: by rank, by error or by size.

        With `rank`, of at most that rank at every site. With `max_error`, the smallest whose relative error is at
        most that once stored, rounding included. With `budget`, the nearest whose tensors take at most that many
        bytes in `dtype` (default: the widest of the inputs'); the sites share the budget optimally.
        """
        if rank is max_error is budget is None:
            raise ConfigError("a truncation needs a rank, a max_error or a budget")
        return self.cut(
            rank=rank, max_error=max_error, budget=budget, dtype=None if dtype is None else dtype_name(dtype)
        )

    def cut(self, *, rank: int | None, max_error: float | None, budget: int | None, dtype: str | None) -> Adapter:
        """As `truncate`, with the dtype spelled as in safetensors; itself if nothing is asked for."""
        if rank is max_error is budget is None:
            return self
        itemsize = ITEMSIZE[dtype or widest(self.source)]
        cut = Truncated(self.source, rank=rank, max_error=max_error, budget=budget, itemsize=itemsize)
        return Adapter(((1.0, cut),))

    # What it is -------------------------------------------------------------------------------------

    @property
    def terms(self) -> tuple[tuple[float, Source], ...]:
        """The weights and what they weigh, those of weight 0 too."""
        return self._terms

    @property
    def single(self) -> Single | None:
        """The one adapter that it is, with weight 1; None for a sum."""
        weight, only = self._terms[0]
        return only if len(self._terms) == 1 and weight == 1.0 and isinstance(only, Single) else None

    @property
    def sites(self) -> Mapping[str, Any]:
        """The adapted layers: name to kind and weight shape."""
        return self.source.sites

    def delta(self, site: str) -> Delta:
        """ΔW (out, in) at one site, computed now; float64 where anything was added up."""
        return self.source.piece(site).delta

    @cached_property
    def error(self) -> RelativeError:
        """What saving would lose, by truncation and by rounding to the widest dtype of the inputs. Computes all."""
        from .save import measure

        return measure(self.source)

    @property
    def inner(self) -> Source:
        """The one source that it is, with weight 1; else the sum."""
        weight, only = self._terms[0]
        return only if len(self._terms) == 1 and weight == 1.0 else self.source

    @cached_property
    def source(self) -> WeightedSum:
        """What gives its deltas; terms of weight 0 are left out."""
        return WeightedSum(tuple((w, source) for w, source in self._terms if w != 0))

    def __repr__(self) -> str:
        names = (f"{w:g} * {_named(source)}" for w, source in self._terms)
        return f"<Adapter {' + '.join(names)}>"

    # Writing ----------------------------------------------------------------------------------------

    def plan(self, *, dtype: str | None = None, any_base: bool = False, keep: str | None = None) -> Plan:
        """What `write` would write, from headers; ranks by error or budget need the numbers."""
        return plan(self.source, dtype=dtype, any_base=any_base, keep=keep)

    def write(self, out: Path, **options: Any) -> tuple[Plan, RelativeError]:
        """As `save`, with the dtype spelled as in safetensors and a `progress(done, total)`; what was written too."""
        from .save import save

        return save(self.source, out, **options)

    def save(
        self,
        out: str | Path,
        *,
        dtype: torch.dtype | None = None,
        force: bool = False,
        any_base: bool = False,
        keep: str | None = None,
    ) -> RelativeError:
        """Write it to the folder `out`, whole or not at all; returns the error of what was stored.

        `dtype`: of the tensors, by default the widest of the inputs'; of one adapter whose tensors alone do not
        give ΔW they are rounded, and the error's `of` says what it is of. `force`: replace an adapter that is there.
        `any_base`: do not ask that all name the same base model. `keep`: the adapter to take trained heads,
        biases and token rows from where they differ, or "none".
        """
        spelled = None if dtype is None else dtype_name(dtype)
        return self.write(Path(out), dtype=spelled, force=force, any_base=any_base, keep=keep)[1]


def _named(source: Source) -> str:
    names = list(source.contents)
    return f"{source.rule.name}({', '.join(names)})" if isinstance(source, Merged) else names[0]
