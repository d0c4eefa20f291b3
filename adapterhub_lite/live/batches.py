"""A batch whose rows have compositions of their own, at one site.

Rows of low-rank adapters go together, y + B (c ⊙ A x): with the factors of all adapters in A and B and each row's
weights in c, or with each row's own factors, by what is less work. Others go group by group, each as it would alone.
What is known before a forward is in plans, which all layers of the same ranks share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import compose
from ..delta import LowRank
from ..errors import AdapterError
from ..site.linear import LinearSite
from .gating import GatePart
from .program import Call, Program, program

# What a number costs that is moved, and one that is multiplied row by row, of one that is multiplied together: measured
# on a CPU. A permutation of the rows costs as much as STRETCH.
MOVED, MOVED_BY_ROW, BY_ROW, STRETCH = 8.0, 12.0, 2.3, 1000.0

Uses = tuple[tuple[int, float], ...]  # what a row has: numbers of adapters, and their weights


class Bucket(NamedTuple):
    """Rows whose factors have the same rank in all."""

    uses: tuple[tuple[int, ...], ...]  # by row: numbers of adapters
    coefficients: Tensor  # (rows, rank), weights times scales


class Plan(NamedTuple):
    """How the rows of a batch are computed at layers where these adapters have these ranks."""

    uses: tuple[Uses, ...]
    scales: tuple[float, ...]
    coefficients: Tensor  # (rows, Σr): c, weights times scales
    buckets: tuple[Bucket, ...]
    order: Tensor | None  # (rows,): by bucket; None if they are
    back: Tensor | None  # (rows,): its inverse
    widths: int  # the sum of all rows' ranks


Plans = dict[Any, Plan]


def planned(uses: Sequence[Uses], ranks: Sequence[int], scales: Sequence[float], like: Tensor) -> Plan:
    """For what each row uses, on the device and in the dtype of `like`."""
    c = torch.zeros(len(uses), sum(ranks), dtype=torch.float64)
    own: dict[int, Tensor] = {}
    for n, row in enumerate(uses):
        for i, weight in row:
            start = sum(ranks[:i])
            c[n, start : start + ranks[i]] = weight * scales[i]
        parts = [torch.full((ranks[i],), weight * scales[i], dtype=torch.float64) for i, weight in row]
        own[n] = torch.cat(parts) if parts else torch.zeros(0)
    order = sorted(range(len(uses)), key=lambda n: len(own[n]))
    buckets = []
    for width in sorted({len(own[n]) for n in order}):
        rows = [n for n in order if len(own[n]) == width]
        numbers = tuple(tuple(i for i, _ in uses[n]) for n in rows)
        buckets.append(Bucket(numbers, torch.stack([own[n] for n in rows]).to(like)))
    straight = order == list(range(len(uses)))
    places = None if straight else torch.tensor(order, device=like.device)
    return Plan(
        tuple(uses),
        tuple(scales),
        c.to(like),
        tuple(buckets),
        places,
        None if places is None else places.argsort(),
        sum(len(t) for t in own.values()),
    )


class Stack(NamedTuple):
    """The low-rank adapters of a batch at a linear layer."""

    parts: tuple[Any, ...]  # of type Part
    plan: Plan
    adds_delta: bool  # all of them, in training too
    on: Tensor | None  # (rows,): whether it is one of these; None if all are

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        """For x (rows, …, in) and y (rows, …, out): as y, in the adapters' dtype where it has any."""
        deltas = [part.method.delta(part.params(), part.site) for part in self.parts]
        A, B = [delta.A for delta in deltas], [delta.B for delta in deltas]  # (r, in), (out, r)
        plan, scales = self.plan, tuple(delta.scale for delta in deltas)
        if scales != plan.scales:
            plan = planned(plan.uses, [len(a) for a in A], scales, A[0])
        x_3, y_3 = (t.to(A[0].dtype).reshape(len(t), -1, t.shape[-1]) for t in (x, y))  # (rows, tokens, …)
        out = _together if self._alike(x_3.shape[1]) else _by_row
        z = out(plan, A, B, x_3, y_3).reshape(y.shape).to(y.dtype)
        if self.on is None:
            return z
        return torch.where(self.on.reshape(-1, *(1 for _ in y.shape[1:])), z, y)

    def _alike(self, tokens: int) -> bool:
        """Whether it is less work to multiply all rows by all factors."""
        rows, total = self.plan.coefficients.shape
        by_row = self.plan.widths * (BY_ROW * tokens + MOVED_BY_ROW) + STRETCH * (len(self.plan.buckets) - 1)
        return total * (rows * tokens + MOVED) <= by_row


