"""What adapters put into a model's tree: all state there is, so that copies, pickles and `.to()` see all of it.

An adapted layer has one submodule named `adapters` (a `Slot`) with one submodule for each adapter (a `Part`: its
tensors there) and each gate, and a forward hook that reads them. Tensors that all layers share are in a submodule of
the model that has the same name. What else is true of the whole model lies on the model itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import compose
from ..errors import ConfigError
from ..protocol import Method, Params
from ..registry import registry
from ..site import SLOT as SLOT
from ..site import Site
from .gating import GatePart
from .kept import Kept
from .program import Call, Leaf

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .program import Program

STATE = "_adapters_state"  # the attribute of the model


class Part(nn.Module):
    """The tensors of one adapter at one site. They are parameters; the frozen ones never require gradients."""

    common: Common | None
    kept: Kept | None = None  # while `Adapters.inference` lasts

    def __init__(
        self,
        method: Method,
        site: Site,
        tensors: Mapping[str, Tensor],
        trained: Collection[str],
        common: Common | None = None,
    ) -> None:
        super().__init__()
        # Names, because flags on the parameters would not survive load_state_dict(assign=True).
        self.method, self.site, self.trained = method, site, tuple(name for name in tensors if name in trained)
        self.__dict__["common"] = common  # not a submodule here: it is one of the model, once
        _place(self, tensors, site.like)
        # The tensor whose dtype is the adapter's.
        self.lead = next((name for name, t in self.named_parameters() if t.is_floating_point()), None)

    def own(self) -> Params:
        """The tensors of this layer alone."""
        return Params(cast("dict[str, Tensor]", self._parameters))

    def params(self) -> Params:
        """Looked up anew at every call: loading and sharding replace tensors."""
        own = cast("dict[str, Tensor]", self._parameters)
        return Params(own if self.common is None else {**self.common.tensors(), **own}, self.kept)

    def before(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], gate: GatePart | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        p = self.params()
        if gate is not None:
            p = Params(self.method.weighed(p, gate.of_samples(first(args, kwargs)), self.site))
        return self.method.before(p, args, kwargs, self.site)

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return self.method.after(self.params(), args, kwargs, out, self.site)

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with this adapter alone, in the adapter's dtype, whatever that of x and y is."""
        own: Mapping[str, Tensor] = self._parameters  # type: ignore[assignment]  # none is None; a cast takes time
        p = Params(own if self.common is None else {**self.common.tensors(), **own}, self.kept)
        dtype = y.dtype if self.lead is None else own[self.lead].dtype
        if not x.dtype == dtype == y.dtype:
            x, y = x.to(dtype) if x.is_floating_point() else x, y.to(dtype)
        return self.method.forward(p, x, y, self.site)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """What it adds to y, to be fused with what others do; in the adapter's dtype."""
        x, y = self._cast(x, y)
        return self.method.added(self.params(), x, y, self.site)

    def joined(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with u added."""
        x, y = self._cast(x, y)
        return self.method.joined(u.to(y.dtype), x, y, self.site)

    def _cast(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        dtype = y.dtype if self.lead is None else self.get_parameter(self.lead).dtype
        return x.to(dtype) if x.is_floating_point() else x, y.to(dtype)


class Common(nn.Module):
    """The frozen tensors that all parts of one adapter share."""

    def __init__(self, tensors: Mapping[str, Tensor], like: Tensor) -> None:
        super().__init__()
        _place(self, tensors, like)

    def tensors(self) -> Mapping[str, Tensor]:
        return cast("dict[str, Tensor]", self._parameters)


def common_of(tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> Common | None:
    """A holder of what a method shares among `sites`, if it shares anything."""
    return Common(tensors, sites[0].like) if tensors else None


class Commons(nn.Module):
    """What adapters have on the model itself: a `Common` for each that shares tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """What comes in: a model that is an `nn.Sequential` calls all of its submodules, and this one last."""
        return x


def _place(holder: nn.Module, tensors: Mapping[str, Tensor], like: Tensor) -> None:
    """Copies of `tensors` as parameters of `holder`, on the device of a weight and in an adapter's dtype for it."""
    for name, tensor in tensors.items():
        own = tensor.detach().to(
            device=like.device,
            dtype=adapter_dtype(like.dtype) if tensor.is_floating_point() else tensor.dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        holder.register_parameter(name, nn.Parameter(own, requires_grad=False))


class Around(NamedTuple):
    """The one adapter that is on at a site and wraps the call."""

    part: Part
    gate: GatePart | None


class Slot(nn.Module):
    """The adapters at one site, and which of them are on."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.program: Program | None = None  # what is on
        self.around: Around | None = None  # instead of that: the one adapter that is on and wraps the call
        self.hooks: dict[str, RemovableHandle] = {}
        self.__dict__["replaced"] = None  # the layer, while another stands in for it; no submodule of this
        self.originals: dict[str, Tensor | None] = {}  # of the layer's parameters, while merged; None: it had none

    replaced: nn.Module | None

    @property
    def parts(self) -> dict[str, Part]:
        return {name: own for name, own in self._modules.items() if isinstance(own, Part)}

    @property
    def gates(self) -> dict[str, GatePart]:
        return {name: own for name, own in self._modules.items() if isinstance(own, GatePart)}


@dataclass
class State:
    """What is true of the whole model."""

    trainable: tuple[str, ...] = ()  # the base's parameters that were, before
    methods: dict[str, Method] = field(default_factory=dict)
    gates: dict[str, compose.Gate] = field(default_factory=dict)
    composition: compose.Node = field(default_factory=compose.Base)
    trains: Literal["all", "gates"] = "all"  # of what is on
    merged: bool = False

    @property
    def active(self) -> dict[str, float]:
        """Those that are on, with their weights; with 1 where it is no weighted sum."""
        sums = compose.weights(self.composition)
        if sums is not None:
            return {name: weight for name, weight in sums.items() if weight != 0}
        return dict.fromkeys(compose.names(compose.reduced(self.composition, self.methods)), 1.0)


def before_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The hook of layers with adapters that define `before`. Copies and pickles know it by its name, and the next."""
    slot = cast("Slot", module._modules[SLOT])
    if type(slot.program) is Leaf:
        return slot.program.part.before(args, kwargs)
    around = slot.around
    return None if around is None else around.part.before(args, kwargs, around.gate)


def after_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """The hook of layers with adapters that wrap the call; it is given the arguments that `before` made."""
    around = cast("Slot", module._modules[SLOT]).around
    return None if around is None else around.part.after(args, kwargs, out)


def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    """The hook of every adapted layer."""
    program: Program | None = module._modules[SLOT].program  # type: ignore[assignment, union-attr]  # a cast takes time
    if program is None:
        return None
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    if type(program) is Leaf and isinstance(y, Tensor):  # the usual case; what it changes in the input is done
        out = program.part.adapted(x, y)
        return out if out.dtype == y.dtype else out.to(y.dtype)
    site = cast("Slot", module._modules[SLOT]).site
    before = site.hidden(y)  # a block may give more than its hidden states
    if type(program) is Leaf:
        after = program.part.adapted(x, before)
    else:
        after = program.run(Call(x, before, args, kwargs), before)
    after = after.to(before.dtype)  # rounded once, at the end
    return after if isinstance(y, Tensor) else site.with_hidden(y, after)


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The layer's input, in the arguments of a call."""
    return args[0] if args else next(iter(kwargs.values()))


def trained(tensors: Mapping[str, nn.Parameter | Tensor]) -> list[str]:
    """The names of those that `init` gave to be trained."""
    return [name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """That of an adapter on a weight of dtype `base`: float32, or wider if the weight is."""
    return torch.promote_types(base, torch.float32)


def state_of(model: nn.Module) -> State:
    """The state that lies on `model`; a fresh one, lying nowhere, if it has none."""
    return model.__dict__.get(STATE) or State()


def freeze(model: nn.Module) -> State:
    """The state on `model`, which is frozen and gets one if it has none."""
    if STATE in model.__dict__:
        return state_of(model)
    for name, module in model.named_modules():
        if STATE in module.__dict__:
            raise ConfigError("this part of the model has been adapted by itself", where=name, fix="adapt that part")
        if isinstance(module, Slot):
            raise ConfigError("the model is part of one that was adapted", where=name, fix="adapt the whole model")
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ConfigError("the parameter has no shape yet", where=name, fix="call the model once")
    state = State(tuple(name for name, p in model.named_parameters() if p.requires_grad))
    setattr(model, STATE, state)
    for name in state.trainable:
        model.get_parameter(name).requires_grad_(False)
    return state


def thaw(model: nn.Module) -> None:
    """The model as it was before `freeze`."""
    for name in state_of(model).trainable:
        model.get_parameter(name).requires_grad_(True)
    delattr(model, STATE)
    _tell_kinds(model, "leave")


def settle(model: nn.Module) -> None:
    """What site kinds put on the base's layers comes behind all other hooks again."""
    _tell_kinds(model, "leave")
    _tell_kinds(model, "enter")


def _tell_kinds(model: nn.Module, what: str) -> None:
    """Let the site kinds that have something to do for their modules do it."""
    for kind in registry().site_kinds().values():
        if getattr(kind, what).__func__ is not getattr(Site, what).__func__:
            for module in model.modules():
                if kind.accepts(module):
                    getattr(kind, what)(module)


def slots(model: nn.Module) -> list[tuple[nn.Module, Slot]]:
    """The adapted layers and their slots."""
    found = ((module, module._modules.get(SLOT)) for module in model.modules())
    return [(module, slot) for module, slot in found if isinstance(slot, Slot)]


def attach(part: Part, name: str) -> None:
    """Put `part` into its layer's slot, which is made if it is the first there."""
    module = cast("nn.Module", part.site.module)
    slot = module._modules.get(SLOT)
    if not isinstance(slot, Slot):
        slot = Slot(part.site)
        module.add_module(SLOT, slot)
        # First in line: what other hooks see (FSDP's, a user's) is the adapted output.
        slot.hooks["forward"] = module.register_forward_hook(forward_hook, prepend=True, with_kwargs=True)
    if part.method.defines("before") and "before" not in slot.hooks:
        slot.hooks["before"] = module.register_forward_pre_hook(before_hook, with_kwargs=True)
    if part.method.wraps_call and "after" not in slot.hooks:
        slot.hooks["after"] = module.register_forward_hook(after_hook, prepend=True, with_kwargs=True)
    slot.add_module(name, part)
    slot.train(module.training)


def detach(module: nn.Module, slot: Slot, name: str) -> None:
    """Take the part `name` out, if there is one, and the slot and the hook with the last."""
    slot._modules.pop(name, None)
    if not slot.parts:
        for hook in slot.hooks.values():
            hook.remove()
        del module._modules[SLOT]


def share(model: nn.Module, name: str, common: Common) -> None:
    """Put what the parts of adapter `name` share on the model."""
    commons = model._modules.get(SLOT)
    if not isinstance(commons, Commons):
        if hasattr(model, SLOT):
            raise ConfigError(f"the model has an attribute {SLOT!r} of its own", fix="adapt nn.Sequential(model)")
        commons = Commons()
        model.add_module(SLOT, commons)
    commons.add_module(name, common)


def unshare(model: nn.Module, name: str) -> None:
    """Take off what the parts of adapter `name` shared, if they did."""
    commons = model._modules.get(SLOT)
    if isinstance(commons, Commons):
        commons._modules.pop(name, None)
        if not commons._modules:
            del model._modules[SLOT]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by name, without what adapters put there."""
    ours = (Slot, Part, GatePart, Commons, Common)
    return ((name, module) for name, module in model.named_modules() if not isinstance(module, ours))
