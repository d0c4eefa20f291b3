"""The merged weight of one layer, some rows at a time, and what rounding leaves of the change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import rounding
from ..checkpoint import check_finite, is_finite
from ..delta import LowRank
from ..errors import NotMergeable
from ..protocol import Method, Params
from ..scratch import fresh
from ..seed import generator
from ..site import Site
from ..source import Single, Source
from .places import Layer, gives_delta, no_bias

BLOCK = 1 << 19  # numbers of a weight in work at once: the random numbers of stochastic rounding depend on it too
MEASURED = 1 << 15  # of these, the first


class Span(NamedTuple):
    """Outputs or inputs of a layer, from `start` to `stop`."""

    start: int
    stop: int
    outputs: bool


class Kept(NamedTuple):
    """What rounding left of the change of some weights."""

    numbers: int = 0
    unchanged: int = 0  # of those
    along: float = 0.0  # ⟨applied, intended⟩
    intended: float = 0.0  # ‖intended‖²

    @classmethod
    def total(cls, parts: Iterable[Kept]) -> Kept:
        numbers, unchanged, along, intended = zip(*parts, strict=True)
        return cls(sum(numbers), sum(unchanged), math.fsum(along), math.fsum(intended))


class Rounding(NamedTuple):
    """To the nearest number, or with a seed at random."""

    seed: int | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype, name: str, span: Span, memory: rounding.Memory = fresh) -> Tensor:
        if self.seed is None:
            return rounding.nearest(x, dtype, memory)
        return rounding.stochastic(x, dtype, generator(self.seed, f"{name}:{span.start}"))


class Change:
    """What all adapters together do to one layer: W + Σ wᵢ (Wᵢ − W), and the same of the bias. In float64."""

    def __init__(self, layer: Layer, site: Site, terms: Sequence[Source]) -> None:
        self.layer, self.site = layer, site
        self.merges: list[tuple[float, Method, Params]] = []
        self.others: list[Tensor] = []  # (out, in) each
        low: list[LowRank] = []
        biases = []
        for part in layer.parts:
            source = terms[part.term]
            if isinstance(source, Single) and not gives_delta(source):
                p = {key: t.double() if t.is_floating_point() else t for key, t in source.params(part.site).items()}
                self.merges.append((part.weight, source.own.method.at(part.site), Params(p)))
                continue
            piece = source.piece(part.site)
            delta = piece.delta.scaled(part.weight)
            low.append(delta) if isinstance(delta, LowRank) else self.others.append(delta.dense())
            if piece.bias is not None:
                biases.append(part.weight * piece.bias.double())
        self.b = layer.bias.read().double() if self.merges and layer.bias is not None else None  # (out,)
        self.db = torch.stack(biases).sum(0) if biases else None  # (out,)
        self.B = self.A = None
        if low:
            self.B = torch.cat([d.B.double() * d.scale for d in low], dim=1)  # (out, Σr)
            self.A = torch.cat([d.A.double() for d in low])  # (Σr, in)

    def spans(self) -> Iterator[Span]:
        """The pieces that it is computed in: rows of the weight as it is stored, unless a merge needs others."""
        out, into = self.site.shape
        outputs = bool(self.merges) or not self.site.by_inputs
        whole, other = (out, into) if outputs else (into, out)
        if any(method.rows(p, 0, min(1, out), self.site) is None for _, method, p in self.merges):
            yield Span(0, whole, outputs)
            return
        step = max(1, BLOCK // max(other, 1))
        yield from (Span(at, min(at + step, whole), outputs) for at in range(0, whole, step))

    def merged(self, W: Tensor, b: Tensor | None, span: Span) -> tuple[Tensor, Tensor | None]:
        """W merged and Δb at these rows or columns of W, a float64 matrix that is written over; b: of these outputs."""
        here = slice(span.start, span.stop)
        rows, columns = (here, slice(None)) if span.outputs else (slice(None), here)
        new = W
        if self.B is not None and self.A is not None:
            new = torch.addmm(W, self.B[rows], self.A[:, columns], out=None if self.merges else W)
        for dense in self.others:
            new = new + dense[rows, columns]
        db = None if self.db is None or not span.outputs else self.db[here]
        for weight, method, p in self.merges:
            site, own = self.site, p
            if len(W) != self.site.shape[0]:
                site, found = self.site.narrow(len(W)), method.rows(p, span.start, span.stop, self.site)
                assert found is not None
                own = found
            W_i, b_i = method.merge(own, W, b, site)
            new = W_i if new is W and weight == 1.0 else new + weight * (W_i - W)
            if b_i is not None and b_i is not b:
                if b is None:
                    raise no_bias(self.layer)
                change = weight * (b_i - b)
                db = change if db is None else db + change
        return new, db

    def block(
        self, stored: Tensor, span: Span, rounded: Rounding, memory: rounding.Memory = fresh
    ) -> tuple[Tensor, Tensor | None, Kept]:
        """The stored form of some rows or columns, merged; the change of the bias there; what rounding left of ΔW.

        The latter is measured in the first rows alone. The first lies in `memory`.
        """
        own = self.site.narrow(span.stop - span.start) if span.outputs else self.site

        def matrix(x: Tensor) -> Tensor:  # (out, in), either a part of it
            return own.unfold(x) if span.outputs else x.mT

        W = matrix(memory("weight", stored.shape, torch.float64).copy_(stored))
        b = self.b[span.start : span.stop] if self.b is not None and span.outputs else None
        new, db = self.merged(W, b, span)
        merged = rounded(new, stored.dtype, self.layer.weight.name, span, memory)
        if not is_finite(merged):
            if not is_finite(stored):
                check_finite(self.layer.weight.read(), self.layer.weight, fix="download the model again")
            raise NotMergeable(
                f"the merged weight of {self.layer.name!r} does not fit {self.layer.weight.dtype}",
                fix="look for a weight or an alpha that is too large",
            )
        some = slice(-(-MEASURED // max(new.shape[1], 1)))
        kept = _kept(matrix(stored)[some].double(), new[some], merged[some])
        back = own.fold(merged) if span.outputs else merged.mT
        return back.contiguous(), db, kept

    def bias(self, b: Tensor, db: Tensor, rounded: Rounding) -> Tensor:
        """The merged bias (out,), in b's dtype."""
        assert self.layer.bias is not None
        merged = rounded(b.double() + db, b.dtype, self.layer.bias.name, Span(0, len(b), True))
        if not is_finite(merged):
            check_finite(b, self.layer.bias, fix="download the model again")
            raise NotMergeable(
                f"the merged bias of {self.layer.name!r} does not fit {self.layer.bias.dtype}",
                fix="look for a weight that is too large",
            )
        return merged


def _kept(W: Tensor, new: Tensor, merged: Tensor) -> Kept:
    applied, intended = (merged.double() - W).flatten(), (new - W).flatten()
    return Kept(
        len(intended),
        len(intended) - int(torch.count_nonzero(applied)),
        float(torch.dot(applied, intended)),
        float(torch.dot(intended, intended)),
    )
