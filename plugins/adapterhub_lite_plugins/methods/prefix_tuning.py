"""Prefix tuning: trained keys and values in front of those of every attention layer.

    softmax(Q [P_k; K]ᵀ / √d) [P_v; V],  P_k and P_v (n, width)        Li and Liang 2021, §4

The input's positions do not move, and a cache holds nothing of the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from adapterhub_lite import ConfigError, Method, Params, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Site
    from adapterhub_lite.site.attention import AttentionSite


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Trained keys and values in front of those of every attention layer (https://arxiv.org/abs/2101.00190).

    Options: `num_virtual_tokens`, how many; `init_weights`: "random" draws them from a normal distribution, as PEFT
    does, "zero" lets them begin at zero, where they are no information but still take a part of the attention;
    `prefix_projection`: train them through a network of one hidden layer, `encoder_hidden_size` wide, which is dropped
    when they are saved.
    """

    name = "prefix_tuning"
    paper = "https://arxiv.org/abs/2101.00190"
    site_kinds = frozenset({"attention"})
    wraps_call = True
    peft_type = "PREFIX_TUNING"
    peft_joined = "num_layers"

    num_virtual_tokens: int = 20
    init_weights: Literal["random", "zero"] = "random"
    prefix_projection: bool = False
    encoder_hidden_size: int = 512

    def check(self) -> None:
        for option in ("num_virtual_tokens", "encoder_hidden_size"):
            if getattr(self, option) < 1:
                what = f"method {self.name!r}: {option}={getattr(self, option)} is not positive"
                raise ConfigError(what, fix="give a number >= 1")

    @property
    def identity_at_init(self) -> bool:
        return False

    # The rules --------------------------------------------------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch
        from torch import nn

        n, width, hidden = self.num_virtual_tokens, site.shape[0], self.encoder_hidden_size
        zero = self.init_weights == "zero"
        if not self.prefix_projection:
            shape = (n, 2 * width)  # keys and values side by side
            return {"prefix": nn.Parameter(torch.zeros(shape) if zero else torch.randn(shape, generator=rng))}

        def uniform(*shape: int, into: int) -> nn.Parameter:  # as torch's linear layers begin
            return nn.Parameter((torch.rand(shape, generator=rng) * 2 - 1) / into**0.5)

        start = {
            "E": nn.Parameter(torch.randn(n, width, generator=rng)),
            "W1": uniform(hidden, width, into=width),
            "b1": uniform(hidden, into=width),
            "W2": uniform(2 * width, hidden, into=hidden),
            "b2": uniform(2 * width, into=hidden),
        }
        return {
            name: nn.Parameter(torch.zeros_like(t)) if zero and name in ("W2", "b2") else t for name, t in start.items()
        }

    def prefix(self, p: Params) -> Tensor:
        """Keys and values (n, 2 width), side by side."""
        if "prefix" in p:
            return p["prefix"]
        return (p["E"] @ p["W1"].mT + p["b1"]).tanh() @ p["W2"].mT + p["b2"]

    def weighed(self, p: Params, weight: Tensor, site: Site) -> Mapping[str, Tensor]:
        """Prefixes (batch, n, 2 width), keys and values both scaled: UniPELT, Mao et al. 2022, §2.3."""
        return {"prefix": weight[:, None, None] * self.prefix(p)}

    def before(
        self, p: Params, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys, values = self.prefix(p).chunk(2, dim=-1)  # (…, n, width)
        return cast("AttentionSite", site).put_before(keys, values, args, kwargs)

    # On disk ----------------------------------------------------------------------------------------

    def as_saved(self) -> Self:
        return replace(self, prefix_projection=False, encoder_hidden_size=type(self).encoder_hidden_size)

    def pack(self, p: Params) -> Mapping[str, Tensor]:
        return {"prefix": self.prefix(p)}

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {"": {"prefix": "prompt_embeddings"}}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        if config.pop("num_transformer_submodules", None) not in (None, 1):
            raise ConfigError("the prefixes are those of an encoder and a decoder", fix="load them with PEFT")
        for entry in ("token_dim", "num_attention_heads"):  # of the model
            config.pop(entry, None)
        for entry in ("prefix_projection", "encoder_hidden_size"):  # of the training: the result is what is saved
            config.pop(entry, None)
        return cls(
            num_virtual_tokens=config.pop("num_virtual_tokens", None),
            init_weights=config.pop("init_weights", None) or "random",
        )

    def to_peft(self) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "init_weights": None if self.init_weights == "random" else self.init_weights,
            "prefix_projection": False,
            "task_type": "CAUSAL_LM",  # without one, PEFT puts no prefix before anything
        }

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        shape = shapes["prefix"]
        if len(shape) != 2 or shape[0] != self.num_virtual_tokens or shape[1] % 2:
            raise ConfigError(
                f"the prefix of a layer is {list(shape)}, and num_virtual_tokens is {self.num_virtual_tokens}"
            )
        width = shape[1] // 2
        return "attention", (width, width), (width, width)


@hookimpl
def methods() -> list[type[Method]]:
    return [PrefixTuning]
