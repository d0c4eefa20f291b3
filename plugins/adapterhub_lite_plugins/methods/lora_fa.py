"""LoRA-FA: LoRA with a frozen A, so that no layer's input is kept for the backward pass.

    h = W₀ x + s · B A x,   only B is trained                  Zhang et al. 2023, §3.1

The gradient of B needs A x (r numbers a token), not x. In the second version of the paper ("LoRA-FA: Efficient and
Effective Low Rank Representation Fine-tuning") B's gradient is projected before each step,

    ĝ_B = (1/s²) g_B (A Aᵀ)⁻¹,

so that the step that W makes, s ĝ_B A, is the gradient of W projected on the rows of A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, Params, hookimpl
from adapterhub_lite.sharding import local, whole
from adapterhub_lite_plugins.methods.lora import LoRA

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Method, Site


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA with A frozen (https://arxiv.org/abs/2308.03303).

    Options: `projection` of B's gradient before each step, as in the paper's second version; it needs
    `adapters.register(optimizer)`, and without it this is the first version. Those of LoRA: `rank`, `alpha`, `rslora`,
    `init_weights`, `lora_bias`, `rank_pattern`, `alpha_pattern`. `dropout` must be 0.
    """

    name = "lora_fa"
    paper = "https://arxiv.org/abs/2308.03303"
    carries_low_rank = False

    projection: bool = True

    def check(self) -> None:
        super().check()
        if self.dropout:
            raise ConfigError(
                f"dropout={self.dropout} would keep every layer's input, or a mask of its size, for the backward pass",
                where=self.name,
                fix="leave it at 0, or use lora: what a frozen A saves would be lost",
            )

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        start = dict(super().init(site, rng))
        if site.kind == "embedding":  # LoRA begins with a zero A there, which would stay so
            import torch
            from torch import nn

            A, B = start["A"], start["B"]  # (r, vocabulary), (dim, r)
            start |= {"A": torch.randn(A.shape, generator=rng), "B": nn.Parameter(torch.zeros_like(B))}
        return {**start, "A": start["A"].detach()}

    def before_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        """Project B's gradient; in float32, or wider if it is, whatever autocast says."""
        import torch

        if not self.projection or p["B"].grad is None or self.scaling == 0:
            return
        g = local(p["B"].grad)  # (out, r, …), rows of it under FSDP
        wide = torch.promote_types(g.dtype, torch.float32)
        A = whole(p["A"]).flatten(1).to(wide)  # (r, in)
        with torch.autocast(g.device.type, enabled=False):
            inverse = torch.linalg.pinv(A @ A.mT, hermitian=True)  # (r, r); pinv, for r may exceed in
            g.copy_((g.flatten(1).to(wide) @ inverse / self.scaling**2).reshape(g.shape))

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        return None  # a config alone means LoRA; the header of our files tells more


@hookimpl
def methods() -> list[type[Method]]:
    return [LoRAFA]
