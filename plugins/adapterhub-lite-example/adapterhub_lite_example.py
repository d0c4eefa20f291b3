"""LoRA-XS: a small matrix trained between frozen factors of the weight itself.

    h = W x + B R A x,   B = U_r Σ_r,   A = V_rᵀ,   W = U Σ Vᵀ        Bałazy et al. 2024, §3

R is (r, r), so an adapter has r² trained numbers a layer, however wide the layer is. The formula has no
scaling and there is none here; the authors' code also multiplies by PEFT's α / r, which is the same with
another R and another learning rate. That code decomposes Wᵀ, which moves Σ from B to A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_lite import ConfigError, LowRank, Method, Outline, Params, Site, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LoraXs(Method):
    """LoRA with an extremely small number of parameters (https://arxiv.org/abs/2405.17604).

    Options: `rank` r, at most the smaller side of the weight; `sigma` σ, R's standard deviation at the start.
    """

    name = "lora_xs"
    paper = "https://arxiv.org/abs/2405.17604"
    site_kinds = frozenset({"linear", "transposed_linear"})

    rank: int = 8
    sigma: float = 1e-5

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank} is not positive", where=self.name, fix="give a rank >= 1")
        if self.sigma < 0:
            raise ConfigError(f"sigma {self.sigma} is negative", where=self.name, fix="give a sigma >= 0")

    @property
    def identity_at_init(self) -> bool:
        return self.sigma == 0  # the paper starts near the base model, not at it

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch  # not at the top: listing the methods stays fast
        from torch import nn

        r = self.rank
        if r > min(site.shape):
            raise ConfigError(f"rank {r} exceeds the weight's, {min(site.shape)}", where=site.name, fix="lower it")
        U, S, Vh = torch.linalg.svd(site.weight.float(), full_matrices=False)
        R = self.sigma * torch.randn(r, r, generator=rng)
        B, A = U[:, :r] * S[:r], Vh[:r]  # (out, r), (r, in)
        return {"B": B.contiguous(), "R": nn.Parameter(R), "A": A.contiguous()}

    def delta(self, p: Params, site: Site) -> LowRank:
        return LowRank(p["B"] @ p["R"], p["A"])

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return Outline(rank=shapes["R"][0])


@hookimpl
def methods() -> list[type[Method]]:
    return [LoraXs]
