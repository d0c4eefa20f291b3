"""A stack of transformer layers with its embeddings, as transformers has them: positions can be put in front."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, ConfigError
from ..hookspecs import hookimpl
from . import Site
from .block import BlockSite

if TYPE_CHECKING:
    from torch import Tensor, nn

DYNAMIC = "call it with a mask (batch, length) and a dynamic cache"


class DecoderSite(BlockSite):
    """The module that embeds tokens and gives hidden states: `model.get_decoder()`, not the one with the output head.

    Its shape is (width, width).
    """

    kind = "decoder"
    general = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return _embeds(module) and not any(_embeds(inner) for inner in module.modules() if inner is not module)

    @classmethod
    def check(cls, name: str, module: nn.Module) -> None:
        super().check(name, module)
        if getattr(module, "pooler", None) is not None:
            raise ConfigError(
                "its pooler reads the first position, which would be one of the prompt's",
                where=name,
                fix="build the model without one (add_pooling_layer=False)",
            )

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Site:
        embeddings: Any = module.get_input_embeddings()  # type: ignore[operator]
        width = embeddings.weight.shape[-1]
        return cls(name, (width, width), module)

    @property
    def embeddings(self) -> nn.Module:
        """The layer that embeds the tokens; its weight is (vocabulary, width)."""
        found: nn.Module = self._live().get_input_embeddings()  # type: ignore[operator]
        return found

    def width(self, end: str) -> int:
        if end == "input":
            raise ConfigError("a gate cannot read tokens", where=self.name, fix="gate adapters of other layers")
        return super().width(end)

    @property
    def like(self) -> Tensor:
        return self.embeddings.get_parameter("weight")

    @property
    def sample(self) -> Tensor:
        return self.like.detach()

    def prepend(
        self, prompt: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with the embeddings `prompt` (n, width) in front of each sequence.

        The mask is as much longer, and positions begin behind the prompt. A call that continues a cache gets no
        prompt, for it is in the cache; the mask covers it there.
        """
        import torch
        from torch import Tensor

        call, n = self._by_name(args, kwargs), len(prompt)
        call.pop("cache_position", None)  # the decoder counts for itself
        mask, positions, seen = call.get("attention_mask"), call.get("position_ids"), _seen(call)
        if getattr(call.get("past_key_values"), "is_compileable", False):
            raise AdapterError("gets a static cache, which has no room for a prompt", where=self.name, fix=DYNAMIC)
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise AdapterError(
                "gets a mask with a row for each query, where no prompt fits in", where=self.name, fix=DYNAMIC
            )
        if other := next((key for key, v in call.items() if key.endswith("token_type_ids") and v is not None), None):
            raise AdapterError(f"gets {other}, and a prompt has none", where=self.name, fix="leave them out")
        given = call.get("inputs_embeds")  # (batch, length, width)
        if given is None:
            given = call.get("input_ids")  # (batch, length)
        if given is None:
            raise AdapterError("gets neither input_ids nor inputs_embeds", where=self.name, fix="give one of them")
        batch, length = given.shape[:2]
        if mask is not None:
            call["attention_mask"] = torch.cat([mask.new_ones(batch, n), mask], dim=1)  # (batch, seen + n + length)
        if seen:
            if mask is not None and mask.shape[1] + n != seen + length:
                raise AdapterError(
                    f"goes on with a cache of {seen} positions, and a mask of {mask.shape[1]} for {length} more does "
                    f"not leave out the {n} of the prompt",
                    where=self.name,
                    fix="begin with an empty cache, and count no prompt in the mask",
                )
            if positions is not None:
                call["position_ids"] = positions + n
            return (), call
        embedded = self.embeddings(given) if call.get("inputs_embeds") is None else given
        front = prompt.to(embedded).expand(batch, -1, -1)
        call["input_ids"], call["inputs_embeds"] = None, torch.cat([front, embedded], dim=1)
        if positions is not None:  # (…, length)
            front = torch.arange(n, device=positions.device, dtype=positions.dtype).expand(*positions.shape[:-1], n)
            call["position_ids"] = torch.cat([front, positions + n], dim=-1)
        return (), call

    def strip(self, n: int, kwargs: Mapping[str, Any], out: Any) -> Any:
        """What the decoder gave for a call by `prepend`, without the n positions in front."""
        length = self.hidden(out).shape[1]
        if kwargs.get("past_key_values") is not None and _seen(kwargs) != length:
            return out  # it went on with a cache
        return _stripped(out, n, length)

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if not args:
            return dict(kwargs)
        names = [*inspect.signature(type(self._live()).forward).parameters][1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}


def _embeds(module: nn.Module) -> bool:
    """Whether it has a layer that embeds tokens, and takes their embeddings instead of them."""
    if not callable(getattr(module, "get_input_embeddings", None)):
        return False
    return {"inputs_embeds", "attention_mask"} <= inspect.signature(type(module).forward).parameters.keys()


def _seen(call: Mapping[str, Any]) -> int:
    """The number of positions in the cache."""
    cache = call.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _stripped(out: Any, n: int, length: int) -> Any:
    """Hidden states (batch, length, width) and attention weights (batch, heads, length, …) from position n on."""
    from torch import Tensor

    if isinstance(out, Tensor):
        if out.ndim == 3 and out.shape[1] == length:
            return out[:, n:]
        return out[:, :, n:] if out.ndim == 4 and out.shape[2] == length else out
    if isinstance(out, tuple):
        parts = [_stripped(part, n, length) for part in out]
        return type(out)(*parts) if hasattr(out, "_fields") else tuple(parts)
    if isinstance(out, Mapping):
        return type(out)({key: _stripped(part, n, length) for key, part in out.items()})  # type: ignore[call-arg]
    return out


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [DecoderSite]
