"""The delta: what is known of it beforehand, how it is carried, and that it adds up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapter import Adapter
from ..delta import LowRank, Outline
from ..plan import carrier
from ..protocol import Method, Params
from ..seed import generator
from ..source import factors_told
from .capability import carries, has_delta, ignores_weight
from .check import CheckSkipped, check, require, within
from .weights import EXACT
from .zoo import Cell, cells, described, difference, each_cell, examples, has_example, sibling

if TYPE_CHECKING:
    from ..site import Site


@check(has_example, has_delta, ignores_weight)
def delta_needs_no_module(method: Method) -> str:
    """`delta` works at sites that are known from a file's header alone, and gives the same there."""
    for cell in each_cell(method):
        bare = type(cell.site)(cell.site.name, cell.site.weight_shape)
        got, want = cell.method.delta(cell.p, bare), cell.delta()
        within(
            difference(got.dense(), want.dense()),
            0.0,
            f"another delta without the module of a {cell}",
            fix="compute it from the tensors and site.shape alone, or declare reads_weight",
        )
        require(
            want.shape == cell.site.shape,
            f"ΔW {want.shape} of a {cell}, not {cell.site.shape}",
            fix="use the matrix form",
        )
    return ""


@check(has_example, has_delta)
def outline_agrees_with_delta(method: Method) -> str:
    """`outline` tells from shapes what rank, scale and bias the delta will have."""
    ranks = set()
    for cell in each_cell(method):
        delta, bias = cell.delta(), cell.method.delta_bias(cell.p, cell.site)
        low = isinstance(delta, LowRank)
        got = Outline(delta.rank, delta.scale, bias is not None) if isinstance(delta, LowRank) else None
        told = cell.method.outline(cell.shapes())
        want = got or Outline(None, told.scale, bias is not None)
        require(
            told._replace(factors=None) == want,
            f"the outline of a {cell} says {_told(told)}, and the delta has {_told(want)}",
            fix="derive the outline from the same shapes and options",
        )
        if low:
            ranks.add(want.rank)
    return f"ranks {', '.join(map(str, sorted(r for r in ranks if r is not None)))}" if ranks else "not low rank"


@check(has_example, has_delta)
def factors_are_the_delta(method: Method) -> str:
    """The saved tensors that `outline` names as factors are B and A of the delta: folding reads nothing else."""
    worst, seen = 0.0, 0
    for cell in each_cell(method):
        outline = cell.method.outline(cell.shapes())
        names = factors_told(cell.method, outline)
        if names is None:
            continue
        saved = cell.method.pack(cell.own)
        for name in names:
            require(name in saved, f"no tensor {name!r} is saved of a {cell}", fix="name tensors that pack() gives")
        B, A = (saved[name].detach().flatten(1) for name in names)
        want = cell.delta().dense()
        fits = (len(B), A.shape[1]) == want.shape and B.shape[1] == len(A)
        require(
            fits,
            f"of a {cell}, {names[0]} {tuple(B.shape)} and {names[1]} {tuple(A.shape)} are no factors of ΔW "
            f"{tuple(want.shape)}",
            fix="name B (out, r) first, and then A (r, in)",
        )
        off = difference(outline.scale * (B @ A), want)
        within(off, EXACT, f"scale · B A is another ΔW of a {cell}", fix="name no factors, or those of delta()")
        worst, seen = max(worst, off), seen + 1
    if not seen:
        raise CheckSkipped("declares no factors in its outline()")
    return f"max |diff| {worst:.1e}"


@check(has_example, carries)
def carries_low_rank(method: Method) -> str:
    """`carry`, `tensor_shapes` and `factors` hold any low-rank delta, its scale and its bias, and give it back."""
    worst = 0.0
    for example in examples(method):
        sites = example.sites(example.model(), method)
        ranks = {name: 1 + 2 * i for i, name in enumerate(sites)}
        for scale, with_bias in ((0.75, True), (2.0, False), (1 / 3, False)):
            own = type(method).carry(ranks, scale=scale, bias=with_bias)
            for name, site in sites.items():
                if with_bias and not hasattr(site.module, "bias"):
                    continue  # such layers have no bias to change
                off = _carried(own.at(name), site, ranks[name], scale, with_bias)
                within(
                    off,
                    EXACT,
                    f"carry(scale={scale:g}, bias={with_bias}) gives back another delta at a {described(site)}",
                    fix="let factors() undo what delta() and delta_bias() do",
                )
                worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


@check(has_example, has_delta)
def arithmetic_is_linear(method: Method) -> str:
    """0.7 a - 0.3 b of two adapters with other ranks is the dense sum of their deltas, also as it would be stored."""
    worst = 0.0
    for example in examples(method):
        other = sibling(method)
        a, b = cells(method, example), cells(other, example, seed=1)
        mix = 0.7 * _held(method, a) - 0.3 * _held(other, b)
        for name in a:
            # Dense first, then summed: what algebra does with factors must come to the same.
            want = 0.7 * a[name].delta().dense() - 0.3 * b[name].delta().dense()
            off = difference(mix.delta(name).dense(), want)
            within(
                off, EXACT, f"0.7 a - 0.3 b is off on a {a[name]}", fix="return LowRank, Sparse or Dense as they are"
            )
            worst = max(worst, off)
        if example.kind not in carrier().site_kinds:
            continue  # no file can hold the sum
        within(
            float(mix.error),
            EXACT,
            f"what would be stored of 0.7 a - 0.3 b is off on {example.kind} layers",
            fix="let outline() announce the delta's rank, scale and bias",
        )
    return f"max |diff| {worst:.1e}"


def _carried(carrier: Method, site: Site, rank: int, scale: float, with_bias: bool) -> float:
    """How far the delta, its bias and its scale are from what was to be carried."""
    (out, into), rng = site.shape, generator(0, site.name)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    want, zero = LowRank(draw(out, rank), draw(rank, into), scale), torch.zeros(out, dtype=torch.float64)
    bias = draw(out) if with_bias else None
    given = carrier.factors(want, bias)
    shapes = carrier.tensor_shapes(site.kind, site.shape, site.kernel)
    lacking = sorted(shapes.keys() - given.keys())
    require(not lacking, f"factors() lacks {', '.join(lacking)}", fix="give all that tensor_shapes() names")
    p = Params({key: given[key].reshape(shape) for key, shape in shapes.items()})
    got, kept = carrier.delta(p, site), carrier.delta_bias(p, site)
    off = max(
        difference(got.dense(), want.dense()),
        difference(zero if kept is None else kept, zero if bias is None else bias),
    )
    return max(off, abs(got.scale - scale)) if isinstance(got, LowRank) else off


def _held(method: Method, made: Mapping[str, Cell]) -> Adapter:
    shared = next(iter(made.values())).shared
    return Adapter.of(method, {n: c.site for n, c in made.items()}, {n: c.own for n, c in made.items()}, shared)


def _told(outline: Outline) -> str:
    rank = "no low rank" if outline.rank is None else f"rank {outline.rank}"
    return f"{rank}, scale {outline.scale:g}, {'a' if outline.bias else 'no'} bias"


CHECKS = (
    delta_needs_no_module,
    outline_agrees_with_delta,
    factors_are_the_delta,
    carries_low_rank,
    arithmetic_is_linear,
)
