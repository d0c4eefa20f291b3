"""Gates at one site: what weighs an adapter by what the layer is given, or by what it gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import algebra, compose
from ..errors import AdapterError, ConfigError, PluginError
from ..seed import generator

if TYPE_CHECKING:
    from ..compose import Gate
    from ..delta import Delta
    from ..routing import Router
    from ..site import Site
    from .tree import Slot

STD = 0.02  # of W at the start, as in the papers that have gates
OFF_DIAGONAL, PULL = 1e-6, 0.01  # of V at the start, and how it is kept there: as in AdapterHub's library


class GatePart(nn.Module):
    """The tensors of a gate at one site."""

    learns: tuple[str, ...] = ()  # names of the tensors that are trained as the gate is on now

    def __init__(self, gate: Gate, site: Site) -> None:
        super().__init__()
        self.gate, self.site = gate, site
        self.width = site.shape[1] if gate.fixed else site.width(gate.reads)

    def place(self, name: str, tensor: Tensor) -> None:
        """A copy of `tensor` as a parameter, on the layer's device and in an adapter's dtype for it."""
        like = self.site.like
        own = tensor.detach().to(like.device, torch.promote_types(like.dtype, torch.float32), copy=True)
        self.register_parameter(name, nn.Parameter(own.contiguous(), requires_grad=False))

    def learn(self, ways: Collection[int | None]) -> None:
        """Let those tensors be trained that are when these ways are on alone; None is the gate as a whole."""
        self.learns = tuple(self.learned(ways))
        for name, p in self.named_parameters():
            p.requires_grad_(name in self.learns)

    def weights(self, x: Tensor, v: Tensor, way: int | None = None) -> Tensor:
        """For an input x (batch, …, width) and an output v: (batch, …, outputs), or (batch, 1…, outputs) by sample.

        With `way`, of that way alone: (…, 1).
        """
        h = x if self.gate.reads == "input" else v
        self.check(h)
        g = self.by_token(h.to(next(self.parameters()).dtype), way)
        if self.gate.per == "token" or g.ndim < 3:
            return g
        return g.mean(dim=tuple(range(1, g.ndim - 1)), keepdim=True)

    def check(self, h: Tensor) -> None:
        """Raise for what it cannot read."""
        if not h.is_floating_point() or h.shape[-1] != self.width:
            raise AdapterError(
                f"the gate {self.gate.name!r} gets a tensor {list(h.shape)} of {h.dtype}, and was made for the width "
                f"{self.width}",
                where=self.site.name,
                fix='make one that reads the other end, reads="output" or "input"',
            )

    def fixed(self) -> list[float] | None:
        """The weights of all ways, of a router that has the same for every input; else None."""
        return None

    def of_samples(self, x: Tensor) -> Tensor:
        """One weight for each sample (batch,), of a gate by sample with one output."""
        return self.weights(x, x).flatten()

    def by_token(self, h: Tensor, way: int | None) -> Tensor:
        """For h (…, width) in the gate's dtype: (…, outputs)."""
        raise NotImplementedError

    def learned(self, ways: Collection[int | None]) -> Collection[str]:
        """The names of the tensors that `learn` is to train."""
        raise NotImplementedError


class Net(GatePart):
    """σ(W h + b), or a softmax: W (outputs, width) and b (outputs,)."""

    def __init__(self, gate: Gate, site: Site, seed: int) -> None:
        super().__init__(gate, site)
        rng = generator(seed, f"{site.name}:{gate.name}")
        self.place("W", STD * torch.randn(gate.outputs, self.width, generator=rng))
        self.place("b", torch.zeros(gate.outputs))

    W: nn.Parameter
    b: nn.Parameter

    def by_token(self, h: Tensor, way: int | None) -> Tensor:
        z = F.linear(h, self.W, self.b)
        return z.sigmoid() if len(self.b) == 1 else z.softmax(-1)

    def learned(self, ways: Collection[int | None]) -> Collection[str]:
        return ("W", "b") if ways else ()


