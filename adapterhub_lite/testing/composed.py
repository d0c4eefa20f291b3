"""Compositions of a method's adapters: what a tree of them takes for granted."""

from __future__ import annotations

import torch

from .. import compose
from ..errors import NotMergeable
from ..protocol import Method
from .attached import Fixture
from .capability import takes_any_output
from .check import check, require, within
from .weights import EXACT
from .zoo import difference, examples, has_example

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


CHECKS = (chains_lose_nothing,)
