"""Training with step rules and penalties: what they may change, and that a training can be taken up again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from ..protocol import Method, Params
from .attached import Fixture
from .capability import has_penalty, has_step_rule
from .check import CheckFailed, check, one_line, require
from .zoo import Example, bits, changed, each_cell, examples, has_example

LR = 1e-2


class Training:
    """An example model whose adapter "a" is trained, with its step rules; "b" is not active."""

    def __init__(self, method: Method, example: Example) -> None:
        self.f = Fixture(method, example, torch.float32)
        self.f.adapters.activate("a")
        self.optimizer = torch.optim.AdamW(self.f.adapters.param_groups(LR))
        self.f.adapters.register(self.optimizer)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss: Tensor = self.f.model(self.f.x).square().mean() + self.f.adapters.penalty()
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint has: copies of the state dicts."""
        return copy.deepcopy({"model": self.f.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, state: Mapping[str, Any]) -> None:
        self.f.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


@check(has_example, has_step_rule)
def step_rules_change_own_tensors(method: Method) -> str:
    """Step rules change gradients and tensors of the adapter that is trained, in place, and nothing else."""
    for example in examples(method):
        training = Training(method, example)
        f = training.f
        own = {name for name in f.tensors if ".adapters.a." in name}  # what all layers share is not one's own
        others = bits({name: t for name, t in f.tensors.items() if name not in own})
        places = {name: f.tensors[name].data_ptr() for name in own}
        training.run(2)
        training.optimizer.zero_grad()
        training.optimizer.step()  # as for a layer that took no part: no gradient is there
        now = dict(f.model.named_parameters())
        touched = changed(f.base, f.now())
        require(
            not touched,
            f"{f.kind}: a step rule changed {', '.join(touched)} of the base",
            fix="keep what moves in tensors from init: the base is frozen",
        )
        touched = changed(others, {name: now[name] for name in others})
        require(
            not touched,
            f"{f.kind}: a step rule for 'a' changed {', '.join(touched)}",
            fix="change none but the tensors that init gave for the layer",
        )
        strays = [name for name, p in now.items() if p.grad is not None and name not in f.trained]
        require(
            not strays,
            f"{f.kind}: a step rule left a gradient at {', '.join(strays)}",
            fix="change p[name].grad of trained tensors only",
        )
        for name in sorted(own):
            t = now[name]
            require(
                t is f.tensors[name] and t.data_ptr() == places[name] and t.requires_grad == (name in f.trained),
                f"{f.kind}: a step rule put another tensor in the place of {name}",
                fix="write into the tensors, with copy_ or add_: optimizers and sharding hold on to them",
            )
            require(bool(t.isfinite().all()), f"{f.kind}: {name} is not finite after steps", fix="guard the division")
    return ""


@check(has_example, has_step_rule)
def training_resumes(method: Method) -> str:
    """Taken up from the state dicts of model and optimizer, a training goes on bit by bit as if never stopped."""
    for example in examples(method):
        one, two = Training(method, example), Training(method, example)
        one.run(2)
        checkpoint = one.state()
        one.run(2)
        two.load(checkpoint)
        two.run(2)
        lost = changed(one.f.model.state_dict(), two.f.model.state_dict())
        require(
            not lost,
            f"{one.f.kind}: {', '.join(lost[:3])} differ where training went on from a checkpoint",
            fix="count in a tensor from init, and draw no random numbers in a step rule",
        )
    return ""


@check(has_example, has_penalty)
def penalty_is_differentiable(method: Method) -> str:
    """`penalty` gives None or a finite scalar; its gradients reach trained tensors alone, and are its derivatives."""
    terms = 0
    for cell in each_cell(method):
        cell.module.requires_grad_(True)  # a frozen base would hide that the rule reaches for it
        term = cell.method.penalty(cell.p, cell.site)
        if term is None:
            continue
        require(
            isinstance(term, Tensor) and term.ndim == 0 and term.is_floating_point(),
            f"the penalty of a {cell} is {_told(term)}, not a scalar",
            fix="sum it up, and give a tensor of shape ()",
        )
        require(
            bool(term.isfinite()), f"the penalty of a {cell} is {float(term.detach())}", fix="guard divisions and roots"
        )
        require(
            term.requires_grad,
            f"the penalty of a {cell} has no gradient",
            fix="compute it from trained tensors, and detach nothing",
        )
        term.backward()
        reached = [name for name, p in cell.module.named_parameters() if p.grad is not None]
        require(
            not reached,
            f"the penalty gives the frozen {', '.join(reached)} of a {cell} a gradient",
            fix="read site.weight, which is detached",
        )
        if method.exact_gradients:
            names = sorted(cell.trained)
            try:
                torch.autograd.gradcheck(
                    lambda *ts, cell=cell, names=names: cell.method.penalty(
                        Params({**cell.p, **dict(zip(names, ts, strict=True))}), cell.site
                    ),
                    tuple(cell.p[name] for name in names),
                    fast_mode=True,
                )
            except GradcheckError as error:
                raise CheckFailed(
                    f"wrong gradient of the penalty of a {cell}: "
                    f"{one_line(error).removeprefix('GradcheckError: ')[:120]}",
                    fix="correct the backward, or leave it to autograd",
                ) from None
        terms += 1
    return f"{terms} terms"


def _told(term: object) -> str:
    return f"a tensor {tuple(term.shape)} of {term.dtype}" if isinstance(term, Tensor) else f"a {type(term).__name__}"


CHECKS = (step_rules_change_own_tensors, training_resumes, penalty_is_differentiable)
