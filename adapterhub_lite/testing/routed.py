"""What a router does with any input, in any order of the ways, in any precision; what it trains; that it is saved."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import algebra, compose
from ..delta import Delta, LowRank
from ..live import Adapters, adapt, folder
from ..live.gating import Routing
from ..live.tree import slots
from ..registry import registry
from ..routing import Router
from ..source import read as read_tensor
from . import declared
from .check import check, require, within
from .zoo import bits, changed

WIDTH, OUT = 9, 6
RANKS = (2, 3, 0, 1)  # of the ways' ΔW; one adds nothing
SHAPES = ((WIDTH,), (1, WIDTH), (5, WIDTH), (2, 3, WIDTH))
BOUND = 1e-9
HALF = (torch.float16, torch.bfloat16)

Ways = list[dict[str, Tensor]]


def deltas() -> list[Delta]:
    """What each way adds to a weight, if the router looks at that."""
    found: list[Delta] = []
    for i, rank in enumerate(RANKS):
        rng = torch.Generator().manual_seed(i)
        B, A = torch.randn(OUT, rank, generator=rng), torch.randn(rank, WIDTH, generator=rng)
        found.append(LowRank(B, A, 0.5 + i))
    return found


def made(router: Router) -> list[Mapping[str, Tensor]]:
    """The tensors of every way as they begin."""
    own = deltas() if router.reads_delta else [algebra.nothing((OUT, WIDTH))] * len(RANKS)
    return [router.init(delta, WIDTH, torch.Generator().manual_seed(10 + i)) for i, delta in enumerate(own)]


def ways(router: Router) -> Ways:
    """The same in float64, what is trained off its start."""
    found: Ways = []
    for i, way in enumerate(made(router)):
        rng, own = torch.Generator().manual_seed(20 + i), dict[str, Tensor]()
        for name, t in way.items():
            moved = torch.randn(t.shape, generator=rng) if isinstance(t, nn.Parameter) else torch.zeros(())
            own[name] = t.detach().double() + moved
        found.append(own)
    return found


def hidden(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trains(router: Router) -> list[str]:
    """The names of a way's tensors that are trained."""
    return [name for name, t in made(router)[0].items() if isinstance(t, nn.Parameter)]


def _trains(router: Router) -> str | None:
    return None if trains(router) else "trains nothing"


def _alone(router: Router) -> str | None:
    return None if router.defines("alone") else "does not define alone()"


def _fixed(router: Router) -> str | None:
    return None if router.defines("fixed") else "does not define fixed()"


@check()
def init_gives_tensors(router: Router) -> str:
    """`init` gives every way the same names, which can be submodules', with finite floating tensors."""
    names = [sorted(way) for way in made(router)]
    require(
        names == names[:1] * len(names), f"ways have different tensors: {names}", fix="give all ways the same names"
    )
    require(bool(names[0]), "a way has no tensor, which is what a file knows it by", fix="give one, of a zero say")
    for way in made(router):
        for name, t in way.items():
            require(name.isidentifier(), f"a tensor is called {name!r}", fix="give it a Python name")
            require(t.is_floating_point(), f"{name} is of {t.dtype}", fix="give floating-point numbers")
            require(bool(t.isfinite().all()), f"{name} is not finite", fix="look for a division by 0")
    return ", ".join(names[0])


@check()
def init_is_deterministic(router: Router) -> str:
    """`init` depends on the generator that it is given, and not on torch's global one, which it leaves alone."""
    torch.manual_seed(1)
    first = made(router)
    state = torch.manual_seed(2).get_state()
    again = made(router)
    require(
        torch.equal(state, torch.default_generator.get_state()),
        "init draws from torch's global generator",
        fix="draw from rng",
    )
    same = all(torch.equal(way[name], other[name]) for way, other in zip(first, again, strict=True) for name in way)
    require(same, "init gives other numbers the second time", fix="draw from rng, and keep nothing")
    return "bit-equal"


