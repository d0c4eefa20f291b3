"""Delta-LoRA: W moves by what the product B A changes in each step.

    W_{t+1} = W_t + λ s (B_{t+1} A_{t+1} − B_t A_t)   for t > K    Zi et al. 2023, Algorithm 1

The sum telescopes: W_T = W₀ + λ s (B_T A_T − B_K A_K), with the factors as they were when W began to move. So the base
can stay as it is, and the whole change is that of one LoRA of rank 2r, which is what is saved:

    ΔW = s B A + λ s (B A − B_K A_K) = s (1+λ) (B A − C A_K),   C = λ/(1+λ) · B_K

The gradients are those of s B A alone, for Algorithm 1 moves W behind the optimizer's back: each factor's is that of ΔW
divided by 1+λ. This also shows what the method is: under Adam, which does not see the size of a gradient, Delta-LoRA
from the first step on is LoRA with alpha' = (1+λ) alpha, up to Adam's epsilon and clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, LowRank, Outline, Params, hookimpl
from adapterhub_lite.sharding import local, whole
from adapterhub_lite_plugins.methods.lora import LoRA

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Method, Site


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(LoRA):
    """LoRA whose weights move along with it (https://arxiv.org/abs/2309.02411).

    Options: `update_ratio` λ and `start` K, the number of the step, counted from 0, behind which the weight moves; -1
    is from the first step on. It needs `adapters.register(optimizer)`. Those of LoRA: `rank`, `alpha`, `rslora`,
    `init_weights` (without those that look at the weight), `rank_pattern`, `alpha_pattern`. `dropout` must be 0, and
    there is no `lora_bias`. Training that goes on from a saved file is past its start; checkpoints of the training
    keep the count.
    """

    name = "delta_lora"
    paper = "https://arxiv.org/abs/2309.02411"
    exact_gradients = False  # W, and what moved it, is a constant in the backward pass
    carries_low_rank = False

    update_ratio: float = 2.0
    start: int = 500

    def check(self) -> None:
        super().check()
        if self.dropout:
            raise ConfigError(
                f"dropout={self.dropout}: the gradient of W is that of B A only without it (paper, §4)",
                where=self.name,
                fix="leave it at 0",
            )
        if self.lora_bias:
            raise ConfigError(
                "lora_bias: Algorithm 1 has none, and in the file it would be scaled by s (1+λ) where s was trained",
                where=self.name,
                fix="leave it out",
            )
        if self.update_ratio < 0:
            raise ConfigError(f"update_ratio={self.update_ratio} is negative", where=self.name, fix="give one >= 0")
        if self.start < -1:
            what = f"start={self.start} is below -1, which is from the first step on"
            raise ConfigError(what, where=self.name, fix="give -1 or more")
        if self.init_weights in ("pissa", "olora"):
            raise ConfigError(
                f"init_weights={self.init_weights!r} moves W by itself", where=self.name, fix="take kaiming"
            )

    @property
    def _moved(self) -> float:
        """λ/(1+λ), the part of ΔW that is not trained."""
        return self.update_ratio / (1 + self.update_ratio)

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch

        start = super().init(site, rng)
        A, B = start["A"].detach(), start["B"].detach()
        return {**start, "A_K": A.clone(), "C": self._moved * B, "step": torch.zeros(1, dtype=torch.int64)}

    def delta(self, p: Params, site: Site) -> LowRank:
        import torch

        A, B, A_K, C = (p[name].flatten(1) for name in ("A", "B", "A_K", "C"))  # (r, in), (out, r), …
        if torch.is_grad_enabled():  # the values stay; the gradients are divided by 1+λ
            A, B = A + self._moved * (A.detach() - A), B + self._moved * (B.detach() - B)
        scale = self.scaling * (1 + self.update_ratio)
        return LowRank(torch.cat([B, -C], dim=1), torch.cat([A, A_K]), scale)  # (out, 2r), (2r, in)

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return super().outline(shapes)._replace(scale=self.scaling * (1 + self.update_ratio))

    def after_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        """Count the steps; the snapshot follows the factors until W begins to move, behind step K."""
        import torch

        local(p["step"]).add_(1)
        follows = whole(p["step"]) <= self.start + 1  # (1,): no number is read, so nothing waits for the device
        for name, now in (("A_K", local(p["A"])), ("C", self._moved * local(p["B"]))):
            snapshot = local(p[name])
            snapshot.copy_(torch.where(follows, now, snapshot))

    # On disk: a LoRA of rank 2r ---------------------------------------------------------------------

    def pack(self, p: Params) -> Mapping[str, Tensor]:
        import torch

        A, B = torch.cat([p["A"], p["A_K"]]), torch.cat([p["B"], -p["C"]], dim=1)  # (2r, in, …), (out, 2r, …)
        return {"A": A, "B": B}

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        import torch

        r, A, B = self.rank, saved["A"], saved["B"]
        past = torch.full((1,), self.start + 2, dtype=torch.int64)
        return {"A": A[:r], "B": B[:, :r], "A_K": A[r:], "C": -B[:, r:], "step": past}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        return None  # a config alone means LoRA; the header of our files tells more

    def to_peft(self) -> dict[str, Any]:
        config = super().to_peft()
        # The rank is twice as large, and the scaling s (1+λ).
        factor = (1 + self.update_ratio) * (math.sqrt(2) if self.rslora else 2)
        return {
            **config,
            "r": 2 * self.rank,
            "lora_alpha": factor * self.alpha,
            "rank_pattern": {key: 2 * rank for key, rank in self.rank_pattern.items()},
            "alpha_pattern": {key: factor * alpha for key, alpha in self.alpha_pattern.items()},
        }


@hookimpl
def methods() -> list[type[Method]]:
    return [DeltaLoRA]
