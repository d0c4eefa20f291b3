"""One mistake each: routers that are right but for one thing, and the checks that must notice it.

The first check named is the one that the mistake was made for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from tripping import noted_in

from adapterhub_lite import Delta, LowRank, Router
from adapterhub_lite.options import option
from adapterhub_lite.routing import top

BUGS: dict[type[Router], tuple[str, ...]] = {}
trips = noted_in(BUGS)
Ways = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Mixture(Router):
    """A softmax of the `top_k` largest linear scores (https://arxiv.org/abs/2404.15159); it is sound."""

    name = "mixture"
    paper = "https://arxiv.org/abs/2404.15159"

    top_k: int = option(2, "How many ways a token goes.", least=1)

    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        return {"w": nn.Parameter(0.02 * torch.randn(width, generator=rng))}

    def weights(self, ways: Ways, h: Tensor) -> Tensor:
        return top(self.scores(ways, h), self.top_k, temperature=1.0)

    def scores(self, ways: Ways, h: Tensor) -> Tensor:
        return h @ torch.stack([way["w"] for way in ways]).mT


@dataclass(frozen=True, kw_only=True)
class Gated(Mixture):
    """Trained way by way, as a gate, and then routed to the `top_k` largest; it is sound."""

    def alone(self, way: Mapping[str, Tensor], h: Tensor) -> Tensor:
        return (h @ way["w"][:, None]).sigmoid()


@dataclass(frozen=True, kw_only=True)
class Constant(Router):
    """A number for each way, whatever the input (https://arxiv.org/abs/2410.13025); it is sound."""

    name = "constant"
    paper = "https://arxiv.org/abs/2410.13025"

    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        return {"z": nn.Parameter(torch.zeros(1))}

    def fixed(self, ways: Ways) -> Tensor:
        return torch.cat([way["z"] for way in ways]).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class Loudest(Router):
    """Ways by the length of what their ΔW makes of an input, from Gram matrices (https://arxiv.org/abs/2405.11157)."""

    name = "loudest"
    paper = "https://arxiv.org/abs/2405.11157"
    reads_delta = True

    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        return {"G": delta.dense().mT @ delta.dense()}

    def weights(self, ways: Ways, h: Tensor) -> Tensor:
        return torch.stack([((h @ way["G"]) * h).sum(-1) for way in ways], dim=-1).softmax(-1)


@trips("documented")
class Undocumented(Mixture):
    """A softmax of linear scores, of some of them."""


@trips("options_survive_json", "saved_and_loaded_as_it_is")
@dataclass(frozen=True, kw_only=True)
class WithATupleOfTuples(Mixture):
    """A softmax of the `top_k` largest scores; `pairs` come back from JSON as lists."""

    pairs: tuple[tuple[int, ...], ...] = ((1, 2),)


@trips("wrong_options_are_refused")
class Unchecked(Mixture):
    def __post_init__(self) -> None:
        """Nothing."""


@trips("init_gives_tensors")
class CountsInWholeNumbers(Mixture):
    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        return {**super().init(delta, width, rng), "steps": torch.zeros((), dtype=torch.int64)}


@trips("init_is_deterministic")
class GlobalRandomness(Mixture):
    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        return {"w": nn.Parameter(0.02 * torch.randn(width))}


@trips("weights_are_finite")
class OfUnitLength(Mixture):
    def scores(self, ways: Ways, h: Tensor) -> Tensor:
        return super().scores(ways, h / h.norm(dim=-1, keepdim=True))  # of a padded token, 0 / 0


@trips("functions_are_pure")
class InPlace(Mixture):
    def scores(self, ways: Ways, h: Tensor) -> Tensor:
        found = super().scores(ways, h)
        if not found.requires_grad:  # as one does who has thought of autograd
            h *= 1 + 1e-14
        return found


@trips("rows_count_for_themselves")
class CentredOverTheBatch(Mixture):
    def scores(self, ways: Ways, h: Tensor) -> Tensor:
        return super().scores(ways, h if h.ndim < 2 else h - h.mean(0))


@trips("order_of_ways_changes_nothing")
class FirstOnesFirst(Mixture):
    def scores(self, ways: Ways, h: Tensor) -> Tensor:
        found = super().scores(ways, h)
        return found - torch.arange(len(ways)).to(found)


@trips("half_precision")
class InFloat32(Mixture):
    def weights(self, ways: Ways, h: Tensor) -> Tensor:
        return super().weights(ways, h) * torch.ones(len(ways))


@trips("alone_weighs_one_way")
class WithoutAnAxis(Gated):
    def alone(self, way: Mapping[str, Tensor], h: Tensor) -> Tensor:
        g = super().alone(way, h)
        return g if g.ndim == 2 else g.squeeze(-1)


@trips("fixed_holds_for_every_input")
class FixedAndNot(Constant):
    def weights(self, ways: Ways, h: Tensor) -> Tensor:
        return (super().weights(ways, h) + 1e-3 * h[..., :1]).softmax(-1)


@trips("gradients_reach_its_tensors_alone")
class Detached(Mixture):
    def scores(self, ways: Ways, h: Tensor) -> Tensor:
        return super().scores([{"w": way["w"].detach()} for way in ways], h)


@trips("saved_and_loaded_as_it_is")
class AsLongAsTheRank(Loudest):
    """The rows of a way's A are its tensors: right but for a file, where nothing is known of ranks."""

    def init(self, delta: Delta, width: int, rng: Generator) -> Mapping[str, Tensor]:
        return {"G": delta.A if isinstance(delta, LowRank) else delta.dense()}

    def weights(self, ways: Ways, h: Tensor) -> Tensor:
        return torch.stack([(h @ way["G"].mT).square().sum(-1) for way in ways], dim=-1).softmax(-1)
