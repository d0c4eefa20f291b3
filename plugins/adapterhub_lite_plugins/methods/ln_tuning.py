"""LayerNorm tuning: of the whole model, the norms alone are trained.

    h = w ⊙ (x − μ) / σ + b                                    Zhao et al. 2024

with w and b in the place of the base's: they begin there. A norm without a bias, as RMSNorm, has w alone. What the norm
computes between is its class's business. The tensors are values and not differences, as in PEFT's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, Method, Params, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Site


@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """Tuning the norms' own weights and biases (https://arxiv.org/abs/2312.11420). It has no options."""

    name = "ln_tuning"
    paper = "https://arxiv.org/abs/2312.11420"
    site_kinds = frozenset({"norm"})
    reads_weight = True
    takes_any_output = False  # the norm is computed anew
    peft_type = "LN_TUNING"

    # The rules ------------------------------------------------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        from torch import nn

        start = {"weight": nn.Parameter(site.fold(site.weight).clone())}
        return start if site.bias is None else {**start, "bias": nn.Parameter(site.bias.clone())}

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return site.rerun(x, site.unfold(p["weight"]), p.get("bias")).to(y.dtype)

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        own = p.get("bias")
        return site.unfold(p["weight"]).to(weight.dtype), bias if own is None else own.to(weight.dtype)

    # On disk --------------------------------------------------------------------------------------

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {"": {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}}

    def peft_optional(self) -> frozenset[str]:
        return frozenset({"bias"})

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        if site.module is not None and ("bias" in saved) != (site.bias is not None):
            who, other = ("the file", "the layer") if "bias" in saved else ("the layer", "the file")
            raise ConfigError(
                f"{who} has a bias and {other} has none",
                where=site.name,
                fix="load it on the model that it was made for",
            )
        return saved

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        return cls()

    def to_peft(self) -> dict[str, Any]:
        return {}

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        weight = shapes["weight"]
        if len(weight) != 1:
            raise ConfigError(f"ln_tuning_layers.weight {list(weight)} is not a vector")
        if shapes.get("bias", weight) != weight:
            raise ConfigError(f"ln_tuning_layers.bias {list(shapes['bias'])} does not fit the weight {list(weight)}")
        return "norm", weight, (weight[0], 1)


@hookimpl
def methods() -> list[type[Method]]:
    return [LNTuning]
