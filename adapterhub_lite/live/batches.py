"""A batch whose rows have compositions of their own, at one site.

Rows of low-rank adapters go together, y + B (c ⊙ A x): with the factors of all adapters in A and B and each row's
weights in c, or with each row's own factors, by what is less work. Others go group by group, each as it would alone.
What is known before a forward is in plans, which all layers of the same ranks share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import compose
from ..delta import LowRank
from ..errors import AdapterError
from ..site.linear import LinearSite
from .gating import GatePart
from .kept import Kept
from .program import Call, Program, program
from .stacks import Held, Sources, Stacks, passing

# What a number costs that is moved, and one that is multiplied row by row, of one that is multiplied together: measured
# on a CPU. A permutation of the rows costs as much as STRETCH.
MOVED, MOVED_BY_ROW, BY_ROW, STRETCH = 8.0, 12.0, 2.3, 1000.0

Uses = tuple[tuple[int, float], ...]  # what a row has: numbers of adapters, and their weights


class Bucket(NamedTuple):
    """Rows whose factors have the same rank in all."""

    uses: tuple[tuple[int, ...], ...]  # by row: numbers of adapters
    coefficients: Tensor  # (rows, 1, rank), weights times scales
    scale: float | None  # all of them, where they are alike

    @property
    def rank(self) -> int:
        return self.coefficients.shape[-1]


class Plan(NamedTuple):
    """How the rows of a batch are computed at layers where these adapters have these ranks."""

    uses: tuple[Uses, ...]
    scales: tuple[float, ...]
    coefficients: Tensor  # (rows, 1, Σr): c, weights times scales
    buckets: tuple[Bucket, ...]
    order: Tensor | None  # (rows,): by bucket; None if they are
    back: Tensor | None  # (rows,): its inverse
    widths: int  # the sum of all rows' ranks

    def together(self, tokens: int) -> bool:
        """Whether it is less work to multiply all rows, of so many tokens, by all factors."""
        rows, _, total = self.coefficients.shape
        by_row = self.widths * (BY_ROW * tokens + MOVED_BY_ROW) + STRETCH * (len(self.buckets) - 1)
        return total * (rows * tokens + MOVED) <= by_row


Plans = dict[Any, Plan]


def planned(uses: Sequence[Uses], ranks: Sequence[int], scales: Sequence[float], like: Tensor) -> Plan:
    """For what each row uses, on the device and in the dtype of `like`."""
    c = torch.zeros(len(uses), 1, sum(ranks), dtype=torch.float64)
    own = []
    for n, row in enumerate(uses):
        parts = [torch.full((ranks[i],), weight * scales[i], dtype=torch.float64) for i, weight in row]
        for (i, _), part in zip(row, parts, strict=True):
            start = sum(ranks[:i])
            c[n, 0, start : start + ranks[i]] = part
        own.append(torch.cat([torch.zeros(0, dtype=torch.float64), *parts])[None])
    order = sorted(range(len(uses)), key=lambda n: own[n].numel())
    buckets = []
    for width in sorted({t.numel() for t in own}):
        rows = [n for n in order if own[n].numel() == width]
        weights = torch.stack([own[n] for n in rows])
        alike = bool(width) and bool((weights == weights[0, 0, 0]).all())
        numbers = tuple(tuple(i for i, _ in uses[n]) for n in rows)
        buckets.append(Bucket(numbers, weights.to(like), float(weights[0, 0, 0]) if alike else None))
    places = None if order == list(range(len(uses))) else torch.tensor(order, device=like.device)
    back = None if places is None else places.argsort()
    return Plan(tuple(uses), tuple(scales), c.to(like), tuple(buckets), places, back, sum(t.numel() for t in own))


class Stack(NamedTuple):
    """The low-rank adapters of a batch at a linear layer."""

    parts: tuple[Any, ...]  # of type Part
    direct: Sources | None  # of all A and then of all B, where these are their own
    plan: Plan
    adds_delta: bool  # all of them, in training too
    on: Tensor | None  # (rows,): whether it is one of these; None if all are
    held: Held

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        """For x (rows, …, in) and y (rows, …, out), in y's dtype; computed in the adapters'."""
        plan, kept = self.plan, None
        tensors: list[Tensor] = []
        if self.direct is not None:
            if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                kept = self.parts[0].kept  # while `inference` lasts
            if kept is None:
                tensors = self.direct.tensors()
        else:
            deltas = [part.method.delta(part.params(), part.site) for part in self.parts]
            tensors, scales = [*(d.A for d in deltas), *(d.B for d in deltas)], tuple(d.scale for d in deltas)
            if scales != plan.scales:
                plan = planned(plan.uses, [d.rank for d in deltas], scales, tensors[0])
        dtype = tensors[0].dtype if self.direct is None else self.direct.first.dtype
        if x.ndim == 3 and x.dtype == dtype == y.dtype:
            z = self._product(plan, kept, tensors, x, y)
        else:
            x_3, y_3 = (t.to(dtype).reshape(len(t), -1, t.shape[-1]) for t in (x, y))  # (rows, tokens, …)
            z = self._product(plan, kept, tensors, x_3, y_3).reshape(y.shape)
        if self.on is not None:
            return torch.where(self.on.to(y.device).reshape(-1, *(1 for _ in y.shape[1:])), z.to(y.dtype), y)
        return z.to(y.dtype)

    def _product(self, plan: Plan, kept: Kept | None, tensors: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """For x (rows, tokens, in) and y (rows, tokens, out): y + B (c ⊙ A x)."""
        together, stacks = plan.together(x.shape[1]), None
        if kept is not None and self.direct is not None:
            make = _made_together if together else partial(_made_by_row, plan.buckets)
            stacks = self.held(kept, self.direct, together, make)
        if together:
            return _together(plan, stacks or _made_together(tensors), x, y)
        return _by_row(plan, tensors, stacks, x, y)


def _made_together(tensors: list[Tensor]) -> Stacks:
    """The factors of all adapters: A (Σr, in) and B (out, Σr)."""
    number = len(tensors) // 2
    return torch.cat(tensors[:number]), torch.cat(tensors[number:], dim=1)


def _together(plan: Plan, stacks: Stacks, x: Tensor, y: Tensor) -> Tensor:
    A, B = stacks
    h = F.linear(x, A)  # (rows, tokens, Σr)
    return y + F.linear(h * plan.coefficients.to(h), B)


def _rows(bucket: Bucket, tensors: list[Tensor], stack: Callable[[list[Tensor], int], Tensor]) -> Stacks:
    """The factors of each row: A (rows, r, in) and B (rows, out, r)."""
    A, B = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    return (
        stack([A[row[0]] if len(row) == 1 else torch.cat([A[i] for i in row]) for row in bucket.uses], 0),
        stack([B[row[0]] if len(row) == 1 else torch.cat([B[i] for i in row], 1) for row in bucket.uses], 1),
    )


def _made_by_row(buckets: Sequence[Bucket], tensors: list[Tensor]) -> Stacks:
    """The factors of each row, to be kept: A, and B transposed, of each bucket in turn."""
    made = [_rows(bucket, tensors, lambda own, _: torch.stack(own)) for bucket in buckets if bucket.rank]
    return tuple(t for A, B in made for t in (A, B.mT.contiguous()))  # (rows, r, out) is multiplied faster


def _by_row(plan: Plan, tensors: list[Tensor], kept: Stacks | None, x: Tensor, y: Tensor) -> Tensor:
    """Made of the `tensors` now, or of what was `kept` of them."""
    ready = iter(() if kept is None else kept)

    def product(bucket: Bucket, x: Tensor, y: Tensor) -> Tensor:
        if not bucket.rank:
            return y
        if kept is not None:
            return _product(bucket, next(ready), next(ready), x, y)
        A, B = _rows(bucket, tensors, passing)
        return _product(bucket, A, B.mT, x, y)

    if len(plan.buckets) == 1:
        return product(plan.buckets[0], x, y)
    if plan.order is not None:
        x, y = x[plan.order.to(x.device)], y[plan.order.to(y.device)]
    sizes = [len(bucket.uses) for bucket in plan.buckets]
    parts = zip(plan.buckets, x.split(sizes), y.split(sizes), strict=True)
    z = torch.cat([product(bucket, x_b, y_b) for bucket, x_b, y_b in parts])
    return z if plan.back is None else z[plan.back.to(z.device)]


def _product(bucket: Bucket, A: Tensor, B: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """For A (rows, r, in) and B (rows, r, out)."""
    h = torch.bmm(x, A.mT)  # (rows, tokens, r)
    if bucket.scale is not None:
        return torch.baddbmm(y, h, B, alpha=bucket.scale)
    return torch.baddbmm(y, h * bucket.coefficients.to(h), B)


class Group(NamedTuple):
    """Rows that all have the same composition."""

    program: Program
    rows: Tensor  # (n,): which


class Batch(NamedTuple):
    """What each row of a batch has at a site, where they are not all the same."""

    site: Any  # of type Site
    size: int
    stack: Stack | None
    groups: tuple[Group, ...]
    rest: tuple[Group, ...]  # those that the stack has not

    def run(self, call: Call, v: Tensor) -> Tensor:
        for t in (call.x, v):
            if t.ndim < 2 or len(t) != self.size:
                raise AdapterError(
                    f"gets a tensor {list(t.shape)} where {self.size} rows were told what to use",
                    where=self.site.name,
                    fix="name a composition for each row of the batch; layers that get no batch cannot take part",
                )
        stack = self.stack
        if stack is not None and self.site.module.training and not stack.adds_delta:
            stack = None
        out = v if stack is None else stack.run(call.x, v)
        for own in self.rest if stack is not None else self.groups:
            if len(own.rows) == self.size:
                return own.program.run(call, v).to(v.dtype)
            rows = own.rows.to(v.device)
            args, kwargs = _picked(call.args, rows, self.size), _picked(call.kwargs, rows, self.size)
            x, y = call.x[rows], v[rows]
            out = out.index_copy(0, rows, own.program.run(Call(x, y, args, kwargs), y).to(v.dtype))
        return out


def _picked(value: Any, rows: Tensor, size: int) -> Any:
    """Of arguments, what these rows get."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == size else value
    if isinstance(value, tuple):
        return tuple(_picked(own, rows, size) for own in value)
    return {key: _picked(own, rows, size) for key, own in value.items()} if isinstance(value, dict) else value


