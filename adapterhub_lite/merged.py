"""A merge rule applied to adapters: a source like any other, so that it is planned, truncated, measured and saved.

Headers suffice to make and plan one; only `prepare` and `piece` compute, and only they import torch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from . import options, per_site
from .agreement import common_sites
from .combine import each, labelled
from .errors import ConfigError, NotMergeable, nearest
from .format import Contents, SiteContents
from .per_site import Weight
from .rule import Facts, Part, Place, Rule, shares
from .source import Extent, Piece, Source

if TYPE_CHECKING:
    from torch import Tensor

    from .delta import Delta


class Merged:
    """A rule's result, site by site.

    An adapter that has nothing at a site takes part there with ΔW = 0. The rule sees the adapters in an order that
    their numbers decide, so that the order in which they are given changes no bit. Changes of biases are summed with
    the weights, whatever the rule; where the rule averages, with their shares. What was cut off from an input before
    is no part of it: the exact result is that of the inputs as they are.
    """

    def __init__(
        self,
        rule: Rule,
        inputs: Sequence[Source],
        weights: Sequence[Weight],
        at: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """`at`: by pattern of site names, options of the rule that differ there; the first pattern that matches."""
        if len(inputs) != len(weights):
            raise ConfigError(f"{len(weights)} weights for {len(inputs)} adapters", fix="give one for each")
        if not inputs:
            raise ConfigError("nothing to merge", fix="give at least one adapter")
        if rule.takes is not None and len(inputs) != rule.takes:
            raise ConfigError(
                f"rule {rule.name!r} merges {rule.takes} adapters, and was given {len(inputs)}",
                fix="merge others into one first, or choose another rule: `adapter rules` lists them",
            )
        self.rule, self.inputs, self.weights, self.at = rule, tuple(inputs), tuple(weights), dict(at or {})
        for source, weight in zip(inputs, weights, strict=True):
            per_site.check(weight, f"the weights of {next(iter(source.contents))}")
        self._own = {pattern: _changed(rule, given, pattern) for pattern, given in self.at.items()}
        for site in self.sites if any(isinstance(w, Mapping) for w in weights) else [*self.sites][:1]:
            self._check_weights(site, self.weights_at(site))
        self._facts: Facts = {}
        self._passed = 0
        self._lock = threading.Lock()

    @cached_property
    def contents(self) -> Mapping[str, Contents]:
        return labelled(self.inputs)

    @cached_property
    def sites(self) -> Mapping[str, SiteContents]:
        return common_sites([(next(iter(source.contents)), source.sites) for source in self.inputs])

    @property
    def written_out(self) -> frozenset[str]:
        below = frozenset[str]().union(*(source.written_out for source in self.inputs))
        return below | {self.rule.name} if self.rule.full_rank else below

    @cached_property
    def _depths(self) -> Mapping[str, float]:
        return per_site.depths(list(self.sites))

    def weights_at(self, site: str) -> list[float]:
        """The weight of each input at one site."""
        return [per_site.weight_at(w, site, self._depths) for w in self.weights]

    def _check_weights(self, site: str, weights: Sequence[float]) -> None:
        name = self.rule.name
        if self.rule.weighs == "equal" and len(set(weights)) > 1:
            raise ConfigError(
                f"rule {name!r} finds its own weights, and was given {weights}", fix="give all adapters the same"
            )
        if self.rule.weighs != "sum" and (min(weights) < 0 or sum(weights) == 0):
            raise ConfigError(
                f"weights of rule {name!r} are shares of an average, and {weights} at {site!r} are none",
                fix="give weights that are not negative, and not all 0; a negated adapter is -1 * a",
            )

    def _rule_at(self, site: str) -> Rule:
        return per_site.first(self._own, site) or self.rule

    def extent(self, site: str) -> Extent:
        parts = [source.extent(site) for source in self.inputs if site in source.sites]
        ranks = [part.rank for part in parts]
        self._check_ranks(site, ranks)
        rank = min(self._rule_at(site).rank(ranks, self.sites[site].shape), *self.sites[site].shape)
        return Extent(rank, frozenset({1.0}), any(part.bias for part in parts))

    def _check_ranks(self, site: str, ranks: Sequence[int]) -> None:
        if not self._rule_at(site).same_rank or (len(ranks) == len(self.inputs) and len(set(ranks)) == 1):
            return
        had = {next(iter(s.contents)): s.extent(site).rank if site in s.sites else None for s in self.inputs}
        said = ", ".join(
            f"{name} {'is not there' if rank is None else f'has rank {rank}'}" for name, rank in had.items()
        )
        raise NotMergeable(
            f"rule {self.rule.name!r} merges adapters of one rank, all at the same layers, and {said}",
            where=site,
            fix="give them one rank with `adapter resize`, or choose another rule: `adapter rules` lists them",
        )

    def prepare(self) -> None:
        """Make the rule's passes over all sites, once."""
        for source in self.inputs:
            source.prepare()
        with self._lock:
            for _ in range(self._passed, self.rule.passes):
                seen = dict(each(self.sites, self._observe))
                self._facts = self.rule.conclude(seen, self._facts)
                self._passed += 1

    def _observe(self, site: str) -> Facts:
        self.extent(site)  # refuses what the rule does not take
        return self.rule.observe(self._parts(site)[0], self._place(site), self._facts)

    def _place(self, site: str) -> Place:
        return Place(site, self.sites[site].shape)

    def _parts(self, site: str) -> tuple[list[Part], Tensor | None]:
        """What the inputs bring, in the order of their numbers, and the change of the bias (out,)."""
        import torch

        from . import algebra
        from .delta import Dense

        weights, shape = self.weights_at(site), self.sites[site].shape
        parts: list[Part] = []
        biases: list[tuple[str, Tensor]] = []
        for number, (source, w, share) in enumerate(zip(self.inputs, weights, shares(self.rule, weights), strict=True)):
            if site in source.sites:
                piece = source.piece(site)
                delta: Delta = algebra.on_cpu(piece.delta)
                if piece.bias is not None:
                    bias = share * piece.bias.detach().cpu().double()  # (out,)
                    biases.append((algebra.digest(Dense(bias)), bias))
            else:
                delta = algebra.nothing(shape)
            if len(delta.shape) > 2:
                raise NotMergeable(
                    f"rule {self.rule.name!r} merges matrices, and here there is one for each expert", where=site
                )
            parts.append(Part(delta, w, number, algebra.digest(delta)))
        parts.sort(key=lambda part: (part.key, part.weight))
        parts = [part._replace(key=key) for part, key in zip(parts, _apart([p.key for p in parts]), strict=True)]
        return parts, torch.stack([b for _, b in sorted(biases, key=lambda b: b[0])]).sum(0) if biases else None

    def piece(self, site: str) -> Piece:
        self.prepare()
        rank = self.extent(site).rank
        parts, bias = self._parts(site)
        delta = self._rule_at(site).merge(parts, self._place(site), self._facts)
        return Piece(self._fitted(delta, site, rank), (), bias)

    def _fitted(self, delta: Delta, site: str, rank: int) -> Delta:
        """The result with exactly the rank that was planned, for a file's tensors are."""
        from . import algebra

        shape = self.sites[site].shape
        if tuple(delta.shape) != shape:
            what = f"rule {self.rule.name!r} gave ΔW of shape {list(delta.shape)}, not {list(shape)}"
            raise NotMergeable(what, where=site, fix="repair the rule's plugin")
        fitted = algebra.of_rank(delta, rank)
        if fitted is None:
            what = f"rule {self.rule.name!r} gave ΔW of a higher rank than the {rank} it had said"
            raise NotMergeable(what, where=site, fix="repair rank() in the rule's plugin")
        return fitted

    def recipe(self) -> dict[str, Any]:
        weights = [per_site.plain(w) for w in self.weights]
        terms = [{"weight": w, **source.recipe()} for w, source in zip(weights, self.inputs, strict=True)]
        own = {"rule": self.rule.name, "version": self.rule.version, "options": options.plain(self.rule)}
        return {**own, **({"at": per_site.pairs(self.at)} if self.at else {}), "terms": terms}


def _changed(rule: Rule, given: Mapping[str, Any], pattern: str) -> Rule:
    """The rule with other options at the sites that match the pattern."""
    if rule.passes:
        raise ConfigError(
            f"rule {rule.name!r} with these options looks at all sites together", where=f"at {pattern!r}",
            fix="give the options for all sites alike",
        )  # fmt: skip
    known = options.plain(rule)
    for name in given:
        if name not in known:
            fix = nearest(name, known) if known else "it has no options"
            raise ConfigError(f"rule {rule.name!r} has no option {name!r}", where=f"at {pattern!r}", fix=fix)
    return replace(rule, **given)


def _apart(keys: Sequence[str]) -> list[str]:
    """Sorted keys, told apart where equal ones follow each other: equal adapters have random numbers of their own."""
    return [f"{key}.{keys[:i].count(key)}" for i, key in enumerate(keys)]