def _together(plan: Plan, A: list[Tensor], B: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    h = F.linear(x, torch.cat(A))  # (rows, tokens, Σr)
    return y + F.linear(h * plan.coefficients[:, None].to(h), torch.cat(B, dim=1))


def _by_row(plan: Plan, A: list[Tensor], B: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    if plan.order is not None:
        x, y = x[plan.order.to(x.device)], y[plan.order.to(y.device)]
    sizes = [len(bucket.uses) for bucket in plan.buckets]
    out = []
    for (uses, c), x_b, y_b in zip(plan.buckets, x.split(sizes), y.split(sizes), strict=True):
        if c.shape[1]:
            A_rows = torch.stack([A[row[0]] if len(row) == 1 else torch.cat([A[i] for i in row]) for row in uses])
            B_rows = torch.stack([B[row[0]] if len(row) == 1 else torch.cat([B[i] for i in row], 1) for row in uses])
            h = torch.bmm(x_b, A_rows.mT)  # (rows, tokens, r)
            y_b = y_b + torch.bmm(h * c[:, None].to(h), B_rows.mT)
        out.append(y_b)
    z = out[0] if len(out) == 1 else torch.cat(out)
    return z if plan.back is None else z[plan.back.to(z.device)]


class Group(NamedTuple):
    """Rows that all have the same composition."""

    program: Program
    rows: Tensor  # (n,): which
    stacked: bool  # whether the stack has them


class Batch(NamedTuple):
    """What each row of a batch has at a site, where they are not all the same."""

    site: Any  # of type Site
    size: int
    stack: Stack | None
    groups: tuple[Group, ...]

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
        for own in self.groups:
            if own.stacked and stack is not None:
                continue
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
    groups = (
        Group(program(row, parts, gates), torch.tensor(own, device=site.like.device), row in flat)
        for row, own in rows.items()
    )
    return Batch(site, len(node.of), stack, tuple(groups))


def _low(row: compose.Node, parts: Mapping[str, Any]) -> dict[str, float] | None:
    """The weights of a row that is a sum of low-rank adapters."""
    weights = compose.weights(row)
    if weights is None or not all(_factors(parts[name]) for name in weights):
        return None
    return weights


@torch.no_grad()
def _factors(part: Any) -> LowRank | None:
    """The change of a low-rank adapter at a linear layer, where it is all that it does to the output."""
    method, site, p = part.method, part.site, part.params()
    if method.reads_weight or not method.defines("delta") or method.defines("before"):
        return None
    if not isinstance(site, LinearSite) or method.delta_bias(p, site) is not None:
        return None
    delta = method.delta(p, site)
    return delta if isinstance(delta, LowRank) and delta.B.ndim == 2 else None


def _stack(uses: tuple[Uses, ...], parts: tuple[Any, ...], plans: Plans) -> Stack:
    deltas = [cast("LowRank", _factors(part)) for part in parts]
    ranks, scales, like = tuple(d.rank for d in deltas), tuple(d.scale for d in deltas), deltas[0].A
    key = (uses, ranks, scales, like.device, like.dtype)
    if key not in plans:
        plans[key] = planned(uses, ranks, scales, like)
    on = [bool(row) for row in uses]
    return Stack(
        parts,
        plans[key],
        all(part.method.adds_delta for part in parts),
        None if all(on) else torch.tensor(on, device=like.device),
    )