def batch(node: compose.Rows, parts: Mapping[str, Any], gates: Mapping[str, GatePart], plans: Plans) -> Batch:
    """What rows that are `reduced` to the adapters at a site have there; plans are looked up, or added."""
    site = next(iter(parts.values())).site
    rows: dict[compose.Node, list[int]] = {}
    for n, row in enumerate(node.of):
        if not isinstance(row, compose.Base):
            rows.setdefault(row, []).append(n)
    flat = {row: weights for row in rows if (weights := _low(row, parts)) is not None}
    names = tuple(dict.fromkeys(name for weights in flat.values() for name in weights))
    stack = None
    if names:
        uses = tuple(tuple((names.index(a), w) for a, w in flat[row].items()) if row in flat else () for row in node.of)
        stack = _stack(uses, tuple(parts[name] for name in names), plans)
    groups = {
        row: Group(program(row, parts, gates), torch.tensor(own, device=site.like.device)) for row, own in rows.items()
    }
    rest = tuple(group for row, group in groups.items() if row not in flat)
    return Batch(site, len(node.of), stack, tuple(groups.values()), rest)


def _low(row: compose.Node, parts: Mapping[str, Any]) -> dict[str, float] | None:
    """The weights of a row that is a sum of low-rank adapters."""
    weights = compose.weights(row)
    if weights is None or not all(_factors(parts[name]) for name in weights):
        return None
    return weights


