"""Linear layers whose weight is stored in four bits: bitsandbytes' `Linear4bit` (QLoRA, Dettmers et al. 2023, §3).

A weight is a code of four bits, one of 16 values, times the largest absolute value of its block of 64; those are
themselves stored in eight bits (double quantisation) or as they are.

On processors with AVX512-BF16 bitsandbytes rearranges a layer when it is called in eval mode without gradients. Its own
dequantisation then gives garbage, and its next call passes no gradient on to its input, without a word. So `weight`
knows both arrangements, and the layers of an adapted model are not rearranged.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NotMergeable
from ..hookspecs import hookimpl
from . import Site
from .linear import LinearSite

ROWS = 32  # that the rearrangement for AVX512-BF16 takes together
FAST = "support_avx512bf16_for_cpu"  # bitsandbytes' flag of a layer: whether it may be rearranged


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
        """Undo the rearrangement if the layer was called before, and have it never done again."""
        state = _state(module)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # bitsandbytes' own way back
        if getattr(module, FAST, False):
            setattr(module, FAST, False)
            module.__dict__["_was_fast"] = True

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        if module.__dict__.pop("_was_fast", False):
            setattr(module, FAST, True)

    @classmethod
    def stored(cls, module: nn.Module) -> tuple[int, int]:
        state, weight = _state(module), module.get_parameter("weight")
        parts = [weight, state.absmax]
        if state.nested:
            parts += [state.state2.absmax, state.offset]
        return state.shape.numel(), sum(t.numel() * t.element_size() for t in parts)

    @property
    def like(self) -> Tensor:
        module = self._live()
        dtype = getattr(module, "compute_dtype", None) or _state(module).dtype
        return torch.empty(0, dtype=dtype, device=module.get_parameter("weight").device)

    @property
    def weight(self) -> Tensor:
        module = self._live()
        state = _state(module)
        packed = module.get_parameter("weight").detach().view(torch.uint8).flatten()  # two codes in each byte
        out, into = state.shape
        absmax = state.absmax  # one for each block
        if getattr(state, "packing_format_for_cpu", False):  # rows lie in groups of ROWS, and a byte has codes of two
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

    def fold(self, matrix: Tensor) -> Tensor:
        raise NotMergeable("four bits hold no sum", where=self.name, fix="merge into the full-precision base instead")

    def stand_in(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        out, into = self.shape
        layer = nn.Linear(into, out, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.float(), requires_grad=False)
        return layer.train(self._live().training)


def _state(module: nn.Module) -> Any:
    """What bitsandbytes knows of the weight; None before it is quantised."""
    return getattr(module.get_parameter("weight"), "quant_state", None)


@hookimpl
def site_kinds() -> list[type[Site]]:
    return [QuantisedLinearSite]
