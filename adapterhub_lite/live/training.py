"""What methods have to say while adapters are trained: optimizer groups, step rules and penalties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import compose
from ..errors import ConfigError, PluginError
from .gating import Fusion
from .tree import Part, base_modules, slots, state_of

Rule = Literal["before_step", "after_step"]


def param_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The groups of the active adapters, as their methods say, of the gates, and of what was unfrozen of the base."""
    groups: list[dict[str, Any]] = []
    state = state_of(model)
    for name in state.active if state.trains == "all" else ():
        method, params = state_of(model).methods[name], dict[str, list[nn.Parameter]]()
        for part in parts_of(model, name):
            for tensor in part.trained:
                params.setdefault(tensor, []).append(part.get_parameter(tensor))
        own = [{**group, "params": list(group["params"])} for group in method.groups(params, lr)]
        given = sorted(id(p) for group in own for p in group["params"])
        if given != sorted(id(p) for ps in params.values() for p in ps):
            raise PluginError(f"groups() of method {method.name!r} does not give each parameter exactly once")
        groups += [group for group in own if group["params"]]
    on = {gate.name for gate in compose.gates(state.composition)}
    parts = [gate for _, slot in slots(model) for name, gate in slot.gates.items() if name in on]
    gates = [gate.get_parameter(tensor) for gate in parts for tensor in gate.learns]
    groups += [{"params": gates, "lr": lr}] if gates else []
    if not groups:
        raise ConfigError("nothing that is active can be trained", fix="activate an adapter, or a gate")
    unfrozen = {id(p): p for p in base_parameters(model) if p.requires_grad}
    return [*groups, {"params": list(unfrozen.values()), "lr": lr}] if unfrozen else groups


def register(model: nn.Module, optimizer: Any) -> list[RemovableHandle]:
    """Run the step rules of `model`'s active adapters whenever `optimizer` makes a step."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner  # a wrapper, accelerate's say, has no hooks of its own
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{type(optimizer).__name__} is no torch optimizer", fix="give the one that makes steps")
    parts = [part for name in state_of(model).methods for part in parts_of(model, name)]
    own = _parameters(optimizer)
    if not any(id(p) in own for part in parts for p in _trained(part)):
        raise ConfigError("the optimizer has no parameter of an adapter", fix="make it from adapters.param_groups(lr)")

    def run(rule: Rule) -> Any:
        return lambda optimizer, args, kwargs: _run(model, optimizer, rule)

    return [
        optimizer.register_step_pre_hook(run("before_step")),
        optimizer.register_step_post_hook(run("after_step")),
    ]


@torch.no_grad()
def _run(model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule) -> None:
    # A GradScaler leaves it to fused optimizers to skip a step with infinite gradients: hooks run all the same.
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return
    own: set[int] | None = None
    for name in state_of(model).active:
        if not state_of(model).methods[name].defines(rule):
            continue
        own = own or _parameters(optimizer)
        for part in parts_of(model, name):
            if any(id(p) in own for p in _trained(part)):  # one optimizer may have some adapters, another the rest
                getattr(part.method, rule)(part.params(), part.site, optimizer)


def penalty(model: nn.Module) -> Tensor:
    """The sum of what the methods of the active adapters, and fusions that are on, add to the loss."""
    found = [
        term
        for name in state_of(model).active
        if state_of(model).methods[name].defines("penalty")
        for part in parts_of(model, name)
        if (term := part.method.penalty(part.params(), part.site)) is not None
    ]
    on = {gate.name for gate in compose.gates(state_of(model).composition)}
    fusions = (own for _, slot in slots(model) for name, own in slot.gates.items() if name in on)
    found += [own.penalty() for own in fusions if isinstance(own, Fusion)]
    return torch.stack([term.float() for term in found]).sum() if found else torch.zeros(())


def parts_of(model: nn.Module, name: str) -> list[Part]:
    """Adapter `name`, site by site."""
    return [slot.parts[name] for _, slot in slots(model) if name in slot.parts]


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The base's own parameters, each once."""
    found = {id(p): p for _, module in base_modules(model) for p in module.parameters(recurse=False)}
    return list(found.values())


def _trained(part: Part) -> Iterable[nn.Parameter]:
    return (part.get_parameter(name) for name in part.trained)


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
