"""What is on, put into every layer's slot: its program, and what is trained."""

from __future__ import annotations

from torch import nn

from .. import compose
from .batches import Plans, batch
from .program import program, refuse, wrapping
from .tree import Around, slots, state_of


def switch(model: nn.Module) -> None:
    """Let every layer compute the composition that the model's state has, and train what that says."""
    state = state_of(model)
    on = state.active if state.trains == "all" else ()
    gates = compose.ways(state.composition)
    plans: Plans = {}
    for _, slot in slots(model):
        parts, own_gates = slot.parts, slot.gates
        node = compose.reduced(state.composition, parts)
        slot.program, slot.around = None, None
        if wrapping(node, parts):
            (name,), gated = compose.names(node), compose.gates(node)
            slot.around = Around(parts[name], own_gates[gated[0].name] if gated else None)
        elif isinstance(node, compose.Rows):
            slot.program = batch(node, parts, own_gates, plans)
        elif not isinstance(node, compose.Base):
            slot.program = program(node, parts, own_gates)
        for name, part in parts.items():
            for tensor in part.trained:
                part.get_parameter(tensor).requires_grad_(name in on)
        for name, gate in own_gates.items():
            gate.learn(gates.get(name, ()))


def check(model: nn.Module, composition: compose.Node) -> None:
    """Raise `ConfigError` for what cannot be computed at some layer."""
    for _, slot in slots(model):
        parts = slot.parts
        refuse(compose.reduced(composition, parts), parts, slot.gates)
