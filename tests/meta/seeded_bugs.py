"""One mistake each: methods that are right but for one thing, and the checks that must notice it.

The first check named is the one that the mistake was made for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from adapterhub_lite_plugins.methods.lora import LoRA
from adapterhub_lite_plugins.methods.vera import VeRA
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from adapterhub_lite import LowRank, Method, Outline, Params, Site

BUGS: dict[type[Method], tuple[str, ...]] = {}
Args, Kwargs = tuple[Any, ...], dict[str, Any]
C = TypeVar("C", bound=type[Method])


class Sound(LoRA):
    """LoRA on one kind of layer, which is enough here and quick; it passes every check."""

    site_kinds = frozenset({"linear"})


class Scaling(Method):
    """A trained factor for each output channel of weight and bias (https://arxiv.org/abs/2205.05638); it is sound.

    It has no delta, so that the checks of methods without one are seen to work.
    """

    name = "scaling"
    paper = "https://arxiv.org/abs/2205.05638"
    site_kinds = frozenset({"linear"})
    reads_weight = True

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {"l": nn.Parameter(torch.ones(site.shape[0]))}

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return site.scale_output(y, p["l"].to(y.dtype))

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        factor = p["l"].to(weight.dtype)  # (out,)
        return factor[:, None] * weight, None if bias is None else factor * bias


class Gating(Method):
    """A trained factor for each input channel (https://arxiv.org/abs/2205.05638); it is sound, and changes inputs."""

    name = "gating"
    paper = "https://arxiv.org/abs/2205.05638"
    site_kinds = frozenset({"linear"})
    reads_weight = True

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {"l": nn.Parameter(torch.ones(site.shape[1]))}

    def before(self, p: Params, args: Args, kwargs: Kwargs, site: Site) -> tuple[Args, Kwargs]:
        if args:
            return ((args[0] * p["l"]).to(args[0].dtype), *args[1:]), kwargs
        return args, {name: (x * p["l"]).to(x.dtype) for name, x in kwargs.items()}

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return weight * p["l"].to(weight.dtype), bias


class Projected(VeRA):
    """VeRA on one kind of layer: it is sound, and its layers share two matrices."""

    site_kinds = frozenset({"linear"})


class Stepping(Sound):
    """LoRA that halves B's gradient before each step and counts them: sound, with step rules and a penalty."""

    peft_type = None

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {**super().init(site, rng), "count": torch.zeros(1, dtype=torch.int64)}

    def before_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        if p["B"].grad is not None:
            p["B"].grad.mul_(0.5)

    def after_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        p["count"].add_(1)

    def penalty(self, p: Params, site: Site) -> Tensor | None:
        return p["A"].square().sum()


def documented(cls: C) -> C:
    """Mention the options in the docstring."""
    if options := ", ".join(cls.__dataclass_fields__):
        cls.__doc__ = f"{cls.__doc__} Options: {options}."
    return cls


def trips(*checks: str) -> Any:
    """Say which checks the bug must trip, and give it a docstring that mentions the options."""

    def note(cls: C) -> C:
        BUGS[cls] = checks
        return documented(cls)

    return note


for sound in (Sound, Projected, Stepping):
    documented(sound)


# What it says of itself --------------------------------------------------------------------------


@trips("documented")
class PaperWithoutUrl(Sound):
    """A citation where the URL should be."""

    paper = "Hu et al. 2021"


class SilentOnOptions(Sound):
    """A docstring that does not name the options."""


BUGS[SilentOnOptions] = ("documented",)


@trips("site_kinds_are_known")
class MisspeltKind(Sound):
    """Claims a kind of layer that there is not."""

    site_kinds = frozenset({"linear", "linaer"})


@trips("site_kinds_are_known", "unsupported_layers_are_refused")
class KindsInAString(Sound):
    """Claims one kind in a string, of which `linear` is a part."""

    site_kinds = "transposed_linear"  # type: ignore[assignment]


@trips("options_survive_json")
class ComparedByIdentity(Sound):
    """Two with the same options are not equal."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


@trips("options_survive_json")
class Mutable(Sound):
    """Its options can be changed after they were validated."""

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@trips("wrong_options_are_refused")
class Unvalidated(Sound):
    """Its own __post_init__ forgets the inherited one."""

    def __post_init__(self) -> None:
        self.check()


# init -----------------------------------------------------------------------------------------------


@trips("identity_at_init")
class RandomStart(Sound):
    """Draws B where it should be zero."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        start = super().init(site, rng)
        return {**start, "B": nn.Parameter(torch.randn(start["B"].shape, generator=rng))}


@trips("init_gives_trainable_tensors")
class SharedMemory(Sound):
    """Cuts A and B out of one buffer."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        start = super().init(site, rng)
        buffer = torch.cat([start["A"].detach().flatten(), start["B"].detach().flatten()])
        A, B = buffer.split([start["A"].numel(), start["B"].numel()])
        return {"A": nn.Parameter(A.view(start["A"].shape)), "B": nn.Parameter(B.view(start["B"].shape))}


@trips("init_gives_trainable_tensors")
class TransposedStart(Sound):
    """Gives a view that is not contiguous."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {**super().init(site, rng), "B": nn.Parameter(torch.zeros(self.rank, site.shape[0]).mT)}


@trips(
    "init_gives_trainable_tensors",
    "off_is_exact",
    "base_names_unchanged",
    "only_adapter_gets_gradients",
    "two_adapters_add_up",
    "unmerge_is_exact",
    "casts_and_copies",
    "inference_keeps_nothing_else",
    "half_precision_base",
    "chains_lose_nothing",
    "batches_are_their_rows",
)
class TakenName(Sound):
    """Names a frozen tensor as live models name something else."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {**super().init(site, rng), "before": torch.zeros(1)}

    def pack(self, p: Params) -> Mapping[str, Tensor]:
        return {name: t for name, t in p.items() if name != "before"}

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        return {**saved, "before": torch.zeros(1)}


@trips("init_depends_on_seed_and_name", "global_rng_untouched")
class GlobalStart(Sound):
    """Draws from the global random state."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {**super().init(site, rng), "A": nn.Parameter(torch.randn(self.rank, site.shape[1]))}


@trips("init_depends_on_seed_and_name")
class CountedStart(Sound):
    """Seeds by a counter, so that the order of the sites matters."""

    count = itertools.count()

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return super().init(site, rng.manual_seed(next(self.count)))


@trips("global_rng_untouched")
class ScratchLayer(Sound):
    """Makes a layer for its shapes, which draws its weights."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        nn.Linear(site.shape[1], self.rank)
        return super().init(site, rng)


# What layers share -----------------------------------------------------------------------------------


@trips("shared_depends_on_shapes", "global_rng_untouched")
class SharedFromGlobal(Projected):
    """Draws the shared matrices from the global random state."""

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        return {name: torch.rand(t.shape) for name, t in super().shared(sites).items()}


@trips("shared_depends_on_shapes")
class SharedFromCache(Projected):
    """Makes the shared matrices once for each rank, whatever model comes next."""

    made: ClassVar[dict[int, Mapping[str, Tensor]]] = {}

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        return self.made.setdefault(self.rank, super().shared(sites))


@trips("shared_depends_on_shapes")
class SharedFromWeights(Projected):
    """Takes the size of the shared matrices from a layer's weight, which a file does not have."""

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        return {name: t * sites[0].weight.std().float() for name, t in super().shared(sites).items()}


@trips("shared_is_kept_once")
class SharedAside(Projected):
    """Keeps the shared matrices in the class, and looks them up there."""

    kept: ClassVar[dict[int, Mapping[str, Tensor]]] = {}

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        made = super().shared(sites)
        self.kept.setdefault(self.rank, {name: t.clone() for name, t in made.items()})
        return made

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        kept = {name: t.to(p["b"].dtype) for name, t in self.kept[self.rank].items()}
        return super().forward(Params({**p, **kept}), x, y, site)


# forward and merge -----------------------------------------------------------------------------------


@trips("merge_equals_forward", "two_adapters_add_up")
class TorchtuneDoraBias(Scaling):
    """Scales the bias in forward and not in merge, as torchtune's DoRALinear did."""

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return super().merge(p, weight, bias, site)[0], bias


@trips("merge_goes_by_rows")
class RowsFromTheTop(Scaling):
    """Takes as many of the factors as there are rows, and always the first."""

    def rows(self, p: Params, start: int, stop: int, site: Site) -> Params:
        return Params({"l": p["l"][: stop - start]})


@trips("merge_equals_forward", "two_adapters_add_up", "chains_lose_nothing")
class LycorisDoubleScale(Sound):
    """Multiplies by α/r once more in merge, as LyCORIS's LoHa and LoKr did."""

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * self.delta(p, site).dense().to(weight.dtype), bias


@trips(
    "merge_equals_forward",
    "two_adapters_add_up",
    "chains_lose_nothing",
    "batches_are_their_rows",
    "adds_delta_in_training",
)
class UnscaledForward(Sound):
    """Forgets α/r in forward."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y + F.linear(F.linear(x, p["A"]), p["B"]).to(y.dtype)


@trips("merge_is_pure", "two_adapters_add_up", "unmerge_is_exact")
class InPlaceMerge(Sound):
    """Adds to the weight that it is given."""

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        weight += self.delta(p, site).dense().to(weight.dtype)
        return weight, bias


@trips("base_untouched")
class ReachesForWeight(Sound):
    """Reads the weight past the site, so that the base gets gradients where it is not frozen."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        assert site.module is not None
        return super().forward(p, x, y, site) + 0 * site.module.get_parameter("weight").sum().to(y.dtype)


@trips("base_untouched")
class CachesOnModule(Sound):
    """Leaves an attribute on the base module."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        assert site.module is not None
        site.module.lora_rank = self.rank  # type: ignore[assignment]
        return super().forward(p, x, y, site)


# Inputs -------------------------------------------------------------------------------------------------


@trips(
    "before_is_pure",
    "before_finds_the_input",
    "base_untouched",
    "merge_equals_forward",
    "gradcheck",
    "off_is_exact",
    "only_adapter_gets_gradients",
    "two_adapters_add_up",
    "unmerge_is_exact",
    "casts_and_copies",
    "inference_keeps_nothing_else",
    "half_precision_base",
    "batches_are_their_rows",
)
class GatesInPlace(Gating):
    """Multiplies the input that it is given, which others see too."""

    def before(self, p: Params, args: Args, kwargs: Kwargs, site: Site) -> tuple[Args, Kwargs]:
        for x in (*args, *kwargs.values()):
            x *= p["l"]
        return args, kwargs


@trips("before_finds_the_input")
class GatesByPosition(Gating):
    """Does nothing to an input that is passed by name."""

    def before(self, p: Params, args: Args, kwargs: Kwargs, site: Site) -> tuple[Args, Kwargs]:
        return super().before(p, args, kwargs, site) if args else (args, kwargs)


@trips("two_adapters_add_up")
class GatesFromCache(Gating):
    """Keeps the scaled input for the next who asks, and that is the other adapter of the layer."""

    scaled: ClassVar[WeakTensorKeyDictionary] = WeakTensorKeyDictionary()

    def before(self, p: Params, args: Args, kwargs: Kwargs, site: Site) -> tuple[Args, Kwargs]:
        if torch.is_grad_enabled():
            return super().before(p, args, kwargs, site)
        (x,) = (*args, *kwargs.values())
        if x not in self.scaled:
            self.scaled[x] = (x * p["l"]).to(x.dtype)
        return ((self.scaled[x],), {}) if args else ((), dict.fromkeys(kwargs, self.scaled[x]))


# Gradients --------------------------------------------------------------------------------------------


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / 2


@trips("gradcheck")
class HalfGradient(Sound):
    """Its own backward is off by a factor."""

    def delta(self, p: Params, site: Site) -> LowRank:
        return super().delta(Params({**p, "A": _HalfGradient.apply(p["A"])}), site)  # type: ignore[no-untyped-call]


@trips("gradcheck")
class HalfInputGradient(Sound):
    """Holds a part constant, as it declares, and the gradient of the input is wrong."""

    exact_gradients = False

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return super().forward(p, _HalfGradient.apply(x), y, site)  # type: ignore[no-untyped-call]


@trips("groups_partition_parameters")
class DropsParameter(Sound):
    """Gives only B to the optimizer."""

    def groups(self, params: Mapping[str, Sequence[nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        return [{"params": params["B"], "lr": 16 * lr}]


@trips("groups_partition_parameters")
class TakesParameterTwice(Sound):
    """LoRA+ with the group of all still in it."""

    def groups(self, params: Mapping[str, Sequence[nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        return [*super().groups(params, lr), {"params": params["B"], "lr": 16 * lr}]


@trips("only_adapter_gets_gradients", "gradcheck")
class DetachedA(Sound):
    """Declares A trained and detaches it."""

    def delta(self, p: Params, site: Site) -> LowRank:
        return super().delta(Params({**p, "A": p["A"].detach()}), site)


@trips("only_adapter_gets_gradients")
class TrainsFrozen(Sound):
    """A is frozen, as in LoRA-FA, and forward asks for its gradient all the same."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        start = super().init(site, rng)
        return {**start, "A": start["A"].detach()}

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        p["A"].requires_grad_()
        return super().forward(p, x, y, site)


# Step rules and penalties ----------------------------------------------------------------------------------


@trips("step_rules_change_own_tensors")
class MovesTheBase(Stepping):
    """Moves the weight itself after each step, as Delta-LoRA's own code does."""

    def after_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        assert site.module is not None
        site.module.get_parameter("weight").add_(self.delta(p, site).dense(), alpha=0.1)


@trips("step_rules_change_own_tensors")
class ReplacesTensors(Stepping):
    """Puts a new tensor where it should write into the old one."""

    def after_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        p["count"].data = p["count"] + 1


@trips("step_rules_change_own_tensors")
class StepsEverywhere(Stepping):
    """Turns to all adapters of the layer, those too that are not trained."""

    def after_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        assert site.module is not None
        for name, t in site.module.named_parameters():
            if name.endswith(".B"):
                t.clamp_(-0.1, 0.1)


@trips("step_rules_change_own_tensors")
class TakesGradientsForGranted(Stepping):
    """Fails at a layer that took no part in the loss."""

    def before_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        assert p["B"].grad is not None
        p["B"].grad.mul_(0.5)


@trips("training_resumes")
class CountsAside(Stepping):
    """Counts the steps on the class, where no checkpoint finds them."""

    count: ClassVar[Any] = itertools.count(1)

    def after_step(self, p: Params, site: Site, optimizer: torch.optim.Optimizer) -> None:
        p["B"].mul_(1 - 0.1 / next(self.count))


@trips("penalty_is_differentiable")
class PenaltyInNumbers(Stepping):
    """Its penalty is a number without a gradient."""

    def penalty(self, p: Params, site: Site) -> Tensor | None:
        return torch.tensor(p["A"].square().sum().item())


@trips("penalty_is_differentiable")
class PenaltyByRow(Stepping):
    """Forgets to sum."""

    def penalty(self, p: Params, site: Site) -> Tensor | None:
        return p["A"].square().sum(1)


@trips("penalty_is_differentiable")
class HalfPenalty(Stepping):
    """Its penalty's gradient is off by a factor."""

    def penalty(self, p: Params, site: Site) -> Tensor | None:
        A: Tensor = _HalfGradient.apply(p["A"])  # type: ignore[no-untyped-call]
        return A.square().sum()


# The delta ----------------------------------------------------------------------------------------------


@trips("delta_needs_no_module")
class UndeclaredWeight(Sound):
    """Its delta needs the module, and reads_weight is not declared."""

    def delta(self, p: Params, site: Site) -> LowRank:
        assert site.weight.shape == site.shape
        return super().delta(p, site)


@trips("outline_agrees_with_delta", "arithmetic_is_linear")
class WrongOutline(Sound):
    """Announces half of the rank."""

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return super().outline(shapes)._replace(rank=max(1, shapes["A"][0] // 2))


@trips("factors_are_the_delta")
class OtherFactors(Sound):
    """Names A first."""

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return super().outline(shapes)._replace(factors=("A", "B"))


@trips("factors_are_the_delta", "save_and_load")
class FlippedFactors(Sound):
    """Saves the rows of A in another order than those of B, where others would read a LoRA."""

    def pack(self, p: Params) -> Mapping[str, Tensor]:
        return {**p, "A": p["A"].flip(0)}

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        return {**saved, "A": saved["A"].flip(0)}

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        return super().outline(shapes)


@trips("carries_low_rank")
class SavesHalf(Sound):
    """Saves in float16."""

    def factors(self, delta: LowRank, bias: Tensor | None) -> Mapping[str, Tensor]:
        return {name: t.half().double() for name, t in super().factors(delta, bias).items()}


@trips("carries_low_rank")
class CarriesOneScale(Sound):
    """Forgets the scale that it is to carry."""

    @classmethod
    def carry(cls, ranks: Mapping[str, int], *, scale: float, bias: bool) -> LoRA:
        return super().carry(ranks, scale=1.0, bias=bias)


class _Squared(LowRank):
    def scaled(self, weight: float) -> LowRank:
        return LowRank(weight * self.B, weight * self.A, self.scale)


@trips("arithmetic_is_linear")
class ScalesBothFactors(Sound):
    """Its delta is not linear in its weight: both factors are multiplied."""

    def delta(self, p: Params, site: Site) -> LowRank:
        return _Squared(*super().delta(p, site))


# Files ----------------------------------------------------------------------------------------------------


@trips("pack_and_unpack_are_inverse", "save_and_load")
class PacksScaled(Sound):
    """Multiplies B by α/r for the file and divides it by that again, and both are rounded."""

    def pack(self, p: Params) -> Mapping[str, Tensor]:
        return {**p, "B": 1.1 * p["B"]}

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        return {**saved, "B": saved["B"] / 1.1}


@trips("pack_and_unpack_are_inverse")
class PacksMore(Sound):
    """Has a tensor without a key, so that its own tensors cannot be saved."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {**super().init(site, rng), "count": torch.zeros(1, dtype=torch.int64)}


@trips("pack_and_unpack_are_inverse")
class UnpacksOtherRows(Sound):
    """Packs the rows of A as they are, and reads them from the last to the first."""

    def unpack(self, saved: Params, site: Site) -> Mapping[str, Tensor]:
        return {**saved, "A": saved["A"].flip(0)}


@trips("save_and_load")
class ForgetsAlpha(Sound):
    """Writes the rank for α."""

    def to_peft(self) -> dict[str, Any]:
        return {**super().to_peft(), "lora_alpha": self.rank}


@trips("save_and_load", "files_are_reproducible")
class TwoOfOneKey(Sound):
    """Gives A and B the same place in the file."""

    def peft_keys(self) -> Mapping[str, Mapping[str, str]]:
        return {"": {"A": "lora_A.weight", "B": "lora_A.weight"}}


@trips("files_are_reproducible")
class CountsWrites(Sound):
    """Writes something that is another each time."""

    count = itertools.count()

    def to_peft(self) -> dict[str, Any]:
        return {**super().to_peft(), "lora_dropout": next(self.count) / 1000}


# On a live model --------------------------------------------------------------------------------------------


@trips(
    "off_is_exact",
    "base_untouched",
    "base_names_unchanged",
    "merge_equals_forward",
    "two_adapters_add_up",
    "unmerge_is_exact",
)
class TrainsTheBase(Sound):
    """Moves the weight itself, as PiSSA's own code does when it starts."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        site.weight.mul_(0.9)
        return super().init(site, rng)


@trips("base_names_unchanged", "base_untouched", "off_is_exact", "unmerge_is_exact")
class RegistersBuffer(Sound):
    """Keeps a buffer on the base module, which comes into its state dict."""

    def init(self, site: Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        assert site.module is not None
        site.module.register_buffer("lora_seed", torch.zeros(1), persistent=True)
        return super().init(site, rng)


@trips("two_adapters_add_up", "only_adapter_gets_gradients")
class InPlaceForward(Sound):
    """Adds to the base's output in place, which other adapters then take for the base's."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        y += site.apply(self.delta(p, site), x).to(y.dtype)
        return y


@trips("unmerge_is_exact", "base_untouched", "two_adapters_add_up")
class MergesIntoModule(Sound):
    """Writes the merged weight into the module itself."""

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        merged, bias = super().merge(p, weight, bias, site)
        site.weight.copy_(site.fold(merged))
        return merged, bias


@trips("casts_and_copies")
class KeepsTensors(Sound):
    """Keeps the scaled A for as long as A seems unchanged; a cast is not a change that a version counts."""

    kept: ClassVar[WeakTensorKeyDictionary] = WeakTensorKeyDictionary()

    def delta(self, p: Params, site: Site) -> LowRank:
        B, A, scale = super().delta(p, site)
        if torch.is_grad_enabled():
            return LowRank(B, A, scale)
        version, scaled = self.kept.get(p["A"], (None, A))
        if version != p["A"]._version:
            scaled = scale * A
            self.kept[p["A"]] = p["A"]._version, scaled
        return LowRank(B, scaled)


@trips("inference_keeps_nothing_else")
class KeepsProducts(Sound):
    """Lets what it computes from the input be kept."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        B, A, scale = self.delta(p, site)
        Ax = p.once("Ax", lambda: F.linear(x, A))
        return y + scale * F.linear(Ax, B)


@trips("half_precision_base", "unmerge_is_exact")
class MixedDtypes(Sound):
    """Multiplies by the weight in its own dtype, which is not the input's on a half-precision base."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return super().forward(p, x, y, site) + 0 * F.linear(x, site.weight)


class _Everything(frozenset[str]):
    def __contains__(self, kind: object) -> bool:
        return kind not in ("norm", "block")  # no delta is right there, which other checks would find


@trips("unsupported_layers_are_refused")
class ClaimsEverything(Sound):
    """Answers yes to every kind of layer that takes a delta."""

    site_kinds = _Everything({"linear"})


@trips("refusals_say_why")
class RefusesByTruth(Sound):
    """Says yes or no where a reason is asked for: no layer is left."""

    def refuses(self, site: Site) -> Any:
        return site.bias is None


@trips("chains_lose_nothing")
class ComputesAnew(Sound):
    """Has the layer's output computed anew, and drops what other adapters made of it."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return site.add(self.delta(p, site), x, site.call((x.to(site.like.dtype),), {}).to(y.dtype))


@trips("batches_are_their_rows")
class SkipsSingles(Sound):
    """Takes a batch of one for no batch at all."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y if len(x) == 1 else super().forward(p, x, y, site)


@trips("adds_delta_in_training")
class DropsUnsaid(Sound):
    """Drops some of its input in training, which its options do not tell."""

    def forward(self, p: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if site.module is not None and site.module.training:
            x = x * (torch.arange(x.shape[-1]) % 4 > 0).to(x)
        return super().forward(p, x, y, site)
