"""Adapters on a live torch model: added in place, switched, merged, saved, removed.

All state is in the module tree. An adapted layer has one submodule named `adapters` (a `Slot`) with one
submodule for each adapter (a `Part`: its tensors there), and one forward hook that reads them. What is true
of the whole model lies on the model itself. So copies, pickles, `.to()` and `state_dict()` see all of it, and
no name of the base changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import algebra
from .adapter import Adapter
from .adapter import load as read
from .delta import LowRank
from .errors import AdapterError, ConfigError, FileError, NotMergeable, PluginError, UnknownName, nearest
from .protocol import Method, Params
from .registry import registry
from .seed import generator
from .site.linear import LinearSite
from .source import Held, make_site

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .plan import Plan
    from .save import RelativeError
    from .site import Site

ALL_LINEAR = "all-linear"
SLOT = "adapters"  # the submodule of an adapted layer
STATE = "_adapters_state"  # the attribute of the model


def adapt(model: nn.Module) -> Adapters:
    """A handle on the adapters of `model`, which is frozen by it: from now on adapters are what is trained.

    What was trainable is remembered and is so again when the last adapter is removed. Called again it gives
    another handle on the same adapters, also on a copy of the model.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> adapters = adapt(model)
    >>> [p.requires_grad for p in model.parameters()]
    [False, False]
    """
    _freeze(model)
    return Adapters(model)


# What lies in the module tree --------------------------------------------------------------------------


class Part(nn.Module):
    """The tensors of one adapter at one site, as parameters; those that are frozen never require gradients."""

    def __init__(self, method: Method, site: Site, tensors: Mapping[str, Tensor], trained: Collection[str]) -> None:
        super().__init__()
        # Names, since flags on the parameters would not survive load_state_dict(assign=True).
        self.method, self.site, self.trained = method, site, tuple(name for name in tensors if name in trained)
        weight = site.weight
        for name, tensor in tensors.items():
            own = tensor.detach().to(
                device=weight.device,
                dtype=_adapter_dtype(weight.dtype) if tensor.is_floating_point() else tensor.dtype,
                copy=True,
                memory_format=torch.contiguous_format,
            )
            self.register_parameter(name, nn.Parameter(own, requires_grad=False))

    def params(self) -> Params:
        """Looked up anew at every call: loading and sharding replace tensors."""
        return Params(cast("dict[str, Tensor]", self._parameters))

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with this adapter alone, in the adapter's dtype, whatever that of x and y is."""
        p = self.params()
        dtype = next((t.dtype for t in p.values() if t.is_floating_point()), y.dtype)
        if x.dtype != dtype and x.is_floating_point():
            x = x.to(dtype)
        return self.method.forward(p, x, y if y.dtype == dtype else y.to(dtype), self.site)


class Step(NamedTuple):
    """An adapter that is on at a site."""

    part: Part
    weight: float


