"""BitFit: of all a layer has, its bias alone is trained.

    h = W₀ x + b₀ + Δb                                         Ben Zaken et al. 2022, §3

The paper trains the biases themselves, of linear layers and of norms; their difference to the base's is the same
thing, and can be weighed, added up and taken off. It begins at 0, and for a linear layer its gradient needs no
activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, LowRank, Method, NotMergeable, Outline, Params, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Site

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Bias-term fine-tuning (https://arxiv.org/abs/2106.10199). It has no options.

    A layer without a bias is refused.
    """

    name = "bitfit"
    paper = "https://arxiv.org/abs/2106.10199"
    site_kinds = frozenset({"linear", "transposed_linear", *CONVOLUTIONS, "norm"})
    peft_type = "BITFIT"

    def refuses(self, site: Site) -> str | None:
        return "the layer has no bias" if site.bias is None else None

    # The rules ------------------------------------------------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch
        from torch import nn

        return {"db": nn.Parameter(torch.zeros(site.shape[0]))}

    def delta(self, p: Params, site: Site) -> LowRank:
        """None, as a matrix of rank 1: what carries a sum has no smaller one."""
        db, (out, into) = p["db"], site.shape
        return LowRank(db.new_zeros(out, 1), db.new_zeros(1, into))

    def delta_bias(self, p: Params, site: Site) -> Tensor:
        return p["db"]

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return Outline(1, bias=True)

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return site.add_bias(p["db"], x, y)

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        if bias is None:
            raise NotMergeable("the layer has no bias", where=site.name, fix="leave the adapter unmerged")
        return weight, bias + p["db"].to(bias.dtype)

    # On disk --------------------------------------------------------------------------------------

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        kinds = {kind: {"db": f"bitfit_{kind}_bias"} for kind in (*CONVOLUTIONS, "norm")}
        return {"": {"db": "bitfit_bias"}, **kinds}  # a vector does not tell what layer it is of

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        return cls()

    def to_peft(self) -> dict[str, Any]:
        return {}

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        if len(shapes["db"]) != 1:
            raise ConfigError(f"{self.peft_keys()[family]['db']} {list(shapes['db'])} is not a vector")
        (out,) = shapes["db"]
        if family == "norm":
            return "norm", (out,), (out, 1)
        kernel = CONVOLUTIONS.index(family) + 1 if family else 0
        return family or "linear", (out, *(-1 for _ in range(1 + kernel))), (out, -1)


@hookimpl
def methods() -> list[type[Method]]:
    return [BitFit]