@check()
def weights_are_finite(router: Router) -> str:
    """`weights` gives (…, ways) for every shape of input, finite, for inputs of zeros and for large ones too."""
    own = ways(router)
    for count in (1, len(own)):
        for shape in SHAPES:
            for size in (0.0, 1.0, 1e4):
                h = size * hidden(*shape)
                g = router.weights(own[:count], h)
                require(
                    tuple(g.shape) == (*shape[:-1], count),
                    f"weights of {count} ways for h {list(shape)} are {list(g.shape)}",
                    fix="give (…, ways)",
                )
                require(bool(g.isfinite().all()), f"a weight is not finite for h of size {size:g}", fix="guard it")
    return f"{len(SHAPES)} shapes"


@check()
def functions_are_pure(router: Router) -> str:
    """`weights`, `alone` and `fixed` change no tensor, draw no random numbers, and give the same bits again."""
    own, h = ways(router), hidden(5, WIDTH)
    given = {"h": h, **{f"{name}_{i}": t for i, way in enumerate(own) for name, t in way.items()}}
    before, state = bits(given), torch.default_generator.get_state()

    def all_of_it() -> Tensor:
        found = [router.weights(own, h)]
        found += [router.alone(way, h) for way in own] if router.defines("alone") else []
        found += [router.fixed(own)] if router.defines("fixed") else []
        return torch.cat([t.flatten() for t in found])

    first, again = all_of_it(), all_of_it()
    touched = changed(before, given)
    require(not touched, f"{', '.join(touched)} changed", fix="compute out of place")
    require(
        torch.equal(state, torch.default_generator.get_state()),
        "it draws from torch's global generator",
        fix="draw in init, from rng",
    )
    require(torch.equal(first, again), "the weights are others the second time", fix="keep nothing between calls")
    return "bit-equal"


@check()
def rows_count_for_themselves(router: Router) -> str:
    """A token's weights are the same alone, in a batch, and in a sequence."""
    own, h = ways(router), hidden(2, 3, WIDTH)
    whole = router.weights(own, h).reshape(6, len(own))
    rows = torch.stack([router.weights(own, row) for row in h.reshape(6, WIDTH)])
    flat = router.weights(own, h.reshape(6, WIDTH))
    worst = max(float((rows - whole).abs().max()), float((flat - whole).abs().max()))
    within(worst, BOUND, "a token's weights depend on those beside it", fix="reduce over the last axis only")
    return f"|diff| {worst:.1e}"


@check()
def order_of_ways_changes_nothing(router: Router) -> str:
    """Ways in another order have the same weights, in that order."""
    own, h, order = ways(router), hidden(5, WIDTH), [2, 0, 3, 1]
    want = router.weights(own, h)[..., order]
    difference = float((router.weights([own[i] for i in order], h) - want).abs().max())
    within(difference, BOUND, "a way's weight depends on its place", fix="use the ways' own tensors only")
    return f"|diff| {difference:.1e}"


@check()
def half_precision(router: Router) -> str:
    """With tensors and an input in half precision the weights are finite, and in half precision."""
    for dtype in HALF:
        own = [{name: t.to(dtype) for name, t in way.items()} for way in ways(router)]
        g = router.weights(own, hidden(5, WIDTH).to(dtype))
        require(g.dtype == dtype, f"the weights are {g.dtype} for {dtype}", fix="make tensors like h, h.new_zeros say")
        require(bool(g.isfinite().all()), f"a weight is not finite in {dtype}", fix="guard it")
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in HALF)


@check(_alone)
def alone_weighs_one_way(router: Router) -> str:
    """`alone` gives (…, 1), finite, and the same for a token whatever is beside it."""
    for way in ways(router):
        for shape in SHAPES:
            h = hidden(*shape)
            g = router.alone(way, h)
            require(
                tuple(g.shape) == (*shape[:-1], 1),
                f"the weight of a way for h {list(shape)} is {list(g.shape)}",
                fix="give (…, 1)",
            )
            require(bool(g.isfinite().all()), "the weight of a way is not finite", fix="guard it")
            rows = torch.stack([router.alone(way, row) for row in h.reshape(-1, WIDTH)]).reshape(g.shape)
            difference = float((rows - g).abs().max())
            within(difference, BOUND, "a token's weight depends on those beside it", fix="reduce over the last axis")
    return f"{len(SHAPES)} shapes"


