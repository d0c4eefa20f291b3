"""Bottleneck adapters: a small net of its own behind a block of the model, or beside it.

    h + s · U σ(D h)        behind it, h its output                 Houlsby et al. 2019, §2.1
    y + s · U σ(D x)        beside it, x its input, y its output    He et al. 2021, §3.1 and §4.6
    LN(z + s · U σ(D y))    around a norm, y = LN(z)                Pfeiffer et al. 2021, §3.2, as in their code

D leads to the few dimensions of the bottleneck and U out of it; both have biases. Unlike a LoRA it is no change of a
weight, for σ lies between: it stays a part of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from adapterhub_lite import AdapterError, ConfigError, Method, Params, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Site

MIN_FACTOR = 1 / 64  # of a width: below it the bottleneck is none
MAX_SCALING = 3e38  # of float32
# Ends of keys in the file; p has the tensors by the first names.
KEYS = {
    "down": "adapter_down.weight",
    "down_bias": "adapter_down.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
    "scale": "adapter_scale",
    "norm_before": "adapter_norm_before.weight",
    "norm_before_bias": "adapter_norm_before.bias",
    "norm_after": "adapter_norm_after.weight",
    "norm_after_bias": "adapter_norm_after.bias",
}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Bottleneck adapters (https://arxiv.org/abs/1902.00751): small nets behind or beside blocks of the model.

    Options: `bottleneck_size`, its width, or else `reduction_factor`, how many times narrower it is than what it
    reads; `non_linearity` σ; `placement`, "sequential" (it reads the block's output) or "parallel" (its input);
    `around_norm`, for targets that are LayerNorms: it reads the norm's output and adds to its input; `scaling` s, a
    number, or "learned" (one number that is trained) or "channel" (one for each channel of the output); `dropout` on
    what it adds; `ln_before` and `ln_after`, a LayerNorm of its own before D and behind U; `init_weights`, "lora" (U
    zero), or "normal" or "truncated_normal" (cut off at two of them) with standard deviation `std`.
    """

    name = "bottleneck"
    paper = "https://arxiv.org/abs/1902.00751"
    site_kinds = frozenset({"block"})
    peft_type = "BOTTLENECK"  # a name of our own: PEFT has no such method

    bottleneck_size: int | None = None
    reduction_factor: float = 16
    non_linearity: Literal["relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu"] = "relu"
    placement: Literal["sequential", "parallel"] = "sequential"
    around_norm: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    dropout: float = 0.0
    ln_before: bool = False
    ln_after: bool = False
    init_weights: Literal["lora", "normal", "truncated_normal"] = "lora"
    std: float = 0.02

    @classmethod
    def houlsby(cls, **options: Any) -> Self:
        """As in the code of 1902.00751: for the layers whose output goes to dropout, residual and norm."""
        return cls(**{"non_linearity": "gelu", "init_weights": "truncated_normal", "std": 1e-3, **options})

    @classmethod
    def pfeiffer(cls, **options: Any) -> Self:
        """As in the code of 2005.00247: for the LayerNorm behind the feed-forward net of a post-norm model."""
        return cls(**{"around_norm": True, "init_weights": "normal", "std": 0.02, **options})

    @classmethod
    def parallel(cls, **options: Any) -> Self:
        """As in 2110.04366: for the feed-forward net, 4 · U ReLU(D x) of width 512."""
        return cls(**{"placement": "parallel", "scaling": 4.0, "bottleneck_size": 512, **options})

    def check(self) -> None:
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            what = f"bottleneck_size {self.bottleneck_size} is not positive"
            raise ConfigError(what, where=self.name, fix="give one >= 1")
        if self.reduction_factor < MIN_FACTOR:
            what = f"reduction_factor {self.reduction_factor:g} is below {MIN_FACTOR}"
            raise ConfigError(what, where=self.name, fix="give a larger one, say 16")
        if not isinstance(self.scaling, str) and abs(self.scaling) > MAX_SCALING:
            what = f"scaling {self.scaling:g} is larger than any float32"
            raise ConfigError(what, where=self.name, fix="choose a smaller one")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not in [0, 1)", where=self.name)
        if self.std <= 0:
            raise ConfigError(f"std={self.std} is not positive", where=self.name, fix="give one > 0, say 0.02")
        if self.around_norm and self.placement == "parallel":
            what = "an adapter around a norm reads the norm's output, and a parallel one its input"
            raise ConfigError(what, where=self.name, fix="leave out around_norm or placement")

    @property
    def identity_at_init(self) -> bool:
        return self.init_weights == "lora"

    # The rules ------------------------------------------------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch
        from torch import nn

        if self.around_norm and not isinstance(site.module, nn.LayerNorm):
            raise ConfigError(
                f"around_norm is for LayerNorms, and this is a {type(site.module).__name__}",
                where=site.name,
                fix="target the norm, or leave out around_norm",
            )

        def weight(*shape: int) -> Tensor:
            if self.init_weights == "lora":  # kaiming_uniform(a=√5)
                return (2 * torch.rand(shape, generator=rng) - 1) / math.sqrt(shape[1])
            if self.init_weights == "normal":
                return self.std * torch.randn(shape, generator=rng)
            s = self.std
            return nn.init.trunc_normal_(torch.empty(shape), std=s, a=-2 * s, b=2 * s, generator=rng)

        shapes = self._shapes(*site.shape)
        tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
        tensors["down"] = weight(*shapes["down"])
        if self.init_weights != "lora":
            tensors["up"] = weight(*shapes["up"])
        for ones in {"scale", "norm_before", "norm_after"} & shapes.keys():
            tensors[ones] = torch.ones(shapes[ones])
        return {key: nn.Parameter(t) for key, t in tensors.items()}

    def _shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Those of all tensors at a block of these widths."""
        d = into if self.placement == "parallel" else out  # what it reads
        m = self.bottleneck_size or max(1, int(d // self.reduction_factor))
        shapes: dict[str, tuple[int, ...]] = {"down": (m, d), "down_bias": (m,), "up": (out, m), "up_bias": (out,)}
        if isinstance(self.scaling, str):
            shapes["scale"] = (out,) if self.scaling == "channel" else (1,)
        if self.ln_before:
            shapes.update(norm_before=(d,), norm_before_bias=(d,))
        if self.ln_after:
            shapes.update(norm_after=(out,), norm_after_bias=(out,))
        return shapes

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.joined(self.added(p, x, y, site), x, y, site)

    def added(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        self._check_widths(p, x, y, site)
        return self._net(p, x if self.placement == "parallel" else y, site)

    def joined(self, u: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if not self.around_norm:
            return y + u
        assert site.module is not None
        # Not a call of the module, whose hooks would come here again.
        return site.module.forward((x + u).to(site.like.dtype)).to(y.dtype)  # type: ignore[no-any-return]

    def _net(self, p: Params, h: Tensor, site: Site) -> Tensor:
        """What is added for hidden states h (…, d): (…, out)."""
        from torch.nn import functional as F

        if self.ln_before:
            h = F.layer_norm(h, h.shape[-1:], p["norm_before"], p["norm_before_bias"])
        h = F.linear(h, p["down"], p["down_bias"])  # (…, m)
        if self.non_linearity == "gelu_new":
            h = F.gelu(h, approximate="tanh")
        else:
            names = {"swish": "silu", "leakyrelu": "leaky_relu"}
            h = getattr(F, names.get(self.non_linearity, self.non_linearity))(h)
        u = F.linear(h, p["up"], p["up_bias"])  # (…, out)
        if isinstance(self.scaling, str):
            u = u * p["scale"]
        elif self.scaling != 1:
            u = u * self.scaling
        if self.dropout and site.module is not None and site.module.training:
            u = F.dropout(u, self.dropout)
        return F.layer_norm(u, u.shape[-1:], p["norm_after"], p["norm_after_bias"]) if self.ln_after else u

    def _check_widths(self, p: Params, x: Tensor, y: Tensor, site: Site) -> None:
        """The site's widths are those of layers in the block: what it takes and gives may have others."""
        ends = [("gives", y, p["up"].shape[0])]
        if self.placement == "parallel":
            ends.append(("takes", x, p["down"].shape[1]))
        for does, t, width in ends:
            if not t.is_floating_point() or t.shape[-1:] != (width,):
                raise AdapterError(
                    f"{does} a tensor {list(t.shape)} of {t.dtype}, and the adapter was made for the width {width}",
                    where=site.name,
                    fix="target a block whose first and last layers are as wide as what it takes and gives",
                )
        if self.placement == "parallel" and x.shape[:-1] != y.shape[:-1]:
            raise AdapterError(
                f"makes a tensor {list(y.shape)} of {list(x.shape)}, so nothing can be beside it",
                where=site.name,
                fix='target a block that keeps these dimensions, or choose placement="sequential"',
            )

    # On disk --------------------------------------------------------------------------------------

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {"": {key: KEYS[key] for key in self._shapes(1, 1)}}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        return cls(**{f.name: config.pop(f.name) for f in fields(cls) if f.name in config})

    def to_peft(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        down, up = shapes["down"], shapes["up"]
        if len(down) != 2 or len(up) != 2 or self._shapes(up[0], down[1]) != shapes:
            told = ", ".join(f"{KEYS[key]} {list(shape)}" for key, shape in shapes.items())
            raise ConfigError(f"{told} do not fit each other and the options")
        widths = (up[0], down[1] if self.placement == "parallel" else -1)
        return "block", widths, widths


@hookimpl
def methods() -> list[type[Method]]:
    return [Bottleneck]