class Slot(nn.Module):
    """The adapters at one site, by name, and which of them are on."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: tuple[Step, ...] = ()
        self.hook: RemovableHandle | None = None
        self.originals: dict[str, Tensor | None] = {}  # the layer's parameters while it is merged; None: it had none

    @property
    def parts(self) -> Mapping[str, Part]:
        return cast("dict[str, Part]", self._modules)


@dataclass
class State:
    """What is true of the whole model: lies on it as a plain attribute."""

    trainable: tuple[str, ...] = ()  # the base's parameters that were, before
    methods: dict[str, Method] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    merged: bool = False


def _adapted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
    """The forward hook of every adapted layer. A function of this module, so that copies and pickles keep it."""
    steps = cast("Slot", module._modules[SLOT]).steps
    if not steps:
        return None
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    if len(steps) == 1 and steps[0].weight == 1.0:
        return steps[0].part.adapted(x, y).to(y.dtype)
    total = y  # y + Σ wᵢ (fᵢ(x, y) − y); adapters are at least as wide as y, so nothing is rounded in between
    for part, weight in steps:
        total = total + weight * (part.adapted(x, y) - y)
    return total.to(y.dtype)


def _adapter_dtype(base: torch.dtype) -> torch.dtype:
    """That of an adapter on a weight of dtype `base`: float32, or wider if the weight is."""
    return torch.promote_types(base, torch.float32)


def _merge_dtype(base: torch.dtype) -> torch.dtype:
    """What a weight of dtype `base` is merged in, before the one rounding."""
    return torch.float64 if base in (torch.float32, torch.float64) else torch.float32


def _freeze(model: nn.Module) -> State:
    state = getattr(model, STATE, None)
    if isinstance(state, State):
        return state
    for name, module in model.named_modules():
        if STATE in module.__dict__:
            raise ConfigError(
                "this part of the model has adapters of its own", where=name, fix=f"adapt the {type(module).__name__}"
            )
        if isinstance(module, Slot):
            raise ConfigError("the model is a part of one that has adapters", where=name, fix="adapt the whole model")
    trainable = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    state = State(trainable)
    setattr(model, STATE, state)
    for name in trainable:
        model.get_parameter(name).requires_grad_(False)
    return state


# The handle -----------------------------------------------------------------------------------------------


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
        """Those that are on, with their weights."""
        return dict(self._state.active)

    def add(
        self,
        name: str,
        method: Method,
        targets: str | Sequence[str],
        *,
        exclude: str | Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """A new adapter `name` at the target layers; the first one on a model is active at once.

        A target is a module's name, the end of one ("q_proj", "mlp.up_proj"), a glob for either ("layers.1*.q_proj"),
        or "all-linear": all linear layers that `method` adapts, but for the output head. `exclude` takes names and
        globs too, and leaves out what is inside of the modules it names. Tensors depend on the seed and on the
        layer's name only.
        """
        self._not_merged("an adapter is added")
        self._check_name(name)
        if not isinstance(method, Method):
            raise ConfigError(f"{method!r} is not a method with its options", fix="give one, say ah.LoRA(rank=8)")
        parts = []
        for site in _select(self.model, method, _words(targets), _words(exclude)):
            here = method.at(site.name)
            with torch.no_grad():
                tensors = here.init(site, generator(seed, site.name))
            parts.append(Part(here, site, tensors, _trained(tensors)))
        self._attach(name, method, parts)

    def load(self, ref: str | Path | Adapter, name: str) -> None:
        """The adapter in the folder `ref`, or the value `ref`, as adapter `name`; the first on a model is active.

        Strict: every layer that it adapts must be there, of the same kind and shape. A value that is a sum is
        computed now.
        """
        self._not_merged("an adapter is loaded")
        self._check_name(name)
        value = ref if isinstance(ref, Adapter) else read(ref)
        for own in value._sum.contents.values():
            if own.kept:
                raise FileError(
                    f"has whole values of the base beside the adapter ({next(iter(own.kept))!r}), "
                    "which a live model cannot take",
                    where=ref,
                    fix="load it with PEFT, or save it without modules_to_save, biases and token rows",
                )
        planned = value.plan()
        method = planned.contents.method
        parts, trained = [], dict[str, list[str]]()
        for site in self._sites_of(planned, ref):
            here = method.at(site.name)
            if site.kind not in trained:  # which tensors train depends on the options and the kind, not on the layer
                trained[site.kind] = _trained(here.init(site, generator(0, site.name)))
            parts.append(Part(here, site, _tensors(value, planned, site.name), trained[site.kind]))
        self._attach(name, method, parts)

    def save(
        self, name: str, out: str | Path, *, dtype: torch.dtype | None = None, force: bool = False
    ) -> RelativeError:
        """Write adapter `name` to the folder `out`; `dtype`, `force` and the result are those of `Adapter.save`."""
        method = self._known(name)
        if method.reads_weight:
            self._not_merged(f"{name!r} is saved, which needs the base weights")
        parts = self._parts(name)
        held = Held(
            method,
            {part.site.name: part.site for part in parts},
            {part.site.name: part.params() for part in parts},
            base=_base_name(self.model),
        )
        return Adapter(((1.0, held),)).save(out, dtype=dtype, force=force)

    def activate(self, which: str | Mapping[str, float] | None) -> None:
        """Switch to one adapter, to a weighted sum of several, or to the base alone (None).

        Only active adapters get gradients. With weights w the layers give y + Σ wᵢ (yᵢ − y), where yᵢ is their
        output with the i-th adapter.
        """
        self._not_merged("another adapter is activated")
        self._switch(self._weights(which))

    @contextmanager
    def using(self, which: str | Mapping[str, float] | None) -> Iterator[Adapters]:
        """As `activate`, within a `with` statement; what was active before is so again behind it."""
        before = self.active
        self.activate(which)
        try:
            yield self
        finally:
            self.activate({name: weight for name, weight in before.items() if name in self._state.methods})

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: all trained parameters of the active adapters, as their methods group them."""
        groups = []
        for name in self._state.active:
            method, params = self._known(name), dict[str, list[nn.Parameter]]()
            for part in self._parts(name):
                for tensor in part.trained:
                    params.setdefault(tensor, []).append(part.get_parameter(tensor))
            own = [{**group, "params": list(group["params"])} for group in method.groups(params, lr)]
            given = sorted(id(p) for group in own for p in group["params"])
            if given != sorted(id(p) for ps in params.values() for p in ps):
                raise PluginError(f"groups() of method {method.name!r} does not give each parameter exactly once")
            groups += [group for group in own if group["params"]]
        if not groups:
            raise ConfigError("no active adapter has anything to train", fix="activate one first")
        return groups

    def merge(self) -> None:
        """Fold the active adapters into the base weights, for inference without overhead; `unmerge` undoes it.

        Nothing is changed if one cannot be folded (`NotMergeable`). The original weights stay in memory.
        """
        state = self._state
        self._not_merged("it is merged again")
        if not state.active:
            raise ConfigError("no adapter is active, so there is nothing to merge", fix="activate one first")
        owners = _owners(self.model)
        folds = []
        for module, slot in self._slots():
            if slot.steps:
                site = slot.steps[0].part.site
                folded = _folded(module, site, slot.steps)
                for key in folded:
                    _refuse_tied(site.name, owners.get(id(module._parameters[key]), ()), key)
                folds.append((module, slot, folded))
        for module, slot, folded in folds:
            for key, new in folded.items():
                old = module._parameters[key]
                slot.originals[key] = None if old is None else old.data
                if old is None:
                    module._parameters[key] = nn.Parameter(new, requires_grad=False)
                else:
                    old.data = new
            slot.steps = ()
        state.merged = True

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit; the adapters are active as before."""
        if not self._state.merged:
            raise ConfigError("the model is not merged, so there is nothing to undo")
        for module, slot in self._slots():
            for key, old in slot.originals.items():
                now = module._parameters[key]
                if old is None or now is None:
                    module._parameters[key] = None
                else:  # in case that the model was moved or cast in the meantime
                    now.data = old.to(device=now.device, dtype=now.dtype)
            slot.originals = {}
        self._state.merged = False
        self._switch(self._state.active)

    def remove(self, name: str) -> None:
        """Take adapter `name` off. Without any the model is as it was: hooks, names and what is trainable."""
        self._not_merged("an adapter is removed")
        self._known(name)
        for module, slot in list(self._slots()):
            slot._modules.pop(name, None)
            if not slot.parts:
                if slot.hook is not None:
                    slot.hook.remove()
                del module._modules[SLOT]
        state = self._state
        del state.methods[name]
        self._switch({other: weight for other, weight in state.active.items() if other != name})
        if not state.methods:
            for trainable in state.trainable:
                self.model.get_parameter(trainable).requires_grad_(True)
            delattr(self.model, STATE)

    def __repr__(self) -> str:
        names = ", ".join(f"{n} ({self._state.active[n]:g})" if n in self._state.active else n for n in self.names)
        return f"<Adapters on {type(self.model).__name__}: {names or 'none'}>"

    # Inside ---------------------------------------------------------------------------------------------

    @property
    def _state(self) -> State:
        return cast("State", getattr(self.model, STATE, None) or State())

    def _slots(self) -> Iterator[tuple[nn.Module, Slot]]:
        for module in self.model.modules():
            slot = module._modules.get(SLOT)
            if isinstance(slot, Slot):
                yield module, slot

    def _parts(self, name: str) -> list[Part]:
        return [slot.parts[name] for _, slot in self._slots() if name in slot.parts]

    def _attach(self, name: str, method: Method, parts: Sequence[Part]) -> None:
        state = _freeze(self.model)
        for part in parts:
            module = cast("nn.Module", part.site.module)
            slot = module._modules.get(SLOT)
            if not isinstance(slot, Slot):
                slot = Slot()
                module.add_module(SLOT, slot)
                # First in line: other hooks (FSDP's, a user's) are to see the adapted output.
                slot.hook = module.register_forward_hook(_adapted, prepend=True, with_kwargs=True)
            slot.add_module(name, part)
            slot.train(module.training)
        state.methods[name] = method
        self._switch(state.active if len(state.methods) > 1 else {name: 1.0})

    def _switch(self, active: dict[str, float]) -> None:
        for _, slot in self._slots():
            slot.steps = tuple(Step(slot.parts[name], w) for name, w in active.items() if name in slot.parts)
            for name, part in slot.parts.items():
                for tensor in part.trained:
                    part.get_parameter(tensor).requires_grad_(name in active)
        self._state.active = active

    def _weights(self, which: str | Mapping[str, float] | None) -> dict[str, float]:
        weights = {which: 1.0} if isinstance(which, str) else dict(which or {})
        for name, weight in weights.items():
            self._known(name)
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ConfigError(f"the weight {weight!r} of {name!r} is not a finite number")
        return {name: float(weight) for name, weight in weights.items() if weight != 0}

    def _known(self, name: str) -> Method:
        methods = self._state.methods
        if name not in methods:
            raise UnknownName(f"there is no adapter {name!r} on the model", fix=nearest(name, methods))
        return methods[name]

    def _check_name(self, name: str) -> None:
        if name in self._state.methods:
            raise ConfigError(f"there is an adapter {name!r} on the model", fix="take another name, or remove it first")
        if not name or "." in name or hasattr(Slot(), name):
            raise ConfigError(f"an adapter cannot be called {name!r}, for its tensors are found under its name")

    def _not_merged(self, what: str) -> None:
        if self._state.merged:
            raise ConfigError(f"adapters are merged into the weights, so {what} too late", fix="unmerge first")

    def _sites_of(self, planned: Plan, ref: object) -> list[Site]:
        """The live sites of an adapter that is loaded, one for each of its own."""
        contents, modules = planned.contents, dict(_base_modules(self.model))
        if missing := [name for name in contents.sites if name not in modules]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UnknownName(
                f"the model has no module {missing[0]!r}{more}, which the adapter changes",
                where=ref,
                fix=nearest(missing[0], [name for name, module in modules.items() if _kind(module)]),
            )
        sites = []
        for name, part in contents.sites.items():
            stored, site = make_site(name, part), _site(self.model, name, contents.method)
            linear = isinstance(stored, LinearSite) and isinstance(site, LinearSite)  # a file cannot tell which one
            alike = (stored.shape, stored.kernel) == (site.shape, site.kernel)
            if not alike or not (linear or stored.kind == site.kind):
                raise FileError(
                    f"adapts a {stored.kind} of shape {list(stored.weight_shape)} at {name!r}, which in this model "
                    f"is a {site.kind} of shape {list(site.weight_shape)}",
                    where=ref,
                    fix="load it on the model that it was trained for",
                )
            sites.append(site)
        return sites