def _factors(part: Any) -> LowRank | None:
    """The change of a low-rank adapter at a linear layer, where it is all that it does to the output."""
    method, site, p = part.method, part.site, part.params()
    if method.reads_weight or not method.defines("delta") or method.defines("before"):
        return None
    if not isinstance(site, LinearSite) or method.delta_bias(p, site) is not None:
        return None
    delta = method.delta(p, site)
    return delta if isinstance(delta, LowRank) and delta.B.ndim == 2 else None


def _direct(part: Any) -> tuple[str, str] | None:
    """The names of A and B, if the factors are tensors of the adapter as they are."""
    found = set()
    for on in (False, True):
        with torch.set_grad_enabled(on):
            delta = cast("LowRank", _factors(part))
        own = {id(t): name for name, t in part._parameters.items()}
        found.add((own.get(id(delta.A)), own.get(id(delta.B))))
    (a, b), *others = found
    return None if others or a is None or b is None else (a, b)


def _stack(uses: tuple[Uses, ...], parts: tuple[Any, ...], plans: Plans) -> Stack:
    with torch.no_grad():
        deltas = [cast("LowRank", _factors(part)) for part in parts]
    ranks, scales, like = tuple(d.rank for d in deltas), tuple(d.scale for d in deltas), deltas[0].A
    key = (uses, ranks, scales, like.device, like.dtype)
    if key not in plans:
        plans[key] = planned(uses, ranks, scales, like)
    on = [bool(row) for row in uses]
    own = [(part._parameters, *names) for part in parts if (names := _direct(part)) is not None]
    holders, named = tuple(p for p, _, _ in own), (*(a for _, a, _ in own), *(b for _, _, b in own))
    return Stack(
        parts,
        Sources(holders + holders, named) if len(own) == len(parts) else None,
        plans[key],
        all(part.method.adds_delta for part in parts),
        None if all(on) else torch.tensor(on, device=like.device),
        Held(),
    )
