"""The merged weight of one layer, some rows at a time, and what rounding leaves of the change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..checkpoint import check_finite, torch_dtype
from ..delta import LowRank
from ..errors import NotMergeable
from ..protocol import Method, Params
from ..site import Site
from ..source import Piece, Single, Source
from . import numbers, threads
from .numbers import Array, Memory, fresh
from .places import Layer, gives_delta, no_bias

if TYPE_CHECKING:
    from torch import Tensor

# Numbers of a weight that are read at once, and computed at once: of more, they leave the processor's cache; of fewer,
# it is Python that takes the time. A method's own merge gets a strip. Random numbers of rounding depend on both, too.
BLOCK, STRIP = 1 << 20, 1 << 18
MEASURED = 1 << 14  # of a block, the first


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


Round = Callable[[Array, str, Array, "Array | None", Memory], bool]


class Rounding(NamedTuple):
    """To the nearest number, or with a seed at random."""

    seed: int | None = None

    def of(self, name: str, span: Span) -> Round:
        """How the numbers of a span are rounded, from the first to the last: as `numbers.nearest` does."""
        if self.seed is None:
            return numbers.nearest
        from torch import from_numpy

        from .. import rounding
        from ..seed import generator

        rng = generator(self.seed, f"{name}:{span.start}")

        def at_random(out: Array, dtype: str, x: Array, plus: Array | None, memory: Memory) -> bool:
            total = from_numpy(numbers.summed(x, plus, memory))
            out[...] = numbers.of_tensor(rounding.stochastic(total, torch_dtype(dtype), rng))
            return numbers.is_finite(out, dtype, memory)

        return at_random


class Change:
    """What all adapters together do to one layer: W + Σ wᵢ (Wᵢ − W), and the same of the bias. In float64."""

    def __init__(self, layer: Layer, site: Site, terms: Sequence[Source]) -> None:
        self.layer, self.site = layer, site
        self.merges: list[tuple[float, Method, Params]] = []
        self.others: list[Array] = []  # (out, in) each
        low: list[tuple[Array, Array]] = []
        biases: list[Array] = []
        for part in layer.parts:
            source = terms[part.term]
            stored = source.factors(part.site) if isinstance(source, Single) else None
            if stored is not None:
                B, A = (_matrix(numbers.float64(numbers.read(t), t.dtype)) for t in (stored.B, stored.A))
                low.append((B * (stored.scale * part.weight), A))  # (out, r), (r, in)
            elif isinstance(source, Single) and not gives_delta(source):
                p = {key: t.double() if t.is_floating_point() else t for key, t in source.params(part.site).items()}
                self.merges.append((part.weight, source.own.method.at(part.site), Params(p)))
            else:
                _sort(source.piece(part.site), part.weight, low, self.others, biases)
        self.b = self._bias() if self.merges and layer.bias is not None else None  # (out,)
        self.db: Array | None = sum(biases[1:], biases[0]) if biases else None  # (out,)
        self.B = np.concatenate([B for B, _ in low], axis=1) if low else None  # (out, Σr)
        self.A = np.concatenate([A for _, A in low]) if low else None  # (Σr, in)

    def spans(self) -> Iterator[Span]:
        """The pieces that it is computed in: rows of the weight as it is stored, unless a merge needs others."""
        out, into = self.site.shape
        outputs = bool(self.merges) or not self.site.by_inputs
        whole, other = (out, into) if outputs else (into, out)
        if any(method.rows(p, 0, min(1, out), self.site) is None for _, method, p in self.merges):
            yield Span(0, whole, outputs)
            return
        step = max(1, (STRIP if self.merges else BLOCK) // max(other, 1))
        yield from (Span(at, min(at + step, whole), outputs) for at in range(0, whole, step))

    def block(
        self, stored: Array, span: Span, rounding: Rounding, memory: Memory = fresh
    ) -> tuple[Array, Array | None, Kept]:
        """The stored form of some rows or columns, merged; the change of the bias there; what rounding left of ΔW.

        `stored` is written over. ΔW is measured in the first rows alone.
        """
        dtype, rows = self.layer.weight.dtype, _matrix(stored)
        rounded = rounding.of(self.layer.weight.name, span)
        some = -(-MEASURED // max(rows.shape[1], 1))
        kept: Kept | None = None
        db = None if self.db is None or not span.outputs else self.db[span.start : span.stop]
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is refused
            for strip in self._strips(rows):
                part, plus = rows[strip], None
                old = numbers.float64(part[:some], dtype) if kept is None else None
                if self.merges:
                    x, db = self._merged(part, span, db)
                else:
                    x, plus = numbers.exact(part, dtype, memory), self._delta(part, span.start + strip.start, memory)
                new = None if old is None else x[:some] if plus is None else old + plus[:some]
                if not rounded(part, dtype, x, plus, memory):
                    self._refuse()
                if old is not None and new is not None:
                    kept = _kept(old, new, numbers.float64(part[:some], dtype))
        assert kept is not None
        return stored, db, kept

    def bias(self, stored: Array, db: Array, rounding: Rounding) -> Array:
        """The merged bias (out,), as it is stored."""
        info = self.layer.bias
        assert info is not None
        rounded, merged = rounding.of(info.name, Span(0, len(stored), True)), np.empty_like(stored)
        if not rounded(merged, info.dtype, numbers.exact(stored, info.dtype), db, fresh):
            check_finite(info.read(), info, fix="download the model again")
            raise NotMergeable(
                f"the merged bias of {self.layer.name!r} does not fit {info.dtype}",
                fix="look for a weight that is too large",
            )
        return merged

    def _bias(self) -> Array:
        assert self.layer.bias is not None
        return numbers.float64(numbers.stored(self.layer.bias), self.layer.bias.dtype)

    def _strips(self, rows: Array) -> Iterator[slice]:
        """Rows as they are stored, so many at a time; a method's merge gets all at once."""
        step = len(rows) if self.merges else max(1, STRIP // max(rows.shape[1], 1))
        return (slice(at, at + step) for at in range(0, max(len(rows), 1), max(step, 1)))

    def _delta(self, part: Array, start: int, memory: Memory) -> Array:
        """ΔW of some rows of the weight as it is stored."""
        here = slice(start, start + len(part))
        found: Array | None = None
        if self.B is not None and self.A is not None:
            left, right = (self.A.T, self.B.T) if self.site.by_inputs else (self.B, self.A)
            found = np.matmul(left[here], right, out=memory("delta", part.shape, np.float64))
        for dense in self.others:
            other = (dense.T if self.site.by_inputs else dense)[here]
            found = other if found is None else found + other
        assert found is not None
        return found

    def _merged(self, part: Array, span: Span, db: Array | None) -> tuple[Array, Array | None]:
        """All of a span as it is stored, with the methods' own merges, in float64; and Δb."""
        from torch import from_numpy

        threads.one()
        here = slice(span.start, span.stop)
        narrow = self.site.narrow(span.stop - span.start)
        W = from_numpy(numbers.float64(part, self.layer.weight.dtype))
        before: Tensor = narrow.unfold(W.reshape(narrow.weight_shape))  # (out, in)
        b = None if self.b is None else from_numpy(self.b[here])
        new = before
        if self.B is not None and self.A is not None:
            new = new + from_numpy(self.B[here] @ self.A)
        for dense in self.others:
            new = new + from_numpy(dense[here])
        for weight, method, p in self.merges:
            site, own = self.site, p
            if len(before) != self.site.shape[0]:
                site, found = narrow, method.rows(p, span.start, span.stop, self.site)
                assert found is not None
                own = found
            W_i, b_i = method.merge(own, before, b, site)
            new = W_i if new is before and weight == 1.0 else new + weight * (W_i - before)
            if b_i is not None and b_i is not b:
                if b is None:
                    raise no_bias(self.layer)
                change_b = weight * (b_i - b).numpy()
                db = change_b if db is None else db + change_b
        return narrow.fold(new).contiguous().numpy().reshape(part.shape), db

    def _refuse(self) -> None:
        info = self.layer.weight
        check_finite(info.read(), info, fix="download the model again")
        raise NotMergeable(
            f"the merged weight of {self.layer.name!r} does not fit {info.dtype}",
            fix="look for a weight or an alpha that is too large",
        )


def _matrix(x: Array) -> Array:
    """All but the first axis flattened."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _sort(
    piece: Piece, weight: float, low: list[tuple[Array, Array]], others: list[Array], biases: list[Array]
) -> None:
    """Put what a source gives, in float64, where it belongs."""
    delta = piece.delta.scaled(weight)
    if isinstance(delta, LowRank):
        low.append((_float64(delta.B) * delta.scale, _float64(delta.A)))  # (out, r), (r, in)
    else:
        others.append(_float64(delta.dense()))  # (out, in)
    if piece.bias is not None:
        biases.append(weight * _float64(piece.bias))  # (out,)


def _float64(t: Tensor) -> Array:
    found: Array = t.detach().double().cpu().numpy()
    return found


def _kept(W: Array, new: Array, merged: Array) -> Kept:
    applied, intended = (merged - W).ravel(), (new - W).ravel()
    return Kept(
        len(intended),
        len(intended) - int(np.count_nonzero(applied)),
        float(np.dot(applied, intended)),
        float(np.dot(intended, intended)),
    )
