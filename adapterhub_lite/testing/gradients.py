"""Training: which tensors get gradients, whether they are right, and where the optimizer finds them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from ..protocol import Method, Params
from .check import CheckFailed, check, one_line, require
from .zoo import cells, each_cell, examples, has_example

LR = 3e-4


@check(has_example)
def gradcheck(method: Method) -> str:
    """The gradients of `forward` are the derivatives of what it computes, in float64."""
    count = 0
    for cell in each_cell(method):
        # Where a part is held constant on purpose, only what the input gets is a derivative.
        names = sorted(cell.trained) if method.exact_gradients else []
        if not names and not cell.x.is_floating_point():
            continue
        # Of all derivatives, one combination with random weights is compared: a wrong one shows in it.
        try:
            torch.autograd.gradcheck(
                lambda x, *ts, cell=cell, names=names: cell.forward(
                    Params({**cell.p, **dict(zip(names, ts, strict=True))}), x
                ),
                (cell.x.detach().requires_grad_(cell.x.is_floating_point()), *(cell.p[name] for name in names)),
                fast_mode=True,
            )
        except GradcheckError as error:
            raise CheckFailed(
                f"wrong gradient on a {cell}: {one_line(error).removeprefix('GradcheckError: ')[:120]}",
                fix="correct the backward, or leave it to autograd",
            ) from None
        count += len(names)
    return f"{count} tensors" if method.exact_gradients else "of the input alone: a part is held constant on purpose"


@check(has_example)
def groups_partition_parameters(method: Method) -> str:
    """`groups` gives each trained parameter to exactly one optimizer group, and nothing else."""
    most = 0
    for example in examples(method):
        by_name: dict[str, list[nn.Parameter]] = {}
        for cell in cells(method, example).values():
            for name in sorted(cell.trained):
                by_name.setdefault(name, []).append(_parameter(cell.p[name]))
        want = {id(p): name for name, ps in by_name.items() for p in ps}
        groups = method.groups(by_name, LR)
        got = [id(p) for group in groups for p in group["params"]]
        left = sorted({name for key, name in want.items() if key not in got})
        require(not left, f"no group has {', '.join(left)}", fix="take every parameter that groups() is given")
        require(len(set(got)) == len(got), "a parameter is in two groups", fix="leave it in one")
        require(set(got) <= want.keys(), "a group has a tensor that is not trained", fix="take none but those given")
        for group in groups:
            lr = group.get("lr", LR)
            require(
                isinstance(lr, float) and math.isfinite(lr) and lr > 0,
                f"a group's lr is {lr!r}",
                fix="derive it from lr",
            )
        most = max(most, len(groups))
    return f"{most} groups" if most > 1 else "1 group"


def _parameter(t: Tensor) -> nn.Parameter:
    assert isinstance(t, nn.Parameter)
    return t


CHECKS = (gradcheck, groups_partition_parameters)
