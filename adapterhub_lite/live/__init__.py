"""Adapters on a live torch model: added in place, switched, merged, saved, removed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import compose
from ..adapter import Adapter, load
from ..compose import Composition, Fuse, Gate, Node, Route
from ..errors import AdapterError, ConfigError, UnknownName, nearest
from ..hub.pull import ADAPTER, snapshot
from ..protocol import Method
from ..routing import Router
from ..seed import generator
from ..sharding import sharded
from ..site import Site
from ..source import read as read_tensor
from . import folder
from .batches import Plans, batch
from .files import check_base, held, read
from .gating import deltas, gate_part
from .kept import Kept
from .merging import merge, unmerge
from .program import program, refuse, wrapping
from .summary import Summary, summary
from .swapping import reserved, swap
from .targets import select
from .training import param_groups, parts_of, penalty, register
from .tree import (
    STATE,
    Around,
    Common,
    Commons,
    Part,
    Slot,
    State,
    attach,
    common_of,
    detach,
    freeze,
    settle,
    share,
    slots,
    state_of,
    thaw,
    trained,
    unshare,
)

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..save import RelativeError


def adapt(model: nn.Module) -> Adapters:
    """A handle on the adapters of `model`, which is frozen by it: from now on adapters are what is trained.

    What was trainable is remembered, and is so again when the last adapter is removed. Called once more, it gives
    another handle on the same adapters; called on a copy of the model, one on the copy's.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> adapt(model)
    <Adapters on Sequential: none>
    >>> [p.requires_grad for p in model.parameters()]
    [False, False]
    """
    freeze(model)
    return Adapters(model)


class Adapters:
    """The adapters of one model. Holds nothing but the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters on the model, in the order they came."""
        return tuple(self._state.methods)

    @property
    def active(self) -> dict[str, float]:
        """Those that are on, with their weights; with 1 each in a composition that is more than a weighted sum."""
        return self._state.active

    @property
    def composition(self) -> Node:
        """What is on, as a tree."""
        return self._state.composition

    @property
    def gates(self) -> dict[str, Gate]:
        """All gates on the model, by name."""
        return dict(self._state.gates)

    def __repr__(self) -> str:
        names = ", ".join(f"{name} ({self.active[name]:g})" if name in self.active else name for name in self.names)
        return f"<Adapters on {type(self.model).__name__}: {names or 'none'}>"

    # Coming and going -------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        method: Method,
        targets: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
        *,
        exclude: str | Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """A new adapter `name` at the target layers. The first one on a model is active at once.

        A target is a module's name, the end of one ("q_proj", "mlp.up_proj"), a glob for either ("layers.1*.q_proj"),
        or "all-linear": all linear layers that `method` adapts, but for the output head; or "all": those of every
        kind, embeddings and norms too if it adapts them. A mapping gives targets options of their own,
        `{"all-linear": {}, "down_proj": {"rank": 4}}`; of two that name a layer the later one holds. `exclude` takes
        names and globs; what is inside of a module that it names is left out too. The tensors depend on `seed` and
        on each layer's name, and on nothing else.
        """
        self._refuse_merged("add an adapter")
        self._check_new(name)
        if not isinstance(method, Method):
            raise ConfigError(f"{method!r} is not a method with its options", fix="give one, say ah.LoRA(rank=8)")
        found = select(self.model, method, _words(targets), _words(exclude))
        if isinstance(targets, Mapping):
            method = method.having({site.name: _options(targets, named) for site, named in found.items()})
        sites = list(found)
        common = common_of(method.shared(sites), sites)
        parts = []
        for site in sites:
            here = method.at(site.name)
            tensors = here.init(site, generator(seed, site.name))
            parts.append(Part(here, site, tensors, trained(tensors), common))
        self._attach(name, method, parts, common)

    def load(self, ref: str | Path | Adapter, name: str, *, any_base: bool = False, reserve: int | None = None) -> None:
        """The adapter in the folder `ref`, or the value `ref`, as adapter `name`. The first on a model is active.

        Strict: each layer that it adapts must be there, of the same kind and shape, and hold the weights that it was
        trained on, as far as the file tells; `any_base` takes other weights. A sum is computed now, and its tensors
        are float32, or float64 where the weight is. With `reserve` a low-rank adapter is held as a LoRA of that rank,
        padded with zeros and with its scale in B: `hotswap` then takes any up to that rank.
        """
        self._refuse_merged("load an adapter")
        self._check_new(name)
        value = ref if isinstance(ref, Adapter) else load(ref)
        method, parts, common = read(self.model, value, ref, any_base=any_base)
        if reserve is not None:
            method, parts = reserved(parts, reserve)
            common = None
        self._attach(name, method, parts, common)

    def hotswap(self, name: str, ref: str | Path | Adapter, *, any_base: bool = False) -> None:
        """Put the tensors of the adapter in the folder `ref`, or of the value `ref`, in the place of those of `name`.

        They are copied into the same memory, and nothing that was compiled is compiled anew. Into a LoRA any low-rank
        change fits that is at no other layers and of no higher rank: smaller ones are padded with zeros, other scales
        multiplied into B. Of other methods only an adapter with the same options. Nothing is changed where one does
        not fit, and that is `ConfigError`.
        """
        self._refuse_merged("swap an adapter")
        self._known(name)
        value = ref if isinstance(ref, Adapter) else load(ref)
        swap(name, parts_of(self.model, name), read(self.model, value, ref, any_base=any_base)[1])

    def save(
        self, name: str, out: str | Path, *, dtype: torch.dtype | None = None, force: bool = False
    ) -> RelativeError:
        """Write adapter `name` to the folder `out`; `dtype`, `force` and the result are those of `Adapter.save`.

        With the layers at hand, the error of another `dtype` is that of ΔW for every method that can be merged.

        A sketch of the base goes with it, some of the values that it was trained on, so that it is not loaded on
        another model. On a sharded model every process must call it, for the tensors are gathered.
        """
        if self._known(name).reads_weight:
            self._refuse_merged(f"save {name!r}, whose method reads the weights,")
        return Adapter(((1.0, held(self.model, name)),)).save(out, dtype=dtype, force=force)

    def save_composition(self, out: str | Path, *, force: bool = False) -> None:
        """Write what is active to the folder `out`: the tree, the gates, and each adapter in it in a folder of its own.

        The folder appears whole or not at all; `force` replaces a composition that is there. On a sharded model every
        process must call it.
        """
        self._refuse_merged("save a composition")
        folder.save(self.model, Path(out), force=force)

    def load_composition(self, ref: str | Path, *, any_base: bool = False) -> Node:
        """Load the adapters and gates in a folder by `save_composition`, activate its tree, and return that.

        They keep their names, which the model must not have. Strict as `load` is, and nothing is changed if anything
        is wrong.
        """
        self._refuse_merged("load a composition")
        at = snapshot(ref, patterns=ADAPTER)
        saved = folder.read(at)
        names, gates = compose.names(saved.tree), compose.gates(saved.tree)
        for name in (*names, *(gate.name for gate in gates)):
            self._check_new(name)
        found = {}
        for name in names:
            own = at / folder.ADAPTERS / name
            found[name] = read(self.model, load(own), own, any_base=any_base)
        parts = [part for _, own_parts, _ in found.values() for part in own_parts]
        if not any_base:
            check_base(saved.base, {part.site.name: part.site for part in parts}, at)
        gating = folder.gate_parts(saved, parts, at, read_tensor)
        former, trains, frozen = self.composition, self._state.trains, STATE in self.model.__dict__
        try:
            for name, (method, own_parts, common) in found.items():
                self._attach(name, method, own_parts, common)
            here = {slot.site.name: slot for _, slot in slots(self.model)}
            for name, gate in gating:
                gate.learn(())
                here[gate.site.name].add_module(name, gate)
            self._state.gates.update((gate.name, gate) for gate in gates)
            self.activate(saved.tree)
        except AdapterError:
            self.activate(former, train=trains)
            for name in [*(gate.name for gate in gates), *names]:
                if name in self.names or name in self.gates:
                    self.remove(name)
            if frozen:
                freeze(self.model)
            raise
        return saved.tree

    def base_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict without what adapters put there, for `model.save_pretrained(out, state_dict=…)`.

        While adapters are merged it has the merged weights: the model that `merge` made.
        """
        names = {f"{name}." for name, module in self.model.named_modules() if isinstance(module, (Slot, Commons))}
        return {key: t for key, t in self.model.state_dict().items() if not key.startswith(tuple(names))}

    def add_gate(
        self,
        name: str,
        of: str | Sequence[str],
        *,
        per: Literal["sample", "token"] = "sample",
        reads: Literal["input", "output"] = "input",
        outputs: int = 1,
        seed: int = 0,
    ) -> Gate:
        """A new gate at every layer of the adapters `of`: a weight that is trained, for `gate * ah.use("a")`.

        It gives σ(W h + b), where h is the layer's input, or what comes out of it before the term (`reads`): for each
        token, or by default its mean over the tokens of a sample. With several `outputs`, a softmax, it is for
        `ah.route`. W begins small and random, by `seed` and the layer's name, b at zero. It is trained while it is on.
        """
        self._refuse_merged("add a gate")
        self._check_new(name)
        gate = Gate(name, per, reads, outputs)
        self._place(gate, _words(of), (), seed)
        return gate

    def add_router(
        self,
        name: str,
        router: Router,
        ways: Sequence[Composition],
        *,
        per: Literal["token", "sample"] = "token",
        seed: int = 0,
    ) -> Route:
        """A Route over `ways`, each an adapter or a composition, whose weights `router` gives at every layer of theirs.

        What it computes of the adapters it computes now: make it anew when they change. What it trains it trains while
        the Route is on, or with routers that have `Router.alone`, one way at a time: `route.alone(0)`. With
        `per="sample"` the weights are the mean over a sample's tokens.
        """
        self._refuse_merged("add a router")
        self._check_new(name)
        if not isinstance(router, Router):
            raise ConfigError(f"{router!r} is not a router with its options", fix='give one, say ah.router("arrow")')
        nodes = tuple(compose.tree(way) for way in ways)
        route = Route(Gate(name, per, "input", len(nodes), router), nodes)
        self._place(route.gate, compose.names(route), nodes, seed)
        return route

    def add_fusion(self, name: str, of: Sequence[Composition], *, seed: int = 0) -> Fuse:
        """AdapterFusion over the adapters or compositions `of`: attention from a layer's output over what each adds.

        Its tensors, at every layer of theirs, are trained while it is on; `activate(fuse, train="gates")` freezes the
        adapters, as the paper does, and `penalty` then has 0.01 ‖I − V‖² of each layer. At first the weights are nearly
        even, and V nearly the identity.
        """
        self._refuse_merged("add a fusion")
        self._check_new(name)
        nodes = tuple(compose.tree(own) for own in of)
        if any(not compose.names(own) for own in nodes):
            raise ConfigError("the base adds nothing that could be fused", where=name, fix="give adapters")
        fuse = Fuse(Gate(name, "token", "output", len(nodes), fuses=True), nodes)
        self._place(fuse.gate, compose.names(fuse), nodes, seed)
        return fuse

    def remove(self, name: str) -> None:
        """Take adapter or gate `name` off. Without adapters the model is as it was: hooks, names, what is trainable.

        A gate that is on cannot be removed.
        """
        self._refuse_merged("remove an adapter")
        state = self._state
        if name in state.gates:
            if state.gates[name] in compose.gates(state.composition):
                raise ConfigError(f"the gate {name!r} is on", fix="activate something else first")
        else:
            self._known(name)
            state.composition = _left(state.composition, state.methods.keys() - {name})
        for module, slot in slots(self.model):
            detach(module, slot, name)
        unshare(self.model, name)
        state.methods.pop(name, None)
        left = {own for _, slot in slots(self.model) for own in slot.gates}
        state.gates = {own: gate for own, gate in state.gates.items() if own in left}
        self._switch(state.composition)
        if not state.methods:
            thaw(self.model)

    # Switching ----------------------------------------------------------------------------------------

    def activate(self, which: Composition | Sequence[Composition], *, train: Literal["all", "gates"] = "all") -> None:
        """Switch to one adapter, to a weighted sum of several, to another composition, or to the base alone (None).

        Only what is active gets gradients. With weights w a layer gives y + Σ wᵢ (yᵢ − y), where y is the base's
        output and yᵢ that with the i-th adapter. A composition is a tree, `0.7 * ah.use("a") + ah.chain("b", "c")`;
        one that cannot be computed is refused now. A list gives each row of the batch a composition of its own. With
        `train="gates"` the adapters are frozen, and gates and routers alone are trained.
        """
        self._refuse_merged("activate another adapter")
        node = compose.tree(which)
        self._check(node)
        if train not in ("all", "gates"):
            raise ConfigError(f"train={train!r} is neither 'all' nor 'gates'")
        self._state.trains = train
        self._switch(node)

    @contextmanager
    def using(self, which: Composition | Sequence[Composition]) -> Iterator[Adapters]:
        """As `activate`, within a `with` statement; behind it the former adapters are active again."""
        former, trains = self.composition, self._state.trains
        self.activate(which)
        try:
            yield self
        finally:
            self.activate(_left(former, self.names), train=trains)

    @contextmanager
    def inference(self) -> Iterator[Adapters]:
        """Within a `with` statement, no gradients, and nothing is computed twice that tensors alone give.

        That is DoRA's m / ‖V‖, which costs more than a layer's call with one token. It is for tensors that do not
        change. A change that torch counts is noticed at the next call. One that it does not count (through `.data`, by
        a fused optimizer) is not: then outputs are wrong from there on, and the end, where each layer's values are
        computed once more, is an `AdapterError`. Compiled and sharded models, tensors made in `torch.inference_mode`,
        and what runs with gradients all the same compute as ever.

        >>> from adapterhub_lite.registry import registry
        >>> adapters = adapt(nn.Sequential(nn.Linear(6, 4)))
        >>> adapters.add("a", registry().method("dora")(rank=2), targets="0")
        >>> with adapters.inference():
        ...     y = adapters.model(torch.ones(1, 6))
        """
        parts = [] if sharded(self.model) else [part for _, slot in slots(self.model) for part in slot.parts.values()]
        kept, former = [Kept(part.site) for part in parts], [part.kept for part in parts]
        for part, own in zip(parts, kept, strict=True):
            part.kept = own
        try:
            with torch.no_grad():
                yield self
            for part, own in zip(parts, kept, strict=True):
                own.check(part.params())
        finally:
            for part, other in zip(parts, former, strict=True):
                part.kept = other

    def merge(self) -> None:
        """Fold the active adapters into the weights, which then need no hooks; `unmerge` undoes it bit for bit.

        The original weights stay in memory. Nothing is changed if a layer refuses (`NotMergeable`).
        """
        self._refuse_merged("merge again")
        if not self.active:
            raise ConfigError("no adapter is active, so there is nothing to merge", fix="activate one")
        merge(self.model)
        self._state.merged = True

    def unmerge(self) -> None:
        """Put the original weights back; the adapters are active as before."""
        if not self._state.merged:
            raise ConfigError("nothing is merged, so there is nothing to undo")
        unmerge(self.model)
        self._state.merged = False
        self._switch(self._state.composition)

    # Training ---------------------------------------------------------------------------------------------

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: every trained parameter of the active adapters once, as their methods say.

        Parameters of the base that were unfrozen after `adapt`, a new head say, are a last group with that `lr`.
        """
        return param_groups(self.model, lr)

    def register(self, optimizer: Any) -> list[RemovableHandle]:
        """Let the methods' step rules run with `optimizer`, once before and after each of its steps.

        They go through the optimizer's own hooks, so they hold in any training loop, with gradient accumulation and
        a GradScaler too: a step that is skipped for infinite gradients counts for nothing. Adapters that come later
        are included. Removing the handles ends it.
        """
        return register(self.model, optimizer)

    def penalty(self) -> Tensor:
        """What the active adapters' methods add to the loss, a scalar: 0 for most."""
        return penalty(self.model)

    def summary(self) -> Summary:
        """What is trained and what it costs, in numbers; printed, a small table.

        >>> from adapterhub_lite.registry import registry
        >>> layer = nn.Linear(200_000, 100_000, bias=False, device="meta")
        >>> layer.weight = nn.Parameter(torch.zeros(()).expand(100_000, 200_000))  # 20 billion numbers, 4 bytes
        >>> adapters = adapt(nn.Sequential(layer))
        >>> adapters.add("a", registry().method("lora")(rank=16), targets="0")
        >>> adapters.summary().trained, round(adapters.summary().times_fewer)
        (4800000, 4167)
        """
        return summary(self.model)

    # Inside -----------------------------------------------------------------------------------------------

    @property
    def _state(self) -> State:
        return state_of(self.model)

    def _attach(self, name: str, method: Method, parts: Sequence[Part], common: Common | None) -> None:
        state = freeze(self.model)
        if common is not None:
            share(self.model, name, common)
        for part in parts:
            attach(part, name)
        settle(self.model)
        state.methods[name] = method
        self._switch(state.composition if len(state.methods) > 1 else compose.use(name))

    def _place(self, gate: Gate, of: Sequence[str], ways: Sequence[Node], seed: int) -> None:
        """A gate at every layer of the adapters `of`, for these ways if it is a router's."""
        for own in of:
            self._known(own)
        here = [slot for _, slot in slots(self.model) if slot.parts.keys() & set(of)]
        made = [gate_part(gate, slot.site, seed, deltas(gate, ways, slot.parts, slot.site)) for slot in here]
        for slot, part in zip(here, made, strict=True):
            part.learn(())
            slot.add_module(gate.name, part)
        self._state.gates[gate.name] = gate

    def _switch(self, composition: Node) -> None:
        self._state.composition = composition
        on = self._state.active if self._state.trains == "all" else ()
        gates = compose.ways(composition)
        plans: Plans = {}
        for _, slot in slots(self.model):
            parts, own_gates = slot.parts, slot.gates
            node = compose.reduced(composition, parts)
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

    def _check(self, composition: Node) -> None:
        """Raise for what is not there, and for what cannot be computed at some layer."""
        for name in compose.names(composition):
            self._known(name)
        for gate in compose.gates(composition):
            known = self._state.gates.get(gate.name)
            if known is None:
                raise UnknownName(f"there is no gate {gate.name!r} on the model", fix=nearest(gate.name, self.gates))
            if known != gate:
                raise ConfigError(f"the gate {gate.name!r} on the model is {known}", fix="give it as add_gate did")
        for _, slot in slots(self.model):
            parts = slot.parts
            refuse(compose.reduced(composition, parts), parts, slot.gates)

    def _known(self, name: str) -> Method:
        methods = self._state.methods
        if name not in methods:
            raise UnknownName(f"there is no adapter {name!r} on the model", fix=nearest(name, methods))
        return methods[name]

    def _check_new(self, name: str) -> None:
        if name in self._state.methods or name in self._state.gates:
            what = "a gate" if name in self._state.gates else "an adapter"
            raise ConfigError(f"there is {what} {name!r} already", fix="give another name, or remove that one")
        if not name or "." in name or hasattr(Slot(Site("", ())), name):
            raise ConfigError(
                f"an adapter cannot be called {name!r}, for it becomes a submodule",
                fix="give a name without dots that is no attribute of torch modules",
            )

    def _refuse_merged(self, what: str) -> None:
        if self._state.merged:
            raise ConfigError(f"cannot {what} while adapters are merged into the weights", fix="unmerge first")


def _left(composition: Node, names: Collection[str]) -> Node:
    """What is left of it without the adapters that are none of these."""
    return composition if set(compose.names(composition)) <= set(names) else compose.reduced(composition, names)


def _words(words: str | Iterable[str]) -> Sequence[str]:
    return (words,) if isinstance(words, str) else tuple(words)


def _options(targets: Mapping[str, Mapping[str, Any]], named: Sequence[str]) -> dict[str, Any]:
    """The options that these targets give a layer."""
    for target in named:
        if not isinstance(targets[target], Mapping):
            what = f"the options of target {target!r} are {targets[target]!r}"
            raise ConfigError(what, fix=f'give a mapping, say {{"{target}": {{"rank": 4}}}}')
    return {name: value for target in named for name, value in targets[target].items()}