class Routing(GatePart):
    """What a plugin's router has for each way; its tensor v of the way 2 is called v_2."""

    def __init__(self, gate: Gate, site: Site, seed: int, deltas: Sequence[Delta]) -> None:
        super().__init__(gate, site)
        assert gate.by is not None
        self.router, self.names, self.trained = gate.by, list[dict[str, str]](), set[str]()
        for i, delta in enumerate(deltas):
            rng = generator(seed, f"{site.name}:{gate.name}:{i}")
            made = self.router.init(delta, self.width, rng)
            if not made:
                what = f"init() of router {self.router.name!r} gives a way no tensor, which is what files know it by"
                raise PluginError(what, where=site.name, fix="give one, of a zero say")
            self.names.append({key: f"{key}_{i}" for key in made})
            for key, t in made.items():
                self.place(f"{key}_{i}", t)
                if isinstance(t, nn.Parameter):
                    self.trained.add(f"{key}_{i}")

    def weights(self, x: Tensor, v: Tensor, way: int | None = None) -> Tensor:
        if self.gate.fixed and way is None:  # whatever x is: tokens, or an image
            return self.router.fixed(self.ways())  # (ways,)
        return super().weights(x, v, way)

    def ways(self) -> list[dict[str, Tensor]]:
        """Each way's tensors."""
        own: Any = self._parameters
        return [{key: own[name] for key, name in names.items()} for names in self.names]

    def by_token(self, h: Tensor, way: int | None) -> Tensor:
        ways = self.ways()
        return self.router.weights(ways, h) if way is None else self.router.alone(ways[way], h)

    def fixed(self) -> list[float] | None:
        return fixed(self.router, self.ways()) if self.gate.fixed else None

    def learned(self, ways: Collection[int | None]) -> Collection[str]:
        one_by_one = self.router.defines("alone")
        on = {i for i in ways if i is not None} if one_by_one else range(len(self.names)) if ways else ()
        return [name for i in on for name in self.names[i].values() if name in self.trained]


class Fusion(GatePart):
    """AdapterFusion's Q, K and V (width, width) and q (width,). The key's bias would be the same for all ways."""

    def __init__(self, gate: Gate, site: Site, seed: int) -> None:
        super().__init__(gate, site)
        rng = generator(seed, f"{site.name}:{gate.name}")
        for name in "QK":
            self.place(name, STD * torch.randn(self.width, self.width, generator=rng))
        self.place("q", torch.zeros(self.width))
        self.place("V", torch.full((self.width, self.width), OFF_DIAGONAL).fill_diagonal_(1.0))

    Q: nn.Parameter
    K: nn.Parameter
    q: nn.Parameter
    V: nn.Parameter

    def fused(self, v: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """V Σ aᵢ uᵢ for an output v (…, width) and what each way adds to it, (…, width) each."""
        self.check(v)
        asked = F.linear(v.to(self.Q.dtype), self.Q, self.q) @ self.K  # (…, width): its product with uᵢ is q · K uᵢ
        a = torch.stack([(asked * u).sum(-1) for u in changes], dim=-1).softmax(-1)  # (…, ways)
        return F.linear(sum((a[..., i : i + 1] * u for i, u in enumerate(changes)), torch.zeros_like(asked)), self.V)

    def penalty(self) -> Tensor:
        """0.01 ‖I − V‖²."""
        return PULL * (torch.eye(self.width, device=self.V.device, dtype=self.V.dtype) - self.V).square().sum()

    def learned(self, ways: Collection[int | None]) -> Collection[str]:
        return ("Q", "K", "q", "V") if ways else ()


class OneWay(NamedTuple):
    """One way of a router by itself."""

    part: GatePart
    way: int

    @property
    def gate(self) -> Gate:
        return self.part.gate

    @property
    def site(self) -> Site:
        return self.part.site

    def weights(self, x: Tensor, v: Tensor) -> Tensor:
        return self.part.weights(x, v, self.way)


def gate_part(gate: Gate, site: Site, seed: int, deltas: Sequence[Delta] | None = None) -> GatePart:
    """A gate's tensors at a site as they begin; `deltas` are what the ways of a router add to the weight there."""
    if gate.fuses:
        return Fusion(gate, site, seed)
    if gate.by is None:
        return Net(gate, site, seed)
    if deltas is None:
        deltas = [algebra.nothing(site.shape)] * gate.outputs
    return Routing(gate, site, seed, deltas)


def _fixed(gate: GatePart | None) -> list[float] | None:
    return None if gate is None else gate.fixed()


@torch.no_grad()
def fixed(router: Router, ways: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """The weights of all ways by a router that has the same for every input, in float64."""
    found: list[float] = router.fixed([{key: t.detach().double() for key, t in way.items()} for way in ways]).tolist()
    return found


def deltas(gate: Gate, ways: Sequence[compose.Node], slot: Slot) -> list[Delta] | None:
    """What each way adds to the weight at a site, where the gate's router looks at that."""
    if gate.by is None or not gate.by.reads_delta:
        return None
    parts, gates, site = slot.parts, slot.gates, slot.site
    found = []
    for way in ways:
        terms = []
        here = compose.reduced(way, parts)
        for name, weight in compose.lowered(here, lambda own: _fixed(gates.get(own.name))).items():
            part = parts[name]
            if weight == 0:
                continue
            if part.method.reads_weight or not part.method.defines("delta"):
                raise ConfigError(
                    f"router {gate.by.name!r} looks at ΔW, and that of {name!r} (method {part.method.name!r}) is none "
                    "by itself",
                    where=site.name,
                    fix="route among adapters with a ΔW of their own, or use another router",
                )
            terms.append(part.method.delta(part.params(), site).scaled(weight))
        found.append(algebra.total(terms) if terms else algebra.nothing(site.shape))
    return found
