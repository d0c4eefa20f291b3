"""The exact weighted sum of adapters and its optimal truncation: what they are, and each site's share of them.

Headers suffice to make and plan them; only `piece` computes, and only it imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from .agreement import common_sites
from .errors import ConfigError, NotMergeable
from .format import Contents, SiteContents
from .source import Extent, Piece, Source

if TYPE_CHECKING:
    from torch import Tensor

    from .delta import Delta

T = TypeVar("T")
FIRST = 32  # singular values of a site that are asked for, before it is known how many are needed


class Spectrum(NamedTuple):
    """Singular values."""

    values: list[float]  # the largest, descending
    rest: float = 0.0  # the squares of all others, summed up


class Truncatable(Source, Protocol):
    """A source that can be cut to lower ranks."""

    def spectrum(self, site: str, least: int) -> Spectrum:
        """At least so many singular values, or all that there are."""

    def truncated(self, site: str, rank: int) -> Piece:
        """The nearest of this rank, which is less than that of the whole."""


class WeightedSum:
    """Σ wᵢ · sourceᵢ, exact; a source itself."""

    def __init__(self, terms: Sequence[tuple[float, Source]]) -> None:
        if not terms:
            raise NotMergeable("nothing is left to sum: all weights are zero", fix="give a weight that is not zero")
        for w, source in terms:
            if not math.isfinite(w):
                raise ConfigError(f"the weight {w} of {next(iter(source.contents))} is not a finite number")
        self.terms = tuple(terms)

    @cached_property
    def contents(self) -> Mapping[str, Contents]:
        return labelled([source for _, source in self.terms])

    @cached_property
    def sites(self) -> Mapping[str, SiteContents]:
        return common_sites([(next(iter(source.contents)), source.sites) for _, source in self.terms])

    @property
    def written_out(self) -> frozenset[str]:
        return frozenset[str]().union(*(source.written_out for _, source in self.terms))

    def prepare(self) -> None:
        for _, source in self.terms:
            source.prepare()

    def _at(self, site: str) -> list[tuple[float, Source]]:
        return [(w, source) for w, source in self.terms if site in source.sites]

    def extent(self, site: str) -> Extent:
        parts = [(w, source.extent(site)) for w, source in self._at(site)]
        return Extent(
            min(sum(part.rank for _, part in parts), *self.sites[site].shape),
            frozenset(abs(w) * scale for w, part in parts for scale in part.scales),
            any(part.bias for _, part in parts),
        )

    def piece(self, site: str) -> Piece:
        import torch

        from . import algebra

        weight, only = self.terms[0]
        if len(self.terms) == 1 and weight == 1.0:
            return only.piece(site)
        lost: list[Delta] = []
        biases: list[Tensor] = []  # (out,) each

        def deltas() -> Iterator[Delta]:  # one by one: a thousand adapters are not in memory together
            for w, source in self._at(site):
                part = source.piece(site)
                lost.extend(delta.scaled(w) for delta in part.lost)
                if part.bias is not None:
                    biases.append(w * part.bias.double())
                yield part.delta.scaled(w)

        delta = algebra.total(deltas())
        return Piece(delta, tuple(lost), torch.stack(biases).sum(0) if biases else None)

    def spectrum(self, site: str, least: int) -> Spectrum:
        from . import algebra

        values, rest = algebra.largest_values(self.piece(site).delta, least)
        return Spectrum(values.tolist(), rest)

    def truncated(self, site: str, rank: int) -> Piece:
        from . import algebra

        whole = self.piece(site)
        kept, dropped = algebra.truncate(whole.delta, rank)
        lost, bias = whole.lost, whole.bias
        del whole  # it may be a matrix, and the next is made
        return Piece(kept, (*lost, algebra.negated(dropped)), bias)

    def recipe(self) -> dict[str, Any]:
        return {"rule": "sum", "terms": [{"weight": w, **source.recipe()} for w, source in self.terms]}


class Truncated:
    """The nearest adapter of lower rank (Eckart and Young 1936).

    Exactly one of `rank` (at every site), `max_error` (relative, over all sites) and `budget` (bytes of tensors,
    `itemsize` a number, less those `reserved` for others) is given; the latter two choose the ranks of all sites
    together, optimally.
    """

    def __init__(
        self,
        of: Truncatable,
        *,
        rank: int | None = None,
        max_error: float | None = None,
        budget: int | None = None,
        itemsize: int = 4,
        reserved: int = 0,
    ) -> None:
        if sum(x is not None for x in (rank, max_error, budget)) != 1:
            raise ConfigError("a truncation needs one of rank, max_error and budget")
        if rank is not None and rank < 1:
            raise ConfigError(f"rank {rank} is not positive", fix="give a rank >= 1")
        if max_error is not None and not 0 < max_error < 1:
            raise ConfigError(f"max_error {max_error} is not between 0 and 1", fix="give a relative error, say 0.01")
        if budget is not None and budget < 1:
            raise ConfigError(f"budget {budget} bytes is not positive")
        self.of, self.rank, self.max_error, self.budget = of, rank, max_error, budget
        self.itemsize, self.reserved = itemsize, reserved
        self.promised, self.tightenings = max_error or 0.0, 0  # `max_error` is to hold after rounding too

    @property
    def contents(self) -> Mapping[str, Contents]:
        return self.of.contents

    @property
    def sites(self) -> Mapping[str, SiteContents]:
        return self.of.sites

    @property
    def written_out(self) -> frozenset[str]:
        return frozenset()

    def prepare(self) -> None:
        self.of.prepare()

    @cached_property
    def _spectra(self) -> dict[str, Spectrum]:
        self.prepare()
        return dict(each(self.sites, lambda name: self.of.spectrum(name, FIRST)))

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """The rank kept at each site; 0 where a budget leaves nothing."""
        if self.rank is not None:
            return {name: min(self.rank, self.of.extent(name).rank) for name in self.sites}
        while True:
            ranks = self._chosen()
            # All that is known of a site is kept, and there is more: whether to keep that too is to be seen.
            short = {name: s for name, s in self._spectra.items() if s.rest > 0 and ranks[name] >= len(s.values)}
            if not short:
                return ranks
            self._spectra.update(each(short, self._longer))

    def _longer(self, site: str) -> Spectrum:
        return self.of.spectrum(site, 2 * len(self._spectra[site].values))

    def _chosen(self) -> dict[str, int]:
        """The best ranks among the singular values that are known."""
        from .allocate import within_budget, within_error

        values = {name: spectrum.values for name, spectrum in self._spectra.items()}
        cost = {name: self.itemsize * sum(part.shape) for name, part in self.sites.items()}
        if self.max_error is not None:
            total, rest = self._squares(), math.fsum(s.rest for s in self._spectra.values())
            if not rest:
                return within_error(values, cost, self.max_error)
            allowed = self.max_error**2 * total - rest
            return within_error(values, cost, math.sqrt(max(allowed, 0.0) / max(total - rest, allowed, 1e-300)))
        assert self.budget is not None
        fixed = self.reserved
        if any(self.of.extent(name).bias for name in self.sites):
            fixed += self.itemsize * sum(part.shape[0] for part in self.sites.values())
        ranks = within_budget(values, cost, max(self.budget - fixed, 0))
        if not any(ranks.values()):
            beside = f" beside {fixed} of biases, heads and the like" if fixed else ""
            least = fixed + min(cost.values())
            raise ConfigError(f"{self.budget} bytes hold no rank at all{beside}", fix=f"allow at least {least}")
        return ranks

    def _squares(self) -> float:
        """Of all singular values, summed up."""
        known = math.fsum(s * s for spectrum in self._spectra.values() for s in spectrum.values)
        return known + math.fsum(spectrum.rest for spectrum in self._spectra.values())

    def storing(self, itemsize: int, reserved: int) -> Truncated:
        """The same, with a budget that is shared with `reserved` bytes; the spectra are not computed again."""
        if self.budget is None or (itemsize, reserved) == (self.itemsize, self.reserved):
            return self
        other = Truncated(self.of, budget=self.budget, itemsize=itemsize, reserved=reserved)
        other.__dict__["_spectra"] = self._spectra
        return other

    def tightened(self, max_error: float) -> Truncated:
        """The same promise kept with a smaller cut; the spectra are not computed again."""
        tighter = Truncated(self.of, max_error=max_error, itemsize=self.itemsize)
        tighter.__dict__["_spectra"] = self._spectra
        tighter.promised, tighter.tightenings = self.promised, self.tightenings + 1
        return tighter

    @property
    def cut_error(self) -> float:
        """The relative error of the truncation alone."""
        total, ranks = self._squares(), self.ranks
        cut = math.fsum(s * s for name, own in self._spectra.items() for s in own.values[ranks[name] :])
        cut += math.fsum(own.rest for own in self._spectra.values())
        return math.sqrt(cut / total) if total else 0.0

    def extent(self, site: str) -> Extent:
        whole = self.of.extent(site)
        return whole if self.ranks[site] >= whole.rank else Extent(self.ranks[site], frozenset({1.0}), whole.bias)

    def piece(self, site: str) -> Piece:
        if self.ranks[site] >= self.of.extent(site).rank:  # its own factors have fewer roundings behind them
            return self.of.piece(site)
        return self.of.truncated(site, self.ranks[site])

    def recipe(self) -> dict[str, Any]:
        itemsize = None if self.budget is None else self.itemsize
        how = {"rank": self.rank, "max_error": self.promised or None, "budget": self.budget, "itemsize": itemsize}
        return {"rule": "truncate", **{k: v for k, v in how.items() if v is not None}, "of": self.of.recipe()}


def labelled(sources: Iterable[Source]) -> dict[str, Contents]:
    """The adapters that these are made of, by names to call them in messages; numbered where two have one name."""
    found: dict[str, Contents] = {}
    for source in sources:
        for name, own in source.contents.items():
            label, n = name, 1
            while found.setdefault(label, own) is not own:  # two of one name, in memory say
                n += 1
                label = f"{name} ({n})"
    return found


def each(names: Mapping[str, Any], job: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """`job` for every name, in order, on as many threads as torch would use; few results wait at a time.

    Each job is many small products, so cores are better spent on jobs than inside of them.
    """
    import torch

    workers = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    wait = False  # an interrupt may leave this thread with a lock that a worker needs: nobody waits for it then
    try:
        todo = iter(names)
        waiting = [(name, pool.submit(job, name)) for name in islice(todo, 2 * workers)]
        while waiting:
            name, future = waiting.pop(0)
            result = future.result()
            waiting += [(n, pool.submit(job, n)) for n in islice(todo, 1)]
            yield name, result
        wait = True
    except Exception:
        wait = True
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)
        torch.set_num_threads(workers)  # what the workers set is the process's default for new threads
