"""Linear layers whose weight is stored in four bits: bitsandbytes' `Linear4bit` (QLoRA, Dettmers et al. 2023, §3).

A weight is a code of four bits, one of 16 values, times the largest absolute value of its block of 64; those are
themselves stored in eight bits (double quantisation) or as they are.

On processors with AVX512-BF16 bitsandbytes rearranges a layer when it is called in eval mode without gradients. From
then on its own dequantisation gives garbage, no gradient passes through the layer, without a word, and `state_dict`
rounds its scales anew. So `weight` knows both arrangements, and in an adapted model what was there is kept, and put
back where gradients or the state are asked for.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, NotMergeable
from ..hookspecs import hookimpl
from . import Site
from .linear import LinearSite

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = 32  # that the rearrangement for AVX512-BF16 takes together
PACKED = "packing_format_for_cpu"  # bitsandbytes' mark of the other arrangement
KEPT = "adapters_kept"  # ours: the codes and the state from before
GUARDS = "_adapters_guards"  # ours, of the layer: hooks to be removed


class QuantisedLinearSite(LinearSite):
    """The matrix form is the dequantised weight, (out, in), in float32."""

    kind = "quantised_linear"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        # The class can only be there if bitsandbytes was imported; we never import it.
        bitsandbytes = sys.modules.get("bitsandbytes")
        return bitsandbytes is not None and type(module).forward is bitsandbytes.nn.Linear4bit.forward

    @classmethod
    def check(cls, name: str, module: nn.Module) -> None:
        super().check(name, module)
        state = _state(module)
        if state is None:
            raise ConfigError(
                "the weight has not been quantised yet", where=name, fix="move the model to its device first"
            )
        if not getattr(state, PACKED, False) and state.absmax.ndim != 1:
            raise ConfigError(
                "bitsandbytes mixed up its scales when state_dict() was called after an evaluation",
                where=name,
                fix="load the model again, and adapt it before it is evaluated",
            )
        if module.get_parameter("weight").device.type == "cpu" and state.shape[1] % state.blocksize:
            raise ConfigError(
                f"bitsandbytes computes wrong outputs on the CPU where the inputs, here {state.shape[1]}, are no "
                f"multiple of a block's {state.blocksize}",
                where=name,
                fix="leave the layer unquantised, or use a GPU",
            )

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Site:
        return cls(name, tuple(_state(module).shape), module)

    @classmethod
    def enter(cls, module: nn.Module) -> None:
        module.__dict__[GUARDS] = (
            module.register_forward_pre_hook(_before_forward, with_kwargs=True),
            module.register_state_dict_pre_hook(_before_state_dict),
        )

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        for guard in module.__dict__.pop(GUARDS, ()):
            guard.remove()
        _before_state_dict(module)

    @classmethod
    def stored(cls, module: nn.Module) -> tuple[int, int]:
        codes, state = _kept(module)
        parts = [codes, state.absmax]
        if state.nested:
            parts += [state.state2.absmax, state.offset]
        return state.shape.numel(), sum(t.numel() * t.element_size() for t in parts)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        state = _state(self._live())
        codes, kept = getattr(state, KEPT, (None, state))
        parts = [codes, kept.absmax, kept.code]
        if kept.nested:
            parts += [kept.state2.absmax, kept.state2.code, kept.offset]
        return (*super().sources, *(t for t in parts if t is not None))

    @property
    def like(self) -> Tensor:
        import torch

        module = self._live()
        dtype = getattr(module, "compute_dtype", None) or _state(module).dtype
        return torch.empty(0, dtype=dtype, device=module.get_parameter("weight").device)

    @property
    def weight(self) -> Tensor:
        import torch

        data, state = _kept(self._live())
        packed = data.detach().view(torch.uint8).flatten()  # two codes in each byte
        out, into = state.shape
        absmax = state.absmax  # one for each block
        if getattr(state, PACKED, False):  # rows lie in groups of ROWS, and a byte has codes of two
            codes = torch.cat([c.reshape(-1, ROWS) for c in (packed & 15, packed >> 4)], dim=1)  # (…, 2 · ROWS)
            codes = codes.reshape(out // ROWS, into // 2, ROWS, 2).transpose(1, 2)
            absmax = absmax.mT  # (out, blocks of a row), in bfloat16
        else:
            codes = torch.stack([packed >> 4, packed & 15], dim=-1)
            if state.nested:
                second = state.state2
                scales = second.absmax.repeat_interleave(second.blocksize)[: absmax.numel()]
                absmax = second.code[absmax.long()] * scales + state.offset
        values = state.code.float()[codes.reshape(-1).long()][: out * into]
        blocks = absmax.float().reshape(-1).repeat_interleave(state.blocksize)[: out * into]
        weight: Tensor = (values * blocks).reshape(out, into)
        return weight

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        _before_forward(self._live(), args, dict(kwargs))
        return super().call(args, kwargs)

    def fold(self, matrix: Tensor) -> Tensor:
        raise NotMergeable("four bits hold no sum", where=self.name, fix="merge into the full-precision base instead")

    def stand_in(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        from torch import nn

        out, into = self.shape
        layer = nn.Linear(into, out, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.float(), requires_grad=False)
        return layer.train(self._live().training)


def _state(module: Any) -> Any:
    """What bitsandbytes knows of the weight; None before it is quantised."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _kept(module: Any) -> tuple[Tensor, Any]:
    """The codes and the state as they were quantised, if they were kept; else those that there are."""
    state = _state(module)
    if not hasattr(state, KEPT):
        return module.weight.data, state
    codes, kept = getattr(state, KEPT)
    kept.to(module.weight.device)
    return codes.to(module.weight.device), kept


def _before_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep what a call would rearrange, and put it back before one that gradients are to pass through."""
    import torch

    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    state = _state(module)
    if getattr(state, PACKED, False):
        if module.training or (torch.is_grad_enabled() and x.requires_grad):
            _put_back(module)
    elif state is not None and not module.training and not x.requires_grad:
        # It writes into the state, which a backward pass that is yet to come may need as it is.
        vars(state).pop(KEPT, None)
        other = copy.copy(state)
        setattr(other, KEPT, (module.weight.data, state))
        module.weight.quant_state = module.quant_state = other


def _before_state_dict(module: Any, *_: Any) -> None:
    if hasattr(_state(module), KEPT):
        _put_back(module)


def _put_back(module: Any) -> None:
    """The first arrangement again."""
    codes, state = _kept(module)
    if getattr(state, PACKED, False):  # since before there were adapters: the scales stay as they were rounded then
        state = copy.copy(state)
        state.original_nested = False
        absmax = state.absmax.mT.reshape(-1).float()  # one for each block
        codes, state = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = absmax
    module.weight.data, module.weight.quant_state, module.quant_state = codes, state, state


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [QuantisedLinearSite]
