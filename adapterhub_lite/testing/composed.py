"""Compositions of a method's adapters: what a tree of them takes for granted."""

from __future__ import annotations

import torch

from .. import compose
from ..errors import AdapterError, NotMergeable
from ..protocol import Method
from .attached import Fixture
from .capability import adds_delta, has_delta, takes_any_output
from .check import check, require, within
from .weights import EXACT
from .zoo import difference, each_cell, examples, has_example

CHAIN = compose.chain("a", "b")


@check(has_example, takes_any_output)
def chains_lose_nothing(method: Method) -> str:
    """In a chain an adapter goes on from what the one before it gives; where that can be merged, it is the same."""
    worst = 0.0
    for example in examples(method):
        f = Fixture(method, example, torch.float64)
        f.adapters.activate("b")
        last = f()
        f.adapters.activate(CHAIN)
        live = f()
        require(
            difference(live, last) > EXACT,
            f"{f.kind}: of two adapters in a chain the first does nothing",
            fix="compute forward() from y, or declare takes_any_output = False",
        )
        try:
            f.adapters.merge()
        except NotMergeable:
            continue
        off = difference(f(), live)
        what = f"{f.kind}: live and merged differ for a chain"
        within(off, EXACT, what, fix="declare reads_weight if a rule looks at it")
        worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


@check(has_example)
def batches_are_their_rows(method: Method) -> str:
    """In a batch whose rows have compositions of their own, each row is what it is alone; the base's is its own."""
    worst = 0.0
    for example in examples(method):
        f = Fixture(method, example, torch.float64)
        each = [("a", None, "b")[n % 3] for n in range(len(f.x))]
        f.adapters.activate(each)
        try:
            got = f()
        except AdapterError:  # a layer that gets no batch, as one of positions
            continue
        for n, own in enumerate(each):
            f.adapters.activate(own)
            with torch.no_grad():
                alone = f.model(f.x[n : n + 1])[0]
            what = f"{f.kind}: a row of a batch is not what it is alone"
            off = difference(got[n], alone)
            within(off, EXACT, what, fix="compute each row from itself, and keep the batch in the first dimension")
            worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


@check(has_delta, adds_delta, has_example)
def adds_delta_in_training(method: Method) -> str:
    """Where `adds_delta` says so, `forward` adds what `delta` and `delta_bias` give in training mode too."""
    worst = 0.0
    for cell in each_cell(method):
        cell.module.train()
        x, y = cell.x, cell.y
        want, bias = cell.site.add(cell.delta(), x, y), cell.method.delta_bias(cell.p, cell.site)
        want = want if bias is None else cell.site.add_bias(bias, x, want)
        off = difference(cell.method.forward(cell.p, x, y, cell.site), want)
        within(off, EXACT, f"a {cell} adds something else in training", fix="declare adds_delta = False")
        worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


CHECKS = (chains_lose_nothing, batches_are_their_rows, adds_delta_in_training)
