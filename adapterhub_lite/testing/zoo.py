"""Small models of one kind of layer each, with awkward shapes, and adapters on them.

No width equals another, some layers have a bias and some do not, convolutions come with
stride, padding, dilation and groups. Every model starts from the same weights and leaves
the global random state alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ConfigError, NotMergeable
from ..protocol import Method, Params
from ..registry import registry
from ..seed import generator
from .check import CheckSkipped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..delta import Delta
    from ..site import Site


class Stack(nn.Module):
    """Three layers with tanh between them."""

    def __init__(self, first: nn.Module, second: nn.Module, third: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.third = first, second, third

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y


class Lookup(nn.Module):
    """Embeddings of tokens (`first`) and positions (`second`)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(23, 12, padding_idx=0)
        self.second = nn.Embedding(9, 12)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        y: Tensor = torch.tanh(self.first(ids)) * self.second(positions)
        return y


class Block(nn.Module):
    """Two layers, behind a norm if `norm`; gives a tensor, or a tuple whose first element it is if `more`."""

    def __init__(self, into: int, inner: int, out: int, *, norm: bool = False, more: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(into, inner), nn.Linear(inner, out, bias=norm)
        self.norm = nn.LayerNorm(out) if norm else nn.Identity()
        self.more = more

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        inside = torch.tanh(self.up(hidden))
        y: Tensor = self.norm(self.down(inside))
        return (y, inside) if self.more else y


class Blocks(nn.Module):
    """Three blocks, one of them called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(12, 20, 40), Block(40, 16, 36, more=True)
        self.third = Block(36, 14, 56, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.second(hidden=torch.tanh(self.first(x)))
        y: Tensor = self.third(torch.tanh(hidden))
        return y


def _linear() -> nn.Module:
    return Stack(nn.Linear(12, 20), nn.Linear(20, 28, bias=False), nn.Linear(28, 8))


def _transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Stack(*(Conv1D(out, into) for into, out in ((12, 20), (20, 28), (28, 8))))  # type: ignore[no-untyped-call]


def _conv1d() -> nn.Module:
    return Stack(
        nn.Conv1d(4, 10, 3, stride=2, padding=1),
        nn.Conv1d(10, 14, 2, dilation=2, groups=2, bias=False),
        nn.Conv1d(14, 9, 3, padding=1, padding_mode="circular"),
    )


def _conv2d() -> nn.Module:
    return Stack(
        nn.Conv2d(3, 10, (3, 2), stride=(1, 2), padding=(2, 1)),
        nn.Conv2d(10, 14, (3, 5), dilation=(1, 2), padding="same", groups=2),
        nn.Conv2d(14, 9, 1, bias=False),
    )


def _conv3d() -> nn.Module:
    return Stack(
        nn.Conv3d(2, 8, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), bias=False),
        nn.Conv3d(8, 12, (1, 2, 2), groups=4, dilation=(1, 1, 2)),
        nn.Conv3d(12, 9, 1),
    )


def _norm() -> nn.Module:
    return Stack(nn.LayerNorm(12), nn.GroupNorm(3, 6), nn.Sequential(nn.Flatten(1), nn.RMSNorm(72)))


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: torch.randn(shape, generator=rng)


def _ids(rng: torch.Generator) -> Tensor:
    return torch.randint(0, 23, (3, 7), generator=rng)


@dataclass(frozen=True)
class Example:
    """A model whose adapted layers are all of one kind, and how to draw its input."""

    kind: str
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Tensor]
    needs: str | None = None  # a package that must be importable

    @property
    def available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in eval mode; its weights are exact in every dtype, so that casting is no change."""
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights when they are made
            model = self.make().eval()
        for name, p in model.named_parameters():
            nn.init.normal_(p, std=0.3, generator=generator(0, name))  # biases too: a zero one hides what is done to it
        return model.bfloat16().to(dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The model's input, in `dtype` if it is floating."""
        x = self.draw(generator(0, self.kind))
        return x.bfloat16().to(dtype) if x.is_floating_point() else x

    def sites(self, model: nn.Module, method: Method | None = None) -> dict[str, Site]:
        """The layers to adapt; those that `method` does not refuse, if it is given.

        Of a kind that takes modules of any class, those right below the model.
        """
        kind = registry().site_kinds()[self.kind]
        modules = model.named_children() if kind.general else model.named_modules()
        found = {name: kind.of(name, module) for name, module in modules if kind.accepts(module)}
        if method is None or not method.defines("refuses"):
            return found
        return {name: site for name, site in found.items() if method.at(name).refuses(site) is None}


EXAMPLES = {
    e.kind: e
    for e in (
        Example("linear", _linear, _normal(3, 5, 12)),
        Example("transposed_linear", _transposed, _normal(3, 5, 12), needs="transformers"),
        Example("conv1d", _conv1d, _normal(3, 4, 13)),
        Example("conv2d", _conv2d, _normal(2, 3, 5, 9)),
        Example("conv3d", _conv3d, _normal(2, 2, 3, 7, 5)),
        Example("embedding", Lookup, _ids),
        Example("block", Blocks, _normal(3, 5, 12)),
        Example("norm", _norm, _normal(3, 6, 12)),
    )
}


def examples(method: Method) -> list[Example]:
    """The models for the site kinds that `method` claims, with these options."""
    found = [EXAMPLES[kind] for kind in EXAMPLES if kind in method.site_kinds and untried(method, kind) is None]
    if not found:
        raise CheckSkipped("; ".join(f"{kind}: {untried(method, kind)}" for kind in sorted(method.site_kinds)))
    return found


def untried(method: Method, kind: str) -> str | None:
    """Why there are no layers of that kind to try, if so; one reason is that the options exclude it."""
    example = EXAMPLES.get(kind)
    if example is None:
        return "no example of such a layer"
    if not example.available:
        return f"{example.needs} is not installed"
    try:
        sites = example.sites(example.model(), method)
        if not sites:
            return "it refuses every such layer"
        for name, site in sites.items():
            method.at(name).init(site, generator(0, name))
    except NotMergeable as error:
        return error.what
    except Exception:  # a mistake, which the checks will find
        return None
    return None


def described(site: Site) -> str:
    """The layer in a few words: kind, shape of its weight, whether it has a bias."""
    if site.general:
        return f"{site.kind} {'×'.join(map(str, site.shape))}"
    bias = " with bias" if site.bias is not None else " without bias" if hasattr(site.module, "bias") else ""
    return f"{site.kind} {'×'.join(map(str, site.weight_shape))}{bias}"


def has_example(method: Method) -> str | None:
    """Why nothing can be tried, if so."""
    kinds = [kind for kind, example in EXAMPLES.items() if kind in method.site_kinds and example.available]
    return None if kinds else f"no example of {', '.join(sorted(method.site_kinds)) or 'any'} layers"


@dataclass(frozen=True)
class Cell:
    """An adapter at one layer, and the layer's own input x and output y."""

    method: Method  # as it holds at this site
    site: Site
    own: Params  # the tensors of this layer
    shared: Mapping[str, Tensor]  # those that all layers have in common
    trained: frozenset[str]
    x: Tensor
    y: Tensor

    def __str__(self) -> str:
        return described(self.site)

    @property
    def p(self) -> Params:
        """The tensors that the rules are given."""
        return Params({**self.shared, **self.own})

    @property
    def module(self) -> nn.Module:
        assert self.site.module is not None
        return self.site.module

    def forward(self, p: Params | None = None, x: Tensor | None = None) -> Tensor:
        """The adapted output; for other tensors or another input, if they are given."""
        p, new = self.p if p is None else p, self.x if x is None else x
        args, kwargs = self.method.before(p, (new,), {}, self.site)
        y = self.y if x is None and args[0] is new else self.base(*args, **kwargs)
        return self.method.forward(p, args[0], y, self.site)

    def base(self, x: Tensor) -> Tensor:
        """The base's output; its weights take no part in gradients."""
        out = functional_call(self.module, {n: t.detach() for n, t in self.module.named_parameters()}, x)
        return self.site.hidden(out)

    def delta(self) -> Delta:
        return self.method.delta(self.p, self.site)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the tensors as they are saved."""
        return {name: tuple(t.shape) for name, t in self.method.pack(self.own).items()}


def cells(
    method: Method, example: Example, *, seed: int = 0, dtype: torch.dtype = torch.float64, fresh: bool = False
) -> dict[str, Cell]:
    """An adapter at every site of a new model, its trained tensors moved off their start unless `fresh`.

    Base, inputs and adapter are all in `dtype`.
    """
    model = example.model(dtype)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    sites = example.sites(model, method)
    handles = [_watch(site, seen) for site in sites.values()]
    with torch.no_grad():
        model(example.input(dtype))
    for handle in handles:
        handle.remove()
    made = {}
    shared = {  # never less precise than they are drawn: a file may have them drawn again
        key: t.detach().to(torch.promote_types(dtype, t.dtype))
        for key, t in method.shared(list(sites.values())).items()
    }
    for name, site in sites.items():
        here = method.at(name)
        start = here.init(site, generator(seed, name))
        trained = frozenset(key for key, t in start.items() if isinstance(t, nn.Parameter))
        p = {key: t.detach().to(dtype if t.is_floating_point() else t.dtype) for key, t in start.items()}
        if not fresh:
            p.update({key: moved(p[key], seed, f"{name}.{key}") for key in trained})
        leaves = {key: nn.Parameter(t) if key in trained else t for key, t in p.items()}
        made[name] = Cell(here, site, Params(leaves), shared, trained, *seen[name])
    return made


def each_cell(
    method: Method, *, seed: int = 0, dtype: torch.dtype = torch.float64, fresh: bool = False
) -> Iterator[Cell]:
    """As `cells`, over all examples and both variants."""
    for own in variants(method):
        for example in examples(own):
            yield from cells(own, example, seed=seed, dtype=dtype, fresh=fresh).values()


def moved(t: Tensor, seed: int, name: str) -> Tensor:
    """`t` with noise of its own size added, so that no tensor is left at zero, or near it; exact in bfloat16 too."""
    noise = torch.randn(t.shape, generator=generator(seed, f"moved {name}")).to(t)
    size = t.square().mean().sqrt()
    return (t + 0.3 * (size if size > 1e-3 else 1.0) * noise).bfloat16().to(t.dtype).detach()


def variants(method: Method) -> list[Method]:
    """The method, and its sibling: with another rank the scaling is another too, and a default of 1 hides mistakes."""
    other = sibling(method)
    return [method] if other == method else [method, other]


def sibling(method: Method) -> Method:
    """The same method with another rank if it has one, so that two adapters differ in their options too."""
    if any(field.name == "rank" for field in dataclasses.fields(method)):
        rank: int = method.rank  # type: ignore[attr-defined]
        for other in (rank - 1, rank - 2, rank + 1, rank + 2):
            try:
                return replace(method, rank=other)  # type: ignore[call-arg]
            except ConfigError:
                continue
    return method


def difference(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry where that is above 1; infinite if shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    size = float(want.detach().double().abs().max()) if want.numel() else 0.0
    return float((got.detach().double() - want.detach().double()).abs().max()) / max(1.0, size)


def bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies to compare with later."""
    return {name: t.detach().clone() for name, t in tensors.items()}


def changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensor is missing, new, or differs in a bit."""
    same = {n for n in before.keys() & now.keys() if _equal(before[n], now[n])}
    return sorted((before.keys() | now.keys()) - same)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _watch(site: Site, seen: dict[str, tuple[Tensor, Tensor]]) -> torch.utils.hooks.RemovableHandle:
    assert site.module is not None

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen[site.name] = x.clone(), site.hidden(out).clone()  # no views: a rule may be one that writes into them

    return site.module.register_forward_hook(keep, with_kwargs=True)
