"""IA3: trained factors for keys, values and the activations inside of feed-forward blocks.

    softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V)   and   (l_ff ⊙ γ(W₁ x)) W₂        Liu et al. 2022, §3.3

Keys and values are outputs of a layer: l scales its output, bias and all. What is inside of a feed-forward block is the
input of its second layer: there l scales the input. All begin at 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, Method, Params, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Site

ALL = "*"  # what `at` leaves of `feedforward` at a layer that it names


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations (https://arxiv.org/abs/2205.05638).

    Options: `feedforward`, the layers whose input is scaled: names of modules, or ends of names behind a dot, as in
    PEFT's feedforward_modules. The output of all others is, their bias included.
    """

    name = "ia3"
    paper = "https://arxiv.org/abs/2205.05638"
    site_kinds = frozenset({"linear", "quantised_linear", "transposed_linear", "conv2d"})
    reads_weight = True
    peft_type = "IA3"

    feedforward: tuple[str, ...] = ()

    def at(self, site: str) -> Self:
        inside = any(site == name or site.endswith(f".{name}") for name in self.feedforward)
        return replace(self, feedforward=(ALL,) if inside else ())

    # The rules; `at` has said whether the layer is a feed-forward block's -----------------------------

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch
        from torch import nn

        out, into = site.shape
        n = _groups(site) * into // math.prod(site.kernel) if self.feedforward else out
        return {"l": nn.Parameter(torch.ones(self._shape(n, len(site.kernel))))}

    def _shape(self, n: int, dimensions: int) -> tuple[int, ...]:
        """PEFT's shape of l for n channels: it broadcasts against the weight, or for a convolution the activations."""
        if dimensions:
            return (1, n, *(1 for _ in range(dimensions)))
        return (1, n) if self.feedforward else (n, 1)

    def before(
        self, p: Params, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.feedforward:
            return args, kwargs
        name, x = (None, args[0]) if args else next(iter(kwargs.items()))
        scaled = (x * site.along(p["l"].flatten())).to(x.dtype)  # (…, in)
        return ((scaled, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: scaled})

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y if self.feedforward else site.scale_output(y, p["l"].flatten().to(y.dtype))

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        l = p["l"].flatten().to(weight.dtype)  # noqa: E741  # (out,) or (channels in,)
        if self.feedforward:
            k = math.prod(site.kernel)
            g = len(l) * k // weight.shape[1]  # groups, 1 but for convolutions
            rows = l.reshape(g, -1).repeat_interleave(k, dim=1)  # (groups, in): what the rows of each group see
            return weight * rows.repeat_interleave(len(weight) // g, dim=0), bias  # (out, in)
        return l[:, None] * weight, None if bias is None else l.to(bias.dtype) * bias

    def rows(self, p: Params, start: int, stop: int, site: Site) -> Params | None:
        if not self.feedforward:
            return Params({"l": p["l"].flatten()[start:stop]})
        return p if p["l"].numel() * math.prod(site.kernel) == site.shape[1] else None  # else each group has its own

    # On disk --------------------------------------------------------------------------------------

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {"": {"l": "ia3_l"}}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        config.pop("init_ia3_weights", None)  # how they began
        names = config.pop("feedforward_modules", None) or ()
        if not isinstance(names, (list, tuple)):
            raise ConfigError(
                f"feedforward_modules={names!r} is a regular expression, which nobody runs",
                fix="write a list of the modules' names",
            )
        return cls(feedforward=tuple(sorted(names)))

    def to_peft(self) -> dict[str, Any]:
        return {"feedforward_modules": sorted(self.feedforward), "init_ia3_weights": True}

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        l = shapes["l"]  # noqa: E741
        n = l[0] if len(l) == 2 and not self.feedforward else l[1] if len(l) > 1 else -1
        if len(l) not in (2, 4) or l != self._shape(n, len(l) - 2):
            raise ConfigError(f"ia3_l {list(l)} does not fit a layer whose {self._scaled} is scaled")
        if len(l) == 4:  # in groups, a kernel sees a part of the channels
            out = -1 if self.feedforward else n
            return "conv2d", (out, -1, -1, -1), (out, -1)
        shape = (-1, n) if self.feedforward else (n, -1)
        return "linear", shape, shape

    @property
    def _scaled(self) -> str:
        return "input" if self.feedforward else "output"


def _groups(site: Site) -> int:
    return getattr(site.module, "groups", 1)


@hookimpl
def methods() -> list[type[Method]]:
    return [IA3]
