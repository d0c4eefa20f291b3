"""What a plugin author writes: a `Method`, its options and its rules.

The instance *is* the config: frozen, comparable, strictly validated, JSON-able. The rules
are pure functions of the tensors at one site; whoever calls them owns the state. Like
`delta`, this file does not import torch; a plugin file need not either, outside the rules
that make tensors, and then `adapter methods` and `adapter info` stay fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from . import options
from .delta import Outline
from .errors import ConfigError, NotMergeable, nearest
from .pattern import brief

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from .delta import Delta, LowRank
    from .site import Site

    Keep = Callable[[Mapping[str, Tensor], str, Callable[[], Tensor]], Tensor]


class Params(Mapping[str, "Tensor"]):
    """The tensors of one adapter at one site, by the names its method gave them in `init` and `shared`."""

    __slots__ = ("_keep", "_tensors")

    def __init__(self, tensors: Mapping[str, Tensor], keep: Keep | None = None) -> None:
        self._tensors, self._keep = tensors, keep

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives from these tensors and the site's `weight`, `bias` and `project` alone.

        Where who calls the rules knows that nothing changes, it is kept, by that name, and not computed again.
        """
        return compute() if self._keep is None else self._keep(self._tensors, name, compute)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own raises and catches a KeyError
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Params({', '.join(f'{k}: {tuple(v.shape)}' for k, v in self.items())})"


