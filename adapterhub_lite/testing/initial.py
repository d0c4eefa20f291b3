"""What `init` gives: the tensors of a fresh adapter."""

from __future__ import annotations

import pickle
import random
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..live.tree import Part
from ..protocol import Method
from ..seed import generator
from .capability import starts_as_identity
from .check import check, one_line, require, within
from .zoo import bits, changed, difference, each_cell, examples, has_example

IDENTITY = 1e-5  # B A = 0 by orthogonality holds to float32's rounding


@check(has_example, starts_as_identity)
def identity_at_init(method: Method) -> str:
    """A fresh adapter leaves the base's output unchanged."""
    worst = 0.0
    for cell in each_cell(method, fresh=True):
        with torch.no_grad():
            off = difference(cell.forward(), cell.y)
        within(
            off, IDENTITY, f"a fresh adapter changes a {cell}", fix="let ΔW start at zero, or declare identity_at_init"
        )
        worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


@check(has_example)
def init_gives_trainable_tensors(method: Method) -> str:
    """`init` gives finite, contiguous tensors with memory of their own, trained ones among them."""
    count = 0
    for start in _starts(method).values():
        for name, t in start.items():
            require(
                isinstance(t, Tensor),
                f"{name!r} is a {type(t).__name__}, not a tensor",
                fix="give tensors; what is none belongs to the options",
            )
            require(
                re.fullmatch(r"[A-Za-z_]\w*", name) is not None,
                f"{name!r} cannot name a parameter",
                fix="use letters, digits and _",
            )
            require(bool(t.isfinite().all()), f"{name!r} is not finite at the start", fix="check the initialisation")
            require(
                t.is_contiguous(), f"{name!r} is not contiguous", fix="call .contiguous(): sharded training needs it"
            )
            require(t.grad_fn is None, f"{name!r} remembers how it was computed", fix="detach it")
        require(
            any(isinstance(t, nn.Parameter) for t in start.values()),
            "nothing is trained",
            fix="give what is trained as torch.nn.Parameter",
        )
        places = [t.untyped_storage().data_ptr() for t in start.values() if t.numel()]
        require(len(set(places)) == len(places), "two tensors share memory", fix="clone one of them")
        count += len(start)
    for cell in each_cell(method, fresh=True):
        try:
            Part(cell.method, cell.site, cell.own, cell.trained)
        except (KeyError, TypeError) as error:
            name = next((name for name in cell.own if repr(name) in str(error)), "?")
            require(
                False,
                f"{name!r} is a name that live models use for something else ({one_line(error)})",
                fix="call it something else",
            )
    return f"{count} tensors"


@check(has_example)
def init_depends_on_seed_and_name(method: Method) -> str:
    """`init` gives the same bits whatever the order of the sites and the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        forth = _starts(method)
        torch.default_generator.manual_seed(2)
        back = _starts(method, reverse=True)
    for where, start in forth.items():
        other = changed(bits(start), bits(back[where]))
        require(
            not other,
            f"{', '.join(other)} at {where} differ between two runs with the same seed",
            fix="draw from the generator that init is given, and keep nothing between calls",
        )
    return f"{len(forth)} sites"


@check(has_example)
def global_rng_untouched(method: Method) -> str:
    """`init` and `forward` leave the global random states alone."""
    before = _states()
    for cell in each_cell(method):
        cell.forward()
    after = _states()
    used = [library for library in before if before[library] != after[library]]
    require(
        not used, f"the random state of {', '.join(used)} was used", fix="draw from the generator that init is given"
    )
    return ""


def _starts(method: Method, *, reverse: bool = False) -> dict[str, Mapping[str, Any]]:
    """What `init` gives at every site, by kind and name."""
    found: dict[str, Mapping[str, Any]] = {}
    for example in examples(method):
        sites = list(example.sites(example.model(torch.float32), method).items())
        for name, site in reversed(sites) if reverse else sites:
            found[f"{example.kind} {name}"] = method.at(name).init(site, generator(0, name))
    return found


def _states() -> dict[str, bytes]:
    states = {"torch": torch.get_rng_state().numpy().tobytes(), "random": pickle.dumps(random.getstate())}
    if "numpy" in sys.modules:
        states["numpy"] = pickle.dumps(sys.modules["numpy"].random.get_state())
    return states


CHECKS = (identity_at_init, init_gives_trainable_tensors, init_depends_on_seed_and_name, global_rng_untouched)
