"""The rules at one layer: `forward` and `merge` are one function, and neither touches the base."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import NotMergeable
from ..protocol import Method
from .capability import has_merge, has_rows
from .check import CheckSkipped, check, require, within
from .zoo import Cell, bits, cells, changed, difference, each_cell, examples, has_example

EXACT = 1e-9  # float64, after a handful of products


@check(has_example, has_merge)
def merge_equals_forward(method: Method) -> str:
    """A plain layer with the merged weight and bias computes what `forward` does."""
    worst = 0.0
    for cell in each_cell(method):
        with torch.no_grad():
            off = difference(_merged(cell)(cell.x), cell.forward())
        within(
            off, EXACT, f"merge and forward disagree on a {cell}", fix="let both follow from delta() and delta_bias()"
        )
        worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


@check(has_example, has_merge)
def merge_is_pure(method: Method) -> str:
    """`merge` changes none of its arguments, and gives the same bits twice."""
    for cell in each_cell(method):
        given = _given(cell)
        before = bits(given)
        results = [_result(cell, given), _result(cell, given)]
        touched = changed(before, given)
        require(not touched, f"merge changed {', '.join(touched)} of a {cell}", fix="compute out of place")
        differing = changed(*results)
        require(
            not differing,
            f"merge gave another {', '.join(differing)} the second time",
            fix="keep nothing between calls",
        )
    return ""


@check(has_example, has_merge, has_rows)
def merge_goes_by_rows(method: Method) -> str:
    """`merge` with the tensors that `rows` gives for some of the outputs gives those rows of the whole."""
    tried = 0
    for cell in each_cell(method):
        whole, out = _result(cell, _given(cell)), cell.site.shape[0]
        for start, stop in ((0, 1), (1, out), (out // 2, out)):
            p = cell.method.rows(cell.p, start, stop, cell.site)
            if p is None:
                continue
            tried += 1
            given = {key: t[start:stop] if key.startswith("base ") else t for key, t in _given(cell).items()}
            piece = _result(replace(cell, own=p, shared={}, site=cell.site.narrow(stop - start)), given)
            for name, part in piece.items():
                off = difference(part, whole[name][start:stop])
                fix = "slice what belongs to outputs, or return None"
                within(off, EXACT, f"rows {start} to {stop} merged alone have another {name}, in a {cell}", fix=fix)
    require(tried > 0, "rows gave None for all layers", fix="leave it undefined")
    return f"{tried} pieces"


@check(has_example)
def base_untouched(method: Method) -> str:
    """No rule changes a base weight, gives it a gradient, or adds to its module.

    A rule may call the module's own forward: whether that has gradients is for whoever unfreezes the base to say.
    """
    for example in examples(method):
        pristine = example.model()
        for name, cell in cells(method, example).items():
            cell.module.requires_grad_(True)  # a frozen base would hide that a rule reaches for it
            own = copy.deepcopy(cell.module).requires_grad_(False)
            cell.module.__dict__["forward"] = own.forward
            cell.forward().square().sum().backward()
            del cell.module.__dict__["forward"]
            if has_merge(method) is None:
                with suppress(CheckSkipped):
                    _result(cell, _given(cell))
            was = pristine.get_submodule(name)
            touched = changed(was.state_dict(), cell.module.state_dict())
            require(not touched, f"a rule changed {', '.join(touched)} of a {cell}", fix="compute out of place")
            reached = [key for key, p in cell.module.named_parameters() if p.grad is not None]
            require(
                not reached,
                f"the frozen {', '.join(reached)} of a {cell} got a gradient",
                fix="read site.weight, which is detached",
            )
            added = sorted(_belongings(cell.module) ^ _belongings(was))
            require(not added, f"a rule left {', '.join(added)} on a {cell}", fix="keep state in the adapter's tensors")
    return ""


def _merged(cell: Cell) -> nn.Module:
    """The layer alone, with the merged weight and bias."""
    given = _given(cell)
    result = _result(cell, given)
    weight, bias = result["weight"], result.get("bias")
    require(
        weight.dtype == given["base weight"].dtype and weight.shape == given["base weight"].shape,
        f"merge turned a weight {tuple(given['base weight'].shape)} of {given['base weight'].dtype} into "
        f"{tuple(weight.shape)} of {weight.dtype}",
        fix="keep the shape (out, in) and the dtype",
    )
    require(
        bias is None or hasattr(cell.module, "bias"),
        f"merge gave a bias to a {cell}, which has no place for it",
        fix="give None",
    )
    plain = copy.deepcopy(cell.module)
    plain.register_parameter("weight", nn.Parameter(cell.site.fold(weight).clone()))
    if hasattr(plain, "bias"):
        plain.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return plain


def _given(cell: Cell) -> dict[str, Tensor]:
    """What `merge` is given: weight and bias in copies, and the adapter's tensors."""
    given = {"base weight": cell.site.weight.clone(), **cell.p}
    if cell.site.bias is not None:
        given["base bias"] = cell.site.bias.clone()
    return given


def _result(cell: Cell, given: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        try:
            weight, bias = cell.method.merge(cell.p, given["base weight"], given.get("base bias"), cell.site)
        except NotMergeable as error:  # the declared way to say so where it depends on options or layers
            raise CheckSkipped(str(error)) from None
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _belongings(module: nn.Module) -> set[str]:
    """All that hangs on a module, by name; hooks are told by their number."""
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
    return {*module.__dict__, *module._buffers, *module._modules, *(f"hook {i + 1}" for i in range(hooks))}


CHECKS = (merge_equals_forward, merge_is_pure, merge_goes_by_rows, base_untouched)
