"""Folding the active adapters into a live model's weights, and back: the saved tensors are put in place again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import rounding
from ..errors import NotMergeable
from ..protocol import Params
from ..site import Site
from .tree import SLOT, Part, Slot, Step, base_modules, slots


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold what is on into the weights. Raises `NotMergeable`, and changes nothing, if one part cannot be."""
    owners: dict[int, list[str]] = {}
    for name, owner in base_modules(model):
        for parameter in owner._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    folds, stand_ins = [], list[tuple[Slot, nn.Module]]()
    for module, slot in slots(model):
        if slot.around is not None:
            part = slot.around.part
            raise NotMergeable(
                f"method {part.method.name!r} wraps the call of the layer, which no weight can stand for",
                where=part.site.name,
                fix="leave the adapter unmerged",
            )
        if slot.steps:
            site = slot.steps[0].part.site
            matrices = _matrices(site, slot.steps)
            stand_in = site.stand_in(matrices["weight"], matrices.get("bias", site.bias))
            if stand_in is not None:
                stand_ins.append((slot, stand_in))
                continue
            merged = {key: _rounded(site, module, key, m) for key, m in matrices.items()}
            for key in merged:
                others = [name for name in owners.get(id(module._parameters[key]), ()) if name != site.name]
                if others:
                    raise NotMergeable(
                        f"its {key} is also that of {others[0]!r}, which a merge would change too",
                        where=site.name,
                        fix="leave the adapter unmerged, or exclude the layer",
                    )
            folds.append((module, slot, merged))
    for module, slot, merged in folds:
        for key, new in merged.items():
            parameter = module._parameters[key]
            if parameter is None:
                slot.originals[key] = None
                module._parameters[key] = nn.Parameter(new, requires_grad=False)
            else:
                slot.originals[key] = parameter.data
                parameter.data = new
        slot.steps = ()
    for slot, layer in stand_ins:
        slot.__dict__["replaced"] = _swap(model, slot, layer)
        layer.add_module(SLOT, slot)
        slot.steps = ()


def _swap(model: nn.Module, slot: Slot, layer: nn.Module) -> nn.Module:
    """Put `layer` where the slot's own layer is, or stood; what was there."""
    parent, _, own = next(iter(slot.parts.values())).site.name.rpartition(".")
    holder = model.get_submodule(parent)
    former: nn.Module = holder.get_submodule(own)
    setattr(holder, own, layer)
    return former


def unmerge(model: nn.Module) -> None:
    """Put the original tensors back."""
    for module, slot in slots(model):
        for key, original in slot.originals.items():
            parameter = module._parameters[key]
            if original is None or parameter is None:
                module._parameters[key] = None
            else:  # the model may have been moved or cast in the meantime
                parameter.data = original.to(device=parameter.device, dtype=parameter.dtype)
        slot.originals = {}
        if slot.replaced is not None:
            _swap(model, slot, slot.replaced.train(module.training))
            slot.__dict__["replaced"] = None


def _matrices(site: Site, steps: Sequence[Step]) -> dict[str, Tensor]:
    """Weight (out, in) and bias (out,) of the plain layer, before rounding; only what changes.

    For weights w the merged one is W + Σ wᵢ (Wᵢ − W).
    """
    dtype = torch.float32 if site.weight.device.type == "mps" else torch.float64  # which has none
    W, b = site.weight.to(dtype), None if site.bias is None else site.bias.to(dtype)
    zero = W.new_zeros(len(W)) if b is None else b
    new_W, new_b = W, b
    for part, weight in steps:
        W_i, b_i = part.method.merge(_promoted(part, dtype), W, b, site)
        new_W = W_i if len(steps) == 1 and weight == 1.0 else new_W + weight * (W_i - W)
        if b_i is not None and b_i is not b:
            new_b = (zero if new_b is None else new_b) + weight * (b_i - zero)
    return {"weight": new_W} if new_b is b or new_b is None else {"weight": new_W, "bias": new_b}


def _promoted(part: Part, dtype: torch.dtype) -> Params:
    return Params({k: t.detach().to(dtype) if t.is_floating_point() else t for k, t in part.params().items()})


def _rounded(site: Site, module: nn.Module, key: str, value: Tensor) -> Tensor:
    """The parameter `key` of the layer, from matrix form: laid out and in the dtype as it is now."""
    if key not in module._parameters:
        raise NotMergeable(f"the adapter changes its {key}, and a {site.kind} has none", where=site.name)
    old = module._parameters[key]  # None: a bias where there was none
    like = value.to(site.weight.dtype) if old is None else old.detach()
    rounded = rounding.nearest(value, like.dtype) if value.dtype == torch.float64 else value
    new = torch.empty_like(like).copy_(site.fold(rounded) if key == "weight" else rounded)
    if not new.isfinite().all():
        raise NotMergeable(f"the merged {key} is not finite in {new.dtype}", where=site.name, fix="use a wider dtype")
    return new
