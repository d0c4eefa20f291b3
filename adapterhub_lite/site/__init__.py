"""A site: one layer of a base model, and how a weight change is seen through it.

A method states ΔW in matrix form (out, in) and knows no layer types; a site kind knows
its layer and no methods. Kinds are plugins too: the files beside this one come in through
the hook `site_kinds`. None imports torch before a live layer is at hand: files are planned and folded without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import AdapterError, ConfigError, NotMergeable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ..delta import Delta

SLOT = "adapters"  # the submodule of a layer that has adapters: no part of the base


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted layer: built from a module (`of`), or from the shape of its weight alone."""

    kind: ClassVar[str]
    general: ClassVar[bool] = False
    """Whether it takes modules of any class: then it is asked last."""
    by_inputs: ClassVar[bool] = False
    """Whether the stored weight has a row for each input, not for each output."""

    name: str  # the module's path in the base model
    weight_shape: tuple[int, ...]  # as the layer stores it
    module: nn.Module | None = None

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether this kind knows the forward of `module`.

        Subclasses that compute something else (a scaled embedding, say) must be refused: compare
        `type(module).forward`, not `isinstance`.
        """
        raise _missing(cls, "accepts")

    @classmethod
    def check(cls, name: str, module: nn.Module) -> None:
        """Raise `ConfigError` where a module of this kind, as it is now, can have no adapter."""
        weight = module._parameters.get("weight")
        if weight is None:
            raise ConfigError(
                "the weight is computed at each call (parametrized, or weight_norm)", where=name, fix="exclude it"
            )
        if weight.is_meta:
            raise ConfigError("the weight has no values yet", where=name, fix="load the model first")

    @classmethod
    def enter(cls, module: nn.Module) -> None:
        """What a module of this kind needs while its model has adapters, whether it gets one or not.

        Called behind all other hooks: once more, after `leave`, when an adapter is added.
        """

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        """Undo `enter`."""

    @classmethod
    def stored(cls, module: nn.Module) -> tuple[int, int] | None:
        """Numbers and bytes of the weight, where the parameter does not tell them: where it is quantised."""
        return None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Site:
        """The site of a live module."""
        weight: Tensor = module.get_parameter("weight")
        return cls(name, tuple(weight.shape), module)

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix form of the weight: (out, in), with all that is summed over flattened into `in`."""
        raise _missing(type(self), "shape")

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution; () for layers without one."""
        return ()

    @property
    def weight(self) -> Tensor:
        """The frozen weight in matrix form (out, in), detached."""
        return self.unfold(self._live().get_parameter("weight").detach())

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,), detached; None if the layer has none."""
        bias = getattr(self._live(), "bias", None)
        return None if bias is None else bias.detach()

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """The layer's own tensors, which `weight` and `bias` are computed from."""
        module = self._live()
        return tuple(t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)

    @property
    def like(self) -> Tensor:
        """A tensor on the layer's device, in the dtype that it computes in."""
        return self._live().get_parameter("weight")

    def width(self, end: str) -> int:
        """The size of the last axis of its "input" or "output", where the channels are: for gates, which read them."""
        raise ConfigError(f"a gate cannot read the {end} of a {self.kind}", where=self.name, fix="give it other layers")

    @property
    def sample(self) -> Tensor:
        """A matrix of the base's values to know it by."""
        return self.weight

    def hidden(self, out: Any) -> Tensor:
        """The hidden states in what the module gives."""
        from torch import Tensor

        if isinstance(out, Tensor):
            return out
        raise AdapterError(f"gives a {type(out).__name__}, not a tensor", where=self.name, fix="target a layer in it")

    def with_hidden(self, out: Any, hidden: Tensor) -> Any:
        """What the module gives, with other hidden states."""
        return hidden

    def fold(self, matrix: Tensor) -> Tensor:
        """Matrix form (out, in) back to the layer's own layout."""
        raise _missing(type(self), "fold")

    def narrow(self, outputs: int) -> Site:
        """The site of a layer that has so many outputs and is like this one else, without a module."""
        shape, axis = list(self.weight_shape), 1 if self.by_inputs else 0
        shape[axis] = outputs
        return type(self)(self.name, tuple(shape))

    def stand_in(self, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
        """A layer with the merged weight (out, in) and bias (out,), where this one cannot hold them; else None."""
        return None

    def unfold(self, weight: Tensor) -> Tensor:
        """The layer's own layout to matrix form (out, in); the inverse of `fold`."""
        raise _missing(type(self), "unfold")

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the module gives for these arguments, with gradients and without hooks."""
        return self._live().forward(*args, **kwargs)

    def apply(self, delta: Delta, x: Tensor) -> Tensor:
        """What ΔW adds to the layer's output for input x; a low-rank ΔW is never written out."""
        raise _missing(type(self), "apply")

    def add(self, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        """The output y with what ΔW adds for input x, in y's dtype."""
        return y + self.apply(delta, x).to(y.dtype)

    def add_bias(self, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The output y with what a change b (out,) of the bias adds for input x, in y's dtype."""
        return y + self.along(b).to(y.dtype)

    def rerun(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """What the layer's own forward gives for x with another weight, in matrix form, and another bias (out,).

        What is not given is the base's, frozen, in x's dtype. No hook runs, and the layer is left alone.
        """
        module = self._live()
        if bias is not None and module._parameters.get("bias") is None:
            raise AdapterError(f"a {type(module).__name__} has no bias", where=self.name, fix="leave it alone")
        given = {"weight": None if weight is None else self.fold(weight), "bias": bias}
        values = {
            name: p.detach().to(x.dtype) if (new := given.get(name)) is None else new
            for name, p in module._parameters.items()
            if p is not None
        }
        # A twin that has all but these in common: nothing is to be put back, whatever happens in between. Not made
        # by the class, which may have other plans (FSDP2's is another module).
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin.__dict__.update(values)
        y: Tensor = type(module).forward(twin, x)
        return y

    def project(self, rows: Tensor) -> Tensor:
        """`rows` (n, in) times the transposed weight: (n, out). For methods that need W only so."""
        return rows @ self.weight.to(rows.dtype).mT

    def along(self, vector: Tensor) -> Tensor:
        """A vector over the output channels (out,), shaped to broadcast against the layer's output."""
        return vector.reshape(-1, *(1 for _ in self.kernel))

    def scale_output(self, y: Tensor, l: Tensor) -> Tensor:  # noqa: E741  # ℓ, as IA3's paper writes it
        """The output y with channel i multiplied by l[i]."""
        return y * self.along(l)

    def _live(self) -> nn.Module:
        if self.module is None:
            raise NotMergeable(
                "the base weight is needed, and only its shape is known", where=self.name, fix="give the base model"
            )
        return self.module


def _missing(kind: type, what: str) -> AdapterError:
    return AdapterError(f"the site kind {kind.__name__} does not say its {what}", fix=f"define {kind.__name__}.{what}")
