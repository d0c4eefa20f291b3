"""One mistake each: merge rules that are right but for one thing, and the checks that must notice it.

The first check named is the one that the mistake was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tripping import noted_in

from adapterhub_lite import Delta, Dense, LowRank, Part, Place, Rule, algebra, elementwise
from adapterhub_lite.options import option
from adapterhub_lite.rule import Facts, shares

BUGS: dict[type[Rule], tuple[str, ...]] = {}
trips = noted_in(BUGS)


@dataclass(frozen=True, kw_only=True)
class Average(Rule):
    """The mean (https://arxiv.org/abs/2203.05482), times `gain`; it is sound."""

    name = "average"
    paper = "https://arxiv.org/abs/2203.05482"

    gain: float = option(1.0, "A factor.", above=0)

    @property
    def weighs(self) -> Literal["sum", "average", "equal"]:
        return "average"

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        w = shares(self, [part.weight for part in parts])
        return algebra.total(part.delta.scaled(self.gain * x) for part, x in zip(parts, w, strict=True))


@dataclass(frozen=True, kw_only=True)
class Dropping(Rule):
    """DARE (https://arxiv.org/abs/2311.03099) with a `seed`; it is sound."""

    name = "dropping"
    paper = "https://arxiv.org/abs/2311.03099"
    full_rank = True

    seed: int = option(0, "What is drawn from.")

    @property
    def keeps_one(self) -> bool:
        return False

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        kept = torch.stack([self.kept(part, place) for part in parts])
        return elementwise.by_rows(parts, place.shape, lambda D, w, which: (w * D * kept[:, which]).sum(0))

    def kept(self, part: Part, place: Place) -> torch.Tensor:
        return self.uniform(part, place) < 0.5


@trips("documented")
class Undocumented(Average):
    """The mean, times a factor that is not named."""


@trips("options_survive_json")
@dataclass(frozen=True, kw_only=True)
class WithATupleOfTuples(Average):
    """The mean, times `gain`; `pairs` come back from JSON as lists."""

    pairs: tuple[tuple[int, ...], ...] = ((1, 2),)


@trips("wrong_options_are_refused")
class Unchecked(Average):
    def __post_init__(self) -> None:
        """Nothing."""


@trips("result_is_as_declared")
class OfHigherRank(Average):
    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        return min(max(ranks), *shape)


@trips("one_adapter_is_itself", "equal_adapters_are_one")
class Halved(Average):
    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        return super().merge(parts, place, facts).scaled(0.5)


@trips("equal_adapters_are_one")
class Uncounted(Average):
    """The mean of two adapters or more, times `gain`, which forgets how many there were."""

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        return super().merge(parts, place, facts).scaled(float(len(parts)))


@trips("order_changes_nothing")
class FirstCountsMost(Average):
    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        first = [part._replace(weight=part.weight * (2.0 if i == 0 else 1.0)) for i, part in enumerate(parts)]
        return super().merge(first, place, facts)


@trips("scales_with_its_inputs")
class AbsoluteThreshold(Average):
    """The mean, times `gain`, without entries below 1 where there is more than one adapter."""

    full_rank = True

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        W = super().merge(parts, place, facts).dense()
        same = all(torch.allclose(part.delta.dense(), parts[0].delta.dense()) for part in parts)
        return Dense(W if same else W * (W.abs() > 1))


@trips("weights_are_as_declared")
class FactorsCalledShares(Average):
    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        return algebra.total(part.scaled for part in parts)


@trips("deterministic")
class GlobalRandomness(Dropping):
    """DARE with masks of torch's global state, beside those of the `seed`."""

    def kept(self, part: Part, place: Place) -> torch.Tensor:
        # As a library would: the state is set and used.
        drawn = super().kept(part, place)
        return drawn & (torch.rand(place.shape) < 2)


@trips("deterministic")
class CountingCalls(Average):
    calls = 0

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        type(self).calls += 1
        return super().merge(parts, place, facts).scaled(1 + 1e-12 * self.calls)


@trips("draws_by_seed_and_content")
class KeyedByNumber(Dropping):
    def kept(self, part: Part, place: Place) -> torch.Tensor:
        return super().kept(part._replace(key=f"{part.key} {part.number}"), place)


@trips("draws_by_seed_and_content")
class SeedForgotten(Dropping):
    def uniform(self, part: Part, place: Place) -> torch.Tensor:
        from adapterhub_lite.seed import uniform

        return uniform(place.shape, place.name, part.key)


@trips("draws_by_seed_and_content")
class OneMaskForAll(Dropping):
    def kept(self, part: Part, place: Place) -> torch.Tensor:
        return super().kept(part._replace(key=""), place)


@trips("factors_equal_matrices")
class FactorByFactor(Average):
    """Times `gain`; √w on each factor, which is PEFT's linear: right for one adapter, not for what it is called."""

    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        mean = super().merge(parts, place, facts)
        if not all(isinstance(part.delta, LowRank) for part in parts):
            return mean
        one = all(torch.allclose(part.delta.dense(), parts[0].delta.dense()) for part in parts)
        return mean if one else mean.scaled(1.5)


@trips("inputs_are_left_alone")
class InPlace(Average):
    def merge(self, parts: Sequence[Part], place: Place, facts: Facts) -> Delta:
        delta = super().merge(parts, place, facts)
        kept = type(delta)(*(x.clone() if isinstance(x, torch.Tensor) else x for x in delta))
        for part in parts:
            if isinstance(part.delta, LowRank) and part.delta.rank:
                part.delta.B[:, 0] *= -1  # the same ΔW, in other factors
                part.delta.A[0] *= -1
        return kept


@trips("one_adapter_is_itself")
class Modest(Average):
    @property
    def keeps_one(self) -> bool:
        return False
