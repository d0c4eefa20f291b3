"""What adapters on a model cost, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from .targets import kind_of
from .training import base_parameters, parts_of
from .tree import base_modules, slots, state_of

ADAM = 2  # moments that Adam keeps of each trained parameter


@dataclass(frozen=True)
class Summary:
    """Parameters and bytes. Bytes are those of the tensors, and of Adam's two moments in the same dtype."""

    base: int
    """Parameters of the base model; tied ones count once."""
    base_bytes: int
    trained: int
    """Parameters that get gradients: those of active adapters and gates, and what was unfrozen of the base."""
    trained_bytes: int
    frozen: int
    """Adapter parameters that are not trained now."""
    frozen_bytes: int
    adapted: int
    """Weights of the adapted layers, and all there is in adapted blocks: what fine-tuning of the same would train."""
    layers: int
    """The number of adapted layers."""
    quantised: int = 0
    """The base's numbers that are stored in fewer bits than their layers compute in; they are among `base`."""
    quantised_bytes: int = 0
    """What these take, scales of blocks included."""

    @property
    def percent(self) -> float:
        """Trained parameters, in percent of the base's."""
        return 100 * self.trained / self.base if self.base else 0.0

    @property
    def times_fewer(self) -> float:
        """How many times fewer are trained than in full fine-tuning of the adapted layers."""
        return self.adapted / self.trained if self.trained else float("inf")

    @property
    def quantised_bits(self) -> float:
        """Bits for each quantised number."""
        return 8 * self.quantised_bytes / self.quantised if self.quantised else 0.0

    @property
    def optimizer_bytes(self) -> int:
        """Adam's state for what is trained."""
        return ADAM * self.trained_bytes

    def __str__(self) -> str:
        rows = (
            ("base", self.base, self.base_bytes),
            ("trained", self.trained, self.trained_bytes),
            ("adapters, frozen", self.frozen, self.frozen_bytes),
        )
        lines = [f"{name:<17} {number:>15,} parameters {_size(nbytes):>10}" for name, number, nbytes in rows]
        lines.append(f"{'Adam state':<17} {'':>15} {'':>10} {_size(self.optimizer_bytes):>10}")
        if self.quantised:
            numbers = f"{'of it quantised':<17} {self.quantised:>15,} parameters {_size(self.quantised_bytes):>10}"
            bits, whole = self.quantised_bits, 8 * self.base_bytes / self.base
            lines.insert(1, numbers)
            lines.append(
                f"{bits:.3f} bits a quantised parameter, {1 - bits / 16:.1%} less than 16; "
                f"{whole:.2f} bits a parameter of the whole base"
            )
        lines.append(
            f"{self.percent:.4g} % of the base is trained; in the {self.layers} adapted layers "
            f"{self.times_fewer:,.0f} times fewer parameters than by full fine-tuning"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Count what is on `model`."""
    base = base_parameters(model)
    ours = {
        id(p): p
        for name in state_of(model).methods
        for part in parts_of(model, name)
        for holder in (part, part.common)
        if holder is not None
        for p in holder.parameters()
    }
    ours.update((id(p), p) for _, slot in slots(model) for gate in slot.gates.values() for p in gate.parameters())
    trained = [p for p in (*base, *ours.values()) if p.requires_grad]
    frozen = [p for p in ours.values() if not p.requires_grad]
    weights = {id(w): w for module, _ in slots(model) for w in _weights(module) if id(w) not in ours}
    packed = _packed(model)
    quantised, quantised_bytes = (sum(column) for column in zip((0, 0), *packed.values(), strict=True))
    plain = [p for p in base if id(p) not in packed]
    return Summary(
        base=_count(plain) + quantised,
        base_bytes=_bytes(plain) + quantised_bytes,
        trained=_count(trained),
        trained_bytes=_bytes(trained),
        frozen=_count(frozen),
        frozen_bytes=_bytes(frozen),
        adapted=sum(packed[key][0] if key in packed else w.numel() for key, w in weights.items()),
        layers=len(slots(model)),
        quantised=quantised,
        quantised_bytes=quantised_bytes,
    )


def _packed(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Numbers and bytes of the weights whose parameter does not tell them, by that parameter's id."""
    found = {}
    for _, module in base_modules(model):
        kind = kind_of(module)
        stored = None if kind is None else kind.stored(module)
        if stored is not None:
            found[id(module.get_parameter("weight"))] = stored
    return found


def _weights(module: nn.Module) -> Iterable[Tensor]:
    weight = module._parameters.get("weight")
    return module.parameters() if weight is None else (weight,)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(nbytes: float) -> str:
    """Powers of ten, as disks and the Hub count."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while nbytes >= 1000 and unit != "TB":
        nbytes, unit = nbytes / 1000, next(units)
    return f"{nbytes:.4g} {unit}"
