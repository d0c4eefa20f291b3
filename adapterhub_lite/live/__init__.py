"""Adapters on a live torch model: added in place, switched, merged, saved, removed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import algebra
from ..adapter import Adapter
from ..adapter import load as read
from ..delta import LowRank
from ..errors import ConfigError, FileError, PluginError, UnknownName, nearest
from ..plan import Plan
from ..protocol import Method
from ..seed import generator
from ..site.linear import LinearSite
from ..source import Held, make_site
from .merging import merge, unmerge
from .targets import kind_of, select, site_of
from .tree import Part, Slot, State, Step, attach, base_modules, detach, freeze, slots, state_of, thaw

if TYPE_CHECKING:
    from ..save import RelativeError
    from ..site import Site


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
        """Those that are on, with their weights."""
        return dict(self._state.active)

    def __repr__(self) -> str:
        names = ", ".join(f"{name} ({self.active[name]:g})" if name in self.active else name for name in self.names)
        return f"<Adapters on {type(self.model).__name__}: {names or 'none'}>"

    # Coming and going -------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        method: Method,
        targets: str | Sequence[str],
        *,
        exclude: str | Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """A new adapter `name` at the target layers. The first one on a model is active at once.

        A target is a module's name, the end of one ("q_proj", "mlp.up_proj"), a glob for either ("layers.1*.q_proj"),
        or "all-linear": all linear layers that `method` adapts, but for the output head. `exclude` takes names and
        globs; what is inside of a module that it names is left out too. The tensors depend on `seed` and on each
        layer's name, and on nothing else.
        """
        self._refuse_merged("add an adapter")
        self._check_new(name)
        if not isinstance(method, Method):
            raise ConfigError(f"{method!r} is not a method with its options", fix="give one, say ah.LoRA(rank=8)")
        parts = []
        for site in select(self.model, method, _words(targets), _words(exclude)):
            here = method.at(site.name)
            tensors = here.init(site, generator(seed, site.name))
            parts.append(Part(here, site, tensors, _trained(tensors)))
        self._attach(name, method, parts)

    def load(self, ref: str | Path | Adapter, name: str) -> None:
        """The adapter in the folder `ref`, or the value `ref`, as adapter `name`. The first on a model is active.

        Strict: each layer that it adapts must be there, of the same kind and shape. A sum is computed now, and its
        tensors are float32, or float64 where the weight is.
        """
        self._refuse_merged("load an adapter")
        self._check_new(name)
        value = ref if isinstance(ref, Adapter) else read(ref)
        for own in value.source.contents.values():
            if own.kept:
                raise FileError(
                    f"has whole values of the base beside the adapter, {next(iter(own.kept))!r} among them, "
                    "which a live model cannot take",
                    where=ref,
                    fix="save it without modules_to_save, biases and token rows, or load it with PEFT",
                )
        planned = value.plan()
        trained: dict[str, list[str]] = {}
        parts = []
        for site in self._sites_for(planned, ref):
            here = planned.contents.method.at(site.name)
            if site.kind not in trained:  # it depends on the options and the kind of layer, not on which layer it is
                trained[site.kind] = _trained(here.init(site, generator(0, site.name)))
            parts.append(Part(here, site, _tensors(value, planned, site.name), trained[site.kind]))
        self._attach(name, planned.contents.method, parts)

    def save(
        self, name: str, out: str | Path, *, dtype: torch.dtype | None = None, force: bool = False
    ) -> RelativeError:
        """Write adapter `name` to the folder `out`; `dtype`, `force` and the result are those of `Adapter.save`."""
        method = self._known(name)
        if method.reads_weight:
            self._refuse_merged(f"save {name!r}, whose method reads the weights,")
        parts = {part.site.name: part for part in self._parts(name)}
        sites, params = {n: part.site for n, part in parts.items()}, {n: part.params() for n, part in parts.items()}
        held = Held(method, sites, params, base=_base_name(self.model))
        return Adapter(((1.0, held),)).save(out, dtype=dtype, force=force)

    def remove(self, name: str) -> None:
        """Take adapter `name` off. When none is left, the model is as it was: hooks, names and what is trainable."""
        self._refuse_merged("remove an adapter")
        self._known(name)
        for module, slot in slots(self.model):
            detach(module, slot, name)
        state = self._state
        del state.methods[name]
        self._switch({other: weight for other, weight in state.active.items() if other != name})
        if not state.methods:
            thaw(self.model)

    # Switching ----------------------------------------------------------------------------------------

    def activate(self, which: str | Mapping[str, float] | None) -> None:
        """Switch to one adapter, to a weighted sum of several, or to the base alone (None).

        Only active adapters get gradients. With weights w a layer gives y + Σ wᵢ (yᵢ − y), where y is the base's
        output and yᵢ that with the i-th adapter.
        """
        self._refuse_merged("activate another adapter")
        self._switch(self._weights(which))

    @contextmanager
    def using(self, which: str | Mapping[str, float] | None) -> Iterator[Adapters]:
        """As `activate`, within a `with` statement; behind it the former adapters are active again."""
        former = self.active
        self.activate(which)
        try:
            yield self
        finally:
            self.activate({name: weight for name, weight in former.items() if name in self.names})

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
        self._switch(self._state.active)

    # Training ---------------------------------------------------------------------------------------------

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: every trained parameter of the active adapters once, as their methods say."""
        groups: list[dict[str, Any]] = []
        for name in self.active:
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
            raise ConfigError("no active adapter has anything to train", fix="activate one")
        return groups

    # Inside -----------------------------------------------------------------------------------------------

    @property
    def _state(self) -> State:
        return state_of(self.model)

    def _parts(self, name: str) -> list[Part]:
        return [slot.parts[name] for _, slot in slots(self.model) if name in slot.parts]

    def _attach(self, name: str, method: Method, parts: Sequence[Part]) -> None:
        state = freeze(self.model)
        for part in parts:
            attach(part, name)
        state.methods[name] = method
        self._switch(state.active if len(state.methods) > 1 else {name: 1.0})

    def _switch(self, active: Mapping[str, float]) -> None:
        for _, slot in slots(self.model):
            slot.steps = tuple(Step(slot.parts[name], w) for name, w in active.items() if name in slot.parts)
            for name, part in slot.parts.items():
                for tensor in part.trained:
                    part.get_parameter(tensor).requires_grad_(name in active)
        self._state.active = dict(active)

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

    def _check_new(self, name: str) -> None:
        if name in self._state.methods:
            raise ConfigError(f"there is an adapter {name!r} already", fix="give another name, or remove that one")
        if not name or "." in name or hasattr(Slot(), name):
            raise ConfigError(
                f"an adapter cannot be called {name!r}, for it becomes a submodule",
                fix="give a name without dots that is no attribute of torch modules",
            )

    def _refuse_merged(self, what: str) -> None:
        if self._state.merged:
            raise ConfigError(f"cannot {what} while adapters are merged into the weights", fix="unmerge first")

    def _sites_for(self, planned: Plan, ref: object) -> list[Site]:
        """The live sites of an adapter that comes from elsewhere, in its order."""
        contents, modules = planned.contents, dict(base_modules(self.model))
        if missing := [name for name in contents.sites if name not in modules]:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UnknownName(
                f"adapts a module {missing[0]!r}{more}, which the model does not have",
                where=ref,
                fix=nearest(missing[0], [name for name, module in modules.items() if kind_of(module)]),
            )
        sites = []
        for name, part in contents.sites.items():
            there, here = make_site(name, part), site_of(self.model, name, contents.method)
            # Files do not tell apart the kinds of linear layers, and their matrix forms are alike.
            same_kind = there.kind == here.kind or (isinstance(there, LinearSite) and isinstance(here, LinearSite))
            if not same_kind or (there.shape, there.kernel) != (here.shape, here.kernel):
                raise FileError(
                    f"adapts a {there.kind} of shape {list(there.weight_shape)} at {name!r}, which is a {here.kind} "
                    f"of shape {list(here.weight_shape)} in this model",
                    where=ref,
                    fix="load it on the model that it was made for",
                )
            sites.append(here)
        return sites


def _words(words: str | Sequence[str]) -> Sequence[str]:
    return (words,) if isinstance(words, str) else words


def _trained(tensors: Mapping[str, nn.Parameter | Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]


def _tensors(value: Adapter, planned: Plan, name: str) -> Mapping[str, Tensor]:
    """The tensors of `value` at one site: its own if it is one adapter, else those of the sum."""
    if planned.verbatim is not None:
        return planned.verbatim.params(name)
    piece = value.source.piece(name)
    low = algebra.low_rank(piece.delta)
    scale = planned.scale
    method = planned.contents.method.at(name)
    factors = method.factors(LowRank(low.B.double() * (low.scale / scale), low.A, scale), piece.bias)
    return {key: factors[key].reshape(t.shape) for key, t in planned.contents.sites[name].tensors.items()}


def _base_name(model: nn.Module) -> str | None:
    """What transformers calls the base model, if it is one of theirs."""
    for holder, attribute in ((getattr(model, "config", None), "_name_or_path"), (model, "name_or_path")):
        name = getattr(holder, attribute, None)
        if isinstance(name, str) and name:
            return name
    return None