@dataclass(frozen=True, kw_only=True)
class Method:
    """An adapter method. A low-rank one needs `init` and `delta`; the rest follows.

    Subclasses are frozen dataclasses themselves; their fields are the method's options.
    """

    name: ClassVar[str]
    """How people call it: the name of the plugin's entry point."""
    paper: ClassVar[str]
    """URL of the paper the rules are taken from."""
    site_kinds: ClassVar[frozenset[str]]
    """The kinds of layer it adapts."""
    reads_weight: ClassVar[bool] = False
    """Whether a rule looks at the base weight: such an adapter cannot be merged from files alone."""
    wraps_call: ClassVar[bool] = False
    """Whether `before` and `after` are its rules: then it is on alone at its layers, with weight 1."""
    takes_any_output: ClassVar[bool] = True
    """Whether `forward` takes another adapter's output for y; False where it computes the layer anew."""
    exact_gradients: ClassVar[bool] = True
    """Whether gradients are the derivatives of `forward`; False where the paper holds a part of it constant."""
    carries_low_rank: ClassVar[bool] = False
    """Whether `carry` and `factors` can hold any low-rank delta: what results of arithmetic are saved as."""
    peft_type: ClassVar[str | None] = None
    """The name in `adapter_config.json`: PEFT's, or one of the plugin's own; None if the delta is what is saved."""
    peft_joined: ClassVar[str | None] = None
    """The config's entry with the number of sites, where a file has one tensor for all of them, side by side."""

    def __post_init__(self) -> None:
        options.validate(self, owner=f"method {self.name!r}")
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for options that contradict each other or are out of bounds."""

    @property
    def identity_at_init(self) -> bool:
        """Whether a fresh adapter leaves the base's output unchanged."""
        return True

    @property
    def adds_delta(self) -> bool:
        """Whether `forward` adds what `delta` and `delta_bias` give and does no more, in training too."""
        return not self.defines("forward")

    def at(self, site: str) -> Self:
        """The options as they hold at the site of that name, with patterns resolved. The rules see these."""
        return self

    def having(self, sites: Mapping[str, Mapping[str, Any]]) -> Self:
        """The method with options of their own at some of these sites, by the sites' names.

        An option may differ from layer to layer if there is another beside it whose name ends in `_pattern`.
        """
        names = [f.name for f in fields(self)]
        own = [name for name in names if f"{name}_pattern" in names]
        for site, values in sites.items():
            for name in values:
                if name not in own:
                    what = f"method {self.name!r} has no option {name!r} that may differ from layer to layer"
                    raise ConfigError(what, where=site, fix=nearest(name, own) if own else "give it to the method")
        patterns = {}
        for name in own:
            here = brief({site: values.get(name) for site, values in sites.items()})
            former: Mapping[str, Any] = getattr(self, f"{name}_pattern")
            patterns[f"{name}_pattern"] = {**here, **{key: v for key, v in former.items() if key not in here}}
        return replace(self, **patterns)

    @classmethod
    def defines(cls, rule: str) -> bool:
        """Whether the method has its own `rule`, in place of what `Method` does."""
        return getattr(cls, rule) is not getattr(Method, rule)

    def refuses(self, site: Site) -> str | None:
        """Why it can do nothing at a site of a kind that it adapts, if so: a layer without a bias has none to train."""
        return None

    # The rules ------------------------------------------------------------------------------------

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """Frozen tensors that all sites of an adapter have in common, stored once; rules find them in `p`.

        They depend on the options and on the sites' shapes alone, so that a file may do without them.
        """
        return {}

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        """Fresh tensors for a site: a Parameter is trained, a Tensor is frozen; both are saved.

        Draw from `rng` only: it is seeded by (seed, site name), so that the result depends on neither the
        order of sites nor the global random state.
        """
        raise _missing(self, "init")

    def delta(self, p: Params, site: Site) -> Delta:
        """The weight change ΔW in matrix form (out, in), from the adapter's tensors alone."""
        raise NotMergeable(f"method {self.name!r} is not a weight change that its tensors alone give")

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        """Rank and scale that `delta` will have, and whether `delta_bias` gives one, from the saved tensors' shapes.

        Plans are made from headers, without torch. The default says: not low rank, no bias.
        """
        return Outline()

    def delta_bias(self, p: Params, site: Site) -> Tensor | None:
        """The change of the bias (out,); None where the method leaves it alone."""
        return None

    def before(
        self, p: Params, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the layer is called with instead; `forward` then gets the x and y of that call."""
        return args, kwargs

    def after(self, p: Params, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, site: Site) -> Any:
        """What the layer gives instead of `out`, for the arguments that `before` made: `wraps_call` is to be true."""
        return out

    def weighed(self, p: Params, weight: Tensor, site: Site) -> Mapping[str, Tensor]:
        """The tensors for `before` where each sample has a weight (batch,) of its own: for methods that wrap the call.

        Others are weighed in what they add to the output, and are not asked.
        """
        raise _missing(self, "weighed")

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """The adapted output, for the layer's input x and the base's output y."""
        y, b = site.add(self.delta(p, site), x, y), self.delta_bias(p, site)  # b: (out,)
        return y if b is None else site.add_bias(b, x, y)

    def added(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """What it adds to the base's output y, which AdapterFusion weighs against what others add."""
        return self.forward(p, x, y, site) - y

    def joined(self, u: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """The layer's output with a u that was fused of what several adapters add."""
        return y + u

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and bias (out,) of a plain layer that computes what `forward` does. Pure."""
        weight = weight + self.delta(p, site).dense().to(weight.dtype)
        b = self.delta_bias(p, site)  # (out,)
        if b is None:
            return weight, bias
        return weight, b.to(weight.dtype) if bias is None else bias + b.to(bias.dtype)

    def rows(self, p: Params, start: int, stop: int, site: Site) -> Params | None:
        """The tensors of a layer that has but these outputs of the site's: with them, `merge` gives these rows.

        So a large layer is merged piece by piece. None where what `merge` gives for a row depends on other rows.
        """
        return None

    def groups(self, params: Mapping[str, Sequence[nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """Optimizer groups from all trained parameters, by name. Each must be in exactly one group."""
        return [{"params": [p for ps in params.values() for p in ps], "lr": lr}]

    def penalty(self, p: Params, site: Site) -> Tensor | None:
        """What the method adds to the loss at this site, a scalar; None where it adds nothing."""
        return None

    def before_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        """Change the gradients in place, once before each optimizer step; under FSDP they are DTensors."""

    def after_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        """Change the tensors in place, once after each optimizer step; under FSDP they are DTensors."""

    # Carrying the results of arithmetic (for methods with `carries_low_rank`) ------------------------

    @classmethod
    def carry(cls, ranks: Mapping[str, int], *, scale: float, bias: bool) -> Self:
        """The method whose adapter has, at each site, a delta `scale · B A` of that rank, and a bias if so."""
        raise _missing(cls, "carry")

    def tensor_shapes(
        self, kind: str, shape: tuple[int, int], kernel: tuple[int, ...]
    ) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the saved tensors at a site of that kind and matrix shape (out, in); () is no kernel."""
        raise _missing(self, "tensor_shapes")

    def factors(self, delta: LowRank, bias: Tensor | None) -> Mapping[str, Tensor]:
        """The tensors that give this delta and bias change, as matrices; the scale is the one `carry` was told."""
        raise _missing(self, "factors")

    # On disk: PEFT's layout ------------------------------------------------------------------------

    def as_saved(self) -> Self:
        """The method that a file has: without the options that tell only how it is trained."""
        return self

    def pack(self, p: Params) -> Mapping[str, Tensor]:
        """The tensors of a site as they are saved: those of `p`, rearranged, no number changed."""
        return p

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        """The tensors of a site from those saved: the inverse of `pack`."""
        return saved

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        """Key suffixes in the file: by family of site kinds ("" for any other), saved tensor's name to PEFT's suffix.

        A site has all tensors of its family, but for the optional ones; the options are those of the site.
        """
        raise _missing(self, "peft_keys")

    def peft_optional(self) -> frozenset[str]:
        """Those of the saved tensors that a site may lack."""
        return frozenset()

    def peft_shared(self) -> Mapping[str, str]:
        """Keys in the file, behind "base_model.", of those shared tensors that are saved."""
        return {}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self | None:
        """The method from PEFT's config, or None if another one of the same `peft_type` is meant.

        Takes the entries it understands out of `config`; what is left and set is refused by the caller. Raise
        `ConfigError` or `NotMergeable` where the entries mean something that `delta` does not compute.
        """
        return None

    def to_peft(self) -> dict[str, Any]:
        """The entries of `adapter_config.json` that are this method's."""
        raise _missing(self, "to_peft")

    def place(self, family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        """The site kind, the weight's own shape and its matrix shape (out, in), from the saved tensors' shapes.

        A dimension that they do not tell is -1. `family` is the one of `peft_keys` that the tensors' keys belong to;
        the options are those of the site.

        Raise `ConfigError` if the shapes fit no site, or contradict the options.
        """
        raise _missing(self, "place")


def _missing(who: Method | type[Method], rule: str) -> ConfigError:
    return ConfigError(f"method {who.name!r} does not define {rule}()", fix="see the protocol in docs/protocol.md")
