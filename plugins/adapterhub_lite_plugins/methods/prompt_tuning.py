"""Prompt tuning: trained embeddings in front of those of every input.

    h = decoder([P; E(x)]),  P (n, width)        Lester et al. 2021, §2

The model is frozen and sees n more positions; what it gives for them is dropped.
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
    from adapterhub_lite.site.decoder import DecoderSite


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trained embeddings in front of those of every input (https://arxiv.org/abs/2104.08691).

    Options: `num_virtual_tokens`, how many; `init_weights`: "random" draws them from a normal distribution, as PEFT
    does, "sample_vocab" takes embeddings of tokens of the model's vocabulary, drawn at random.
    """

    name = "prompt_tuning"
    paper = "https://arxiv.org/abs/2104.08691"
    site_kinds = frozenset({"decoder"})
    wraps_call = True
    peft_type = "PROMPT_TUNING"
    peft_joined = "num_transformer_submodules"

    num_virtual_tokens: int = 20
    init_weights: Literal["random", "sample_vocab"] = "random"

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

        n, width = self.num_virtual_tokens, site.shape[0]
        if self.init_weights == "random":
            return {"prompt": nn.Parameter(torch.randn(n, width, generator=rng))}
        words = site.sample  # (vocabulary, width)
        rows = torch.randint(len(words), (n,), generator=rng)
        return {"prompt": nn.Parameter(words[rows.to(words.device)].clone())}

    def before(
        self, p: Params, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cast("DecoderSite", site).prepend(p["prompt"], args, kwargs)

    def after(self, p: Params, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, site: Site) -> Any:
        return cast("DecoderSite", site).strip(len(p["prompt"]), kwargs, out)

    # On disk ----------------------------------------------------------------------------------------

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {"": {"prompt": "prompt_embeddings"}}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        if config.get("num_transformer_submodules") not in (None, 1):
            raise ConfigError("the prompts are those of an encoder and a decoder", fix="load them with PEFT")
        for entry in ("token_dim", "num_layers", "num_attention_heads"):  # of the model
            config.pop(entry, None)
        for entry in ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"):  # how it began
            config.pop(entry, None)
        start = str(config.pop("prompt_tuning_init", "RANDOM")).lower()
        return cls(
            num_virtual_tokens=config.pop("num_virtual_tokens", None),
            init_weights="sample_vocab" if start == "sample_vocab" else "random",
        )

    def to_peft(self) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "prompt_tuning_init": self.init_weights.upper(),
            "task_type": "CAUSAL_LM",  # without one, PEFT puts no prompt before anything
        }

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        shape = shapes["prompt"]
        if len(shape) != 2 or shape[0] != self.num_virtual_tokens:
            raise ConfigError(f"the prompt is {list(shape)}, and num_virtual_tokens is {self.num_virtual_tokens}")
        width = shape[1]
        return "decoder", (width, width), (width, width)


@hookimpl
def methods() -> list[type[Method]]:
    return [PromptTuning]
