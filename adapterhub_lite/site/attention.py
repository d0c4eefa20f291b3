"""Attention with rotated positions, as transformers has it: keys and values can be put in front of its own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, ConfigError
from ..hookspecs import hookimpl
from . import Site
from .block import BlockSite

if TYPE_CHECKING:
    from torch import Tensor, nn

TAKES = {"hidden_states", "attention_mask", "past_key_values", "position_embeddings"}
MASKED = ("eager", "sdpa")  # implementations whose mask, if there is one, has a row for each query
SCALED = ("linear", "llama3", "yarn")  # RoPE types whose frequencies do not depend on the input


@dataclass(frozen=True, eq=False)
class AttentionSite(BlockSite):
    """Self-attention with RoPE. Its shape is (width, width), of all heads' keys at one position together."""

    kind = "attention"
    general = True

    frequencies: tuple[float, ...] = ()  # by which a position rotates keys and queries, (head_dim / 2,)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        from torch import nn

        if not all(isinstance(module._modules.get(name), nn.Module) for name in ("q_proj", "k_proj", "v_proj")):
            return False
        known = all(hasattr(module, name) for name in ("head_dim", "layer_idx", "config"))
        return known and inspect.signature(type(module).forward).parameters.keys() >= TAKES

    @classmethod
    def check(cls, name: str, module: nn.Module) -> None:
        import torch

        super().check(name, module)
        rotate = getattr(type(module).forward, "__globals__", {}).get("rotate_half")
        if rotate is None or rotate(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
            raise ConfigError("rotates positions in a way that is not known", where=name, fix="leave it out")
        if getattr(module, "sliding_window", None) or getattr(module.config, "sliding_window", None):
            raise ConfigError("has a sliding window, out of which a prefix would slide", where=name, fix="leave it out")
        _frequencies(name, module)

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Site:
        width = module.get_submodule("k_proj").get_parameter("weight").shape[0]
        return cls(name, (width, width), module, _frequencies(name, module))

    def width(self, end: str) -> int:
        if end == "input":
            return int(self._live().get_submodule("q_proj").get_parameter("weight").shape[1])
        return super().width(end)

    def put_before(
        self, keys: Tensor, values: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with `keys` and `values` in front of its own, seen by every query: (n, width), or (batch, n, width).

        The keys are taken as they would lie in a cache of n positions. The input's positions do not move, so the keys
        are rotated back by n: what counts is the distance. A cache that is continued holds none of this.
        """
        import torch

        module = self._live()
        names = [*inspect.signature(type(module).forward).parameters][1:] if args else []
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        if getattr(module.config, "_attn_implementation", None) not in MASKED:
            raise AdapterError(
                f"computes attention by {module.config._attn_implementation!r}, which no prefix was tried with",  # type: ignore[union-attr]
                where=self.name,
                fix='call model.set_attn_implementation("sdpa")',
            )
        x: Tensor = call["hidden_states"]  # (batch, length, …)
        mask, cache, size = call.get("attention_mask"), call.get("past_key_values"), int(module.head_dim)  # type: ignore[arg-type]
        if mask is None:
            mask = self._unmasked(x, cache)
        if mask is not None:  # (batch, 1, length, keys)
            shown = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
            mask = torch.cat([shown(*mask.shape[:-1], keys.shape[-2]), mask], dim=-1)
        front = _Front(self._rotated_back(_heads(keys, size)).to(x), _heads(values, size).to(x), cache)
        return (), {**call, "attention_mask": mask, "past_key_values": front}

    def _unmasked(self, x: Tensor, cache: Any) -> Tensor | None:
        """What a call without a mask leaves to the implementation: each query sees the keys up to its own.

        Only a first call is without; a single query sees all there is.
        """
        import torch

        module, length = self._live(), x.shape[1]
        if length == 1 or not module.is_causal:
            return None
        static = getattr(cache, "is_compileable", False)
        width = int(cache.get_mask_sizes(length, module.layer_idx)[0]) if static else length
        mask: Tensor = x.new_full((length, width), torch.finfo(x.dtype).min).triu(1)
        return mask[None, None]

    def _rotated_back(self, keys: Tensor) -> Tensor:
        """Keys (…, heads, n, head_dim) as n positions earlier."""
        import torch

        turn = torch.tensor(self.frequencies, dtype=torch.float64, device=keys.device) * keys.shape[-2]
        cos, sin = turn.cos().to(keys.dtype), turn.sin().to(keys.dtype)  # (head_dim / 2,)
        a, b = keys.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class _Front:
    """A cache that has a prefix in front of what it gives, and nowhere else; there need be none behind it."""

    def __init__(self, keys: Tensor, values: Tensor, cache: Any) -> None:
        self.keys, self.values, self.cache = keys, values, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        import torch

        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        batch = (keys.shape[0], -1, -1, -1)  # (batch, heads, length, head_dim)
        return (
            torch.cat([self.keys.to(keys.dtype).expand(batch), keys], dim=2),
            torch.cat([self.values.to(values.dtype).expand(batch), values], dim=2),
        )


def _heads(rows: Tensor, size: int) -> Tensor:
    """(…, n, width) as (…, heads, n, size)."""
    return rows.reshape(*rows.shape[:-1], -1, size).transpose(-3, -2)


def _frequencies(name: str, module: nn.Module) -> tuple[float, ...]:
    """As the model computes them from its config. Raises `ConfigError` where that is not known."""
    import torch

    config: Any = module.config
    rope = getattr(config, "rope_parameters", None) or {}
    kind, size = rope.get("rope_type"), int(module.head_dim)  # type: ignore[arg-type]
    found: Tensor
    if kind == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0:
        found = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size))
    elif kind in SCALED:
        # The module can only be there if transformers was imported; we never import it.
        found, _ = sys.modules["transformers.modeling_rope_utils"].ROPE_INIT_FUNCTIONS[kind](config)
    else:
        found = torch.empty(0)
    if len(found) != size // 2:
        what = f"rotates positions with frequencies that are not known (rope_type {kind!r})"
        raise ConfigError(what, where=name, fix="leave it out")
    return tuple(found.double().tolist())


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [AttentionSite]