@check(_fixed)
def fixed_holds_for_every_input(router: Router) -> str:
    """`fixed` gives (ways,), what `weights` gives for any input."""
    own = ways(router)
    g = router.fixed(own)
    require(tuple(g.shape) == (len(own),), f"fixed weights are {list(g.shape)}", fix="give (ways,)")
    worst = max(float((router.weights(own, hidden(*shape)) - g).abs().max()) for shape in SHAPES)
    within(worst, BOUND, "weights() gives others than fixed()", fix="define one of them")
    return f"|diff| {worst:.1e}"


def live(router: Router) -> tuple[nn.Module, Adapters, compose.Route]:
    """A model of two layers with a Route over an adapter, a composition, one at a single layer, and the base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, OUT), nn.Tanh(), nn.Linear(OUT, 4))
    adapters, cls = adapt(model), registry().method("lora")
    for i, name in enumerate("abc"):
        method = cls(rank=i + 1, init_weights="random")  # type: ignore[call-arg]
        adapters.add(name, method, "0" if name == "c" else "all-linear", seed=i)
    a, b, c = (compose.use(name) for name in "abc")
    route = adapters.add_router("which", router, [a, 0.5 * b - a, c, None])
    for i, (_, own) in enumerate(gates(model)):
        for name, p in own.named_parameters():
            if name in own.trained:
                p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model, adapters, route


def gates(model: nn.Module) -> list[tuple[str, Routing]]:
    """The router's tensors, by the names of the layers."""
    found = ((slot.site.name, own) for _, slot in slots(model) for own in slot.gates.values())
    return [(name, own) for name, own in found if isinstance(own, Routing)]


@check(_trains)
def gradients_reach_its_tensors_alone(router: Router) -> str:
    """What `init` gave to be trained gets gradients, way by way if `alone` is there, and nothing else does."""
    model, adapters, route = live(router)
    one_by_one: Sequence[int | None] = [0, 1] if router.defines("alone") else [None]
    for way in one_by_one:
        adapters.activate(route if way is None else route.alone(way), train="gates")
        model.zero_grad(set_to_none=True)
        model(hidden(5, WIDTH).float()).square().sum().backward()
        found = {name for name, p in model.named_parameters() if p.grad is not None}
        wanted = {
            f"{site}.adapters.which.{name}"
            for site, own in gates(model)
            for i, names in enumerate(own.names)
            for name in names.values()
            if name in own.trained and (way is None or i == way)
        }
        missing, others = sorted(wanted - found), sorted(found - wanted)
        require(not missing, f"no gradient reaches {missing[:1]}", fix="detach nothing, or give it as a plain Tensor")
        require(not others, f"a gradient reaches {others[:1]}", fix="use the ways' own tensors only")
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        require(all(bool(g.isfinite().all()) for g in grads), "a gradient is not finite", fix="guard it")
    return f"{len(trains(router))} tensors a way"


@check()
def saved_and_loaded_as_it_is(router: Router) -> str:
    """A composition with it comes back from its folder: the options, the tree, and every tensor bit by bit."""
    model, adapters, route = live(router)
    adapters.activate(route)
    with tempfile.TemporaryDirectory() as temp:
        adapters.save_composition(Path(temp) / "out")
        saved = folder.read(Path(temp) / "out", lambda name: type(router))
        require(saved.tree == route, "the tree is another one", fix="use options that JSON can carry")
        parts = [part for _, slot in slots(model) for part in slot.parts.values()]
        loaded = folder.gate_parts(saved, parts, Path(temp) / "out", read_tensor)
    again = {part.site.name: bits(dict(part.named_parameters())) for _, part in loaded}
    for site, own in gates(model):
        lost = changed(bits(dict(own.named_parameters())), again.get(site, {}))
        require(not lost, f"{', '.join(lost)} at {site} came back as something else", fix="give plain tensors in init")
    return f"{sum(len(own) for own in again.values())} tensors"


CHECKS = (
    declared.documented,
    declared.options_survive_json,
    declared.wrong_options_are_refused,
    init_gives_tensors,
    init_is_deterministic,
    weights_are_finite,
    functions_are_pure,
    rows_count_for_themselves,
    order_of_ways_changes_nothing,
    half_precision,
    alone_weighs_one_way,
    fixed_holds_for_every_input,
    gradients_reach_its_tensors_alone,
    saved_and_loaded_as_it_is,
)
