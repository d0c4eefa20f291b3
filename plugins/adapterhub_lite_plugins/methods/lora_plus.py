"""LoRA+: LoRA whose B learns faster than its A.

    η_B = λ η_A                                                Hayou et al. 2024, §4, eq. 5

With equal rates, wide models learn features inefficiently: the gradients of A and B scale differently with the width.
Nothing else changes; the file is a LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_lite import ConfigError, LowRank, Params, hookimpl
from adapterhub_lite_plugins.methods.lora import LoRA

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from adapterhub_lite import Method, Site

# An embedding's factors have names of their own, by which `groups` knows them.
EMBEDDING = {"A": "embedding_A", "B": "embedding_B"}


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    """LoRA with different learning rates for A and B (https://arxiv.org/abs/2402.12354).

    Options: `ratio` λ of B's learning rate to A's (the paper starts at 2⁴; there is no official default);
    `embedding_lr`, the rate of both factors at embeddings, as in the official code. The optimizer's weight decay
    holds for all of them. Those of LoRA: `rank`, `alpha`, `rslora`, `dropout`, `init_weights`, `lora_bias`,
    `rank_pattern`, `alpha_pattern`.
    """

    name = "lora_plus"
    paper = "https://arxiv.org/abs/2402.12354"
    carries_low_rank = False

    ratio: float = 16.0
    embedding_lr: float = 1e-6

    def check(self) -> None:
        super().check()
        for name, value in (("ratio", self.ratio), ("embedding_lr", self.embedding_lr)):
            if value <= 0:
                raise ConfigError(f"{name}={value} is not positive", where=self.name, fix=f"give a {name} > 0")

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return _named(super().init(site, rng), site)

    def groups(self, params: Mapping[str, Sequence[nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """A and lora_bias at lr, B at λ lr, embeddings at their own rate (loraplus/lora_plus.py, lines 44-90)."""
        rates = {"B": self.ratio * lr, **dict.fromkeys(EMBEDDING.values(), self.embedding_lr)}
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, own in params.items():
            by_rate.setdefault(rates.get(name, lr), []).extend(own)
        return [{"params": own, "lr": rate} for rate, own in by_rate.items()]

    def delta(self, p: Params, site: Site) -> LowRank:
        return super().delta(_plain(p), site)

    def pack(self, p: Params) -> Mapping[str, Tensor]:
        return super().pack(_plain(p))

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        return _named(super().unpack(saved, site), site)

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        return None  # a config alone means LoRA; the header of our files tells more


def _named(tensors: Mapping[str, Any], site: Site) -> Mapping[str, Any]:
    return {EMBEDDING.get(name, name): t for name, t in tensors.items()} if site.kind == "embedding" else tensors


def _plain(p: Params) -> Params:
    if "A" in p:
        return p
    plain = {named: name for name, named in EMBEDDING.items()}
    return Params({plain.get(name, name): t for name, t in p.items()})


@hookimpl
def methods() -> list[type[Method]]:
    return [LoRAPlus]
