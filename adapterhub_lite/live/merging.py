"""Folding the active adapters into a live model's weights, and back: the saved tensors are put in place again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import rounding
from ..errors import NotMergeable
from ..protocol import Params
from ..site import Site
from .batches import Batch
from .program import Added, Fused, Leaf, Program, Routed
from .tree import SLOT, Part, Slot, base_modules, slots


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
        if slot.program is not None:
            site = slot.site
            matrices = _matrices(site, slot.program)
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
        slot.program = None
    for slot, layer in stand_ins:
        slot.__dict__["replaced"] = _swap(model, slot, layer)
        layer.add_module(SLOT, slot)
        slot.program = None


def _swap(model: nn.Module, slot: Slot, layer: nn.Module) -> nn.Module:
    """Put `layer` where the slot's own layer is, or stood; what was there."""
    parent, _, own = slot.site.name.rpartition(".")
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


class Affine(NamedTuple):
    """A layer's matrix (out, in) and bias (out,), before rounding."""

    W: Tensor
    b: Tensor | None

    def plus(self, weight: float, new: Affine, old: Affine) -> Affine:
        """With w (new − old) more."""
        if new.b is old.b or new.b is None:
            return Affine(self.W + weight * (new.W - old.W), self.b)
        zero = new.W.new_zeros(len(new.W))
        mine, former = (zero if b is None else b for b in (self.b, old.b))
        return Affine(self.W + weight * (new.W - old.W), mine + weight * (new.b - former))


def _matrices(site: Site, program: Program) -> dict[str, Tensor]:
    """Weight (out, in) and bias (out,) of the plain layer, before rounding; only what changes."""
    dtype = torch.float32 if site.weight.device.type == "mps" else torch.float64  # which has none
    base = Affine(site.weight.to(dtype), None if site.bias is None else site.bias.to(dtype))
    W, b = _folded(program, base, base)
    return {"weight": W} if b is base.b or b is None else {"weight": W, "bias": b}


def _folded(program: Program, v: Affine, base: Affine) -> Affine:
    """What the program makes of the layer v: as `run`, with layers in the place of outputs."""
    if isinstance(program, Leaf):
        return _adapted(program, v, base)
    if isinstance(program, Added):
        total = v
        for weight, own in program.terms:
            if not isinstance(weight, float):
                raise _gated(weight.site, weight.gate.name)
            total = total.plus(weight, _folded(own, v, base), v)
        return total
    if isinstance(program, Routed) and (g := program.gate.fixed()) is not None:
        total = v
        for i, own in program.ways:
            total = total.plus(g[i], _folded(own, v, base), v)
        return total
    if isinstance(program, (Routed, Fused)):
        raise _gated(program.gate.site, program.gate.gate.name)
    if isinstance(program, Batch):
        what = "each row of the batch has a composition of its own, and the weight is one"
        raise NotMergeable(what, where=program.site.name, fix="activate the composition of one row")
    for own in program.links:
        v = _folded(own, v, base)
    return v


def _adapted(leaf: Leaf, v: Affine, base: Affine) -> Affine:
    part = leaf.part
    method, p = part.method, _promoted(part, v.W.dtype)
    if v is base:
        return Affine(*method.merge(p, v.W, v.b, part.site))
    if method.reads_weight:
        raise NotMergeable(
            f"what a {method.name!r} adapter adds depends on the weight, and in a chain it comes behind another one",
            where=part.site.name,
            fix="let it come first, or leave the chain unmerged",
        )
    return Affine(*method.merge(p, v.W, v.b, part.site))


def _gated(site: Site, name: str) -> NotMergeable:
    what = f"the gate {name!r} weighs by the input, which no weight can stand for"
    return NotMergeable(what, where=site.name, fix="leave the composition unmerged")


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
