"""Prefix tuning: trained keys and values in front of those of every attention layer.

    softmax(Q [P_k; K]ᵀ / √d) [P_v; V],  P_k and P_v (n, width)        Li and Liang 2021, §4

The input's positions do not move, and a cache holds nothing of the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    does, "zero" lets them begin at zero, where they are no information but still take a part of the attention.
    """

    name = "prefix_tuning"
    paper = "https://arxiv.org/abs/2101.00190"
    site_kinds = frozenset({"attention"})
    wraps_call = True
    peft_type = "PREFIX_TUNING"
    peft_joined = "num_layers"

    num_virtual_tokens: int = 20
    init_weights: Literal["random", "zero"] = "random"

    def check(self) -> None:
        if self.num_virtual_tokens < 1:
            what = f"method {self.name!r}: num_virtual_tokens={self.num_virtual_tokens} is not positive"
            raise ConfigError(what, fix="give a number >= 1")

    @property
    def identity_at_init(self) -> bool:
        return False

    # The rules --------------------------------------------------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        import torch
        from torch import nn

        shape = (self.num_virtual_tokens, 2 * site.shape[0])
        start = torch.zeros(shape) if self.init_weights == "zero" else torch.randn(shape, generator=rng)
        return {"prefix": nn.Parameter(start)}  # keys and values side by side

    def before(
        self, p: Params, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys, values = p["prefix"].chunk(2, dim=-1)  # (n, width)
        return cast("AttentionSite", site).put_before(keys, values, args, kwargs)

    # On disk ----------------------------------------------------------------------------------------

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
