"""Methods that change a layer's input: whatever way the layer is called, and without touching what it is given."""

from __future__ import annotations

import inspect

import torch

from ..protocol import Method
from .attached import WEIGHTS, Fixture
from .capability import has_before
from .check import check, require, within
from .weights import EXACT
from .zoo import bits, changed, difference, each_cell, examples, has_example


@check(has_example, has_before)
def before_is_pure(method: Method) -> str:
    """`before` gives a tuple and a dict, changes none of its arguments, and gives the same bits twice."""
    for cell in each_cell(method):
        given = {"x": cell.x.clone(), **cell.p}
        was, kwargs = bits(given), dict[str, object]()
        with torch.no_grad():
            calls = [cell.method.before(cell.p, (given["x"],), kwargs, cell.site) for _ in range(2)]
        for args, named in calls:
            require(
                isinstance(args, tuple) and isinstance(named, dict) and len(args) + len(named) == 1,
                f"before made another call than one with x of a {cell}",
                fix="return (args, kwargs), with x changed and the rest as it came",
            )
        touched = changed(was, given) + sorted(kwargs)
        require(not touched, f"before changed {', '.join(touched)} of a {cell} in place", fix="compute out of place")
        one, two = ((*args, *named.values())[0] for args, named in calls)
        require(torch.equal(one, two), f"before gave another input of a {cell} the second time", fix="keep nothing")
    return ""


@check(has_example, has_before)
def before_finds_the_input(method: Method) -> str:
    """A layer that is called with its input by name gives what it gives by position."""
    worst = 0.0
    for example in examples(method):
        f = Fixture(method, example, torch.float64)
        layer = f.model.get_submodule("first")
        (name, *_) = inspect.signature(layer.forward).parameters
        for active in ("a", WEIGHTS):
            f.adapters.activate(active)
            with torch.no_grad():
                off = difference(layer(**{name: f.x}), layer(f.x))
            within(
                off,
                EXACT,
                f"{f.kind}: another output if the input is passed as {name}=",
                fix="look for the input in kwargs if args is empty, and put the new one back there",
            )
            worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


CHECKS = (before_is_pure, before_finds_the_input)
