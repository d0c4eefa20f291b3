"""What one model's weights differ by from another's, as a source of deltas that can be cut to lower ranks.

It is read again from the files, in blocks, whenever it is needed: small layers are decomposed as a whole, large ones by
`subspace`. What is stored is measured against the files themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import algebra, modules, sketch, subspace
from .base_model import BaseModel
from .checkpoint import sha256
from .combine import Spectrum
from .delta import Dense, LowRank
from .format import Contents, Planned, SiteContents
from .hub.reference import in_cache
from .pair import Pair, square
from .plan import carrier
from .source import Extent, Piece

STORED_TRANSPOSED = {"transposed_linear", "embedding"}  # kinds whose weight is (in, out)
EXACT_SIDE, EXACT_SIZE = 512, 1 << 21  # layers up to these are decomposed as a whole
HELD = 1 << 26  # bytes of a difference that are kept between the passes over it
OVERSAMPLED = 10  # columns of a subspace at least beyond the rank


@dataclass(frozen=True)
class Layer:
    """One layer whose weight differs."""

    pair: Pair
    kind: str
    shape: tuple[int, int]  # of ΔW, (out, in)

    @property
    def transposed(self) -> bool:
        return self.kind in STORED_TRANSPOSED

    def native(self, delta: LowRank) -> tuple[Tensor, Tensor]:
        """Factors whose product has the layout of the file, in float64: (rows, r), (r, columns)."""
        B, A = delta.B.double() * delta.scale, delta.A.double()
        return (A.mT, B.mT) if self.transposed else (B, A)

    def measure(self, stored: LowRank) -> tuple[float, float]:
        """‖stored - ΔW‖² and ‖ΔW‖², in float64, a block at a time: differences of numbers, not of norms."""
        B, A = self.native(stored)
        lost, size, start = [], [], 0
        for block in self.pair.blocks(torch.float64):
            size.append(square(block))
            lost.append(square(block.addmm_(B[start : start + len(block)], A, alpha=-1)))
            start += len(block)
        self.pair.check(math.fsum(size))
        return math.fsum(lost), math.fsum(size)

    def dense(self) -> Dense:
        """ΔW (out, in) in float64."""
        W = torch.cat(list(self.pair.blocks(torch.float64)))
        self.pair.check(square(W))
        return Dense((W.mT if self.transposed else W).contiguous())


class Left(NamedTuple):
    """A tensor that changed, and that the adapter does not hold."""

    why: str
    norm: float | None  # of the change; None if there is no difference
    relative: float | None  # to the norm of the base's

    def plain(self) -> dict[str, Any]:
        """As JSON can carry it."""
        known = self.relative is not None and math.isfinite(self.relative)
        return {"why": self.why, "norm": self.norm, "relative": self.relative if known else None}


class Certificate(NamedTuple):
    """What is known of the truncation of one layer: squared errors, without the rounding."""

    error: float
    best: float  # no matrix of that rank has a smaller one
    size: float  # ‖ΔW‖²
    passes: int | None  # over the difference; None if it was decomposed as a whole


class Difference:
    """What `tuned` has added to `base`; a source that can be cut to lower ranks."""

    def __init__(
        self,
        base: BaseModel,
        tuned: BaseModel,
        layers: Mapping[str, Layer],
        left: Mapping[str, Left],
        *,
        exact_side: int = EXACT_SIDE,
    ) -> None:
        self.base, self.tuned, self.layers, self.left = base, tuned, layers, left
        self.exact_side = exact_side
        self.certificates: dict[str, Certificate] = {}
        self.watch: Callable[[int, int], None] = lambda done, total: None  # while singular values are asked for
        self._reach: dict[str, int] = {}  # how many singular values were asked for

    @property
    def sites(self) -> Mapping[str, SiteContents]:
        return self.own.sites

    @property
    def written_out(self) -> frozenset[str]:
        return frozenset()

    def prepare(self) -> None:
        """Nothing: layers are read one by one."""

    @property
    def contents(self) -> Mapping[str, Contents]:
        return {self.tuned.folder.name: self.own}

    @cached_property
    def own(self) -> Contents:
        """What an adapter of the difference inherits of the models."""
        name, revision = base_name(self.base.folder)
        parts = [modules.module_of(key).split(".") for key in self.base.tensors]
        every = {".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)}
        return Contents(
            carrier()(),
            {
                name: SiteContents(
                    layer.kind,
                    layer.pair.base.shape,
                    layer.shape,
                    {"weight": Planned(layer.pair.base.dtype, layer.pair.base.shape)},
                )
                for name, layer in self.layers.items()
            },
            base=name,
            revision=revision,
            task=_task(self.tuned.config),
            targets=modules.suffixes(self.layers, every),
            transposed=any(layer.kind == "transposed_linear" for layer in self.layers.values()),
            facts={"base": {name: self._sketch(name) for name in sketch.sampled(list(self.layers))}},
        )

    def _sketch(self, name: str) -> list[float]:
        layer = self.layers[name]
        columns = layer.pair.columns
        at = [(j, i) if layer.transposed else (i, j) for i, j in sketch.places(*layer.shape)]
        return sketch.rounded([layer.pair.at(row * columns + column) for row, column in at])

    def extent(self, site: str) -> Extent:
        return Extent(min(self.layers[site].shape), frozenset({1.0}), False)

    def piece(self, site: str) -> Piece:
        """ΔW whole, in memory."""
        self.certificates[site] = Certificate(0.0, 0.0, 1.0, None)
        return Piece(self.layers[site].dense(), measured=self.layers[site].measure)

    def spectrum(self, site: str, least: int) -> Spectrum:
        """Exact for a small layer; of a large one the largest singular values, from below, and what is left exactly."""
        self._reach[site] = least
        self.watch(len(self._reach), len(self.layers))
        width = self._width(site, least)
        if width is None:
            return Spectrum(algebra.spectrum(self.layers[site].dense()).tolist())
        found = self._leading(site, least, width)
        return Spectrum(found.values[:least].sqrt().tolist(), found.error(least))

    def truncated(self, site: str, rank: int) -> Piece:
        """The nearest of this rank; of a large layer nearly so, and by how much at most is in `certificates`."""
        layer, least = self.layers[site], max(rank, self._reach.get(site, 0))
        width = self._width(site, least)
        if width is None:
            delta = layer.dense()
            kept, dropped = algebra.truncate(delta, rank)
            error = algebra.norm(dropped) ** 2
            self.certificates[site] = Certificate(error, error, algebra.norm(delta) ** 2, None)
            return Piece(kept, measured=layer.measure)
        found = self._leading(site, least, width)
        error = found.error(rank)
        self.certificates[site] = Certificate(error, min(found.best(rank), error), found.total, found.passes)
        root = found.values[:rank].sqrt().sqrt()  # balanced factors, as algebra.truncate makes them
        safe = root.clamp(min=torch.finfo(torch.float64).tiny)
        left, right = found.Y[:, :rank].double() / safe, found.V[:, :rank] * root  # (rows, r), (columns, r)
        B, A = (right, left.mT) if layer.transposed else (left, right.mT)
        return Piece(LowRank(B.contiguous(), A.contiguous()), measured=layer.measure)

    def _width(self, site: str, least: int) -> int | None:
        """Of the subspace for a large layer; None where decomposing the whole is as cheap, or small anyway."""
        short, long = sorted(self.layers[site].shape)
        width = least + max(OVERSAMPLED, least // 2)
        whole = short <= self.exact_side and short * long <= EXACT_SIZE
        return None if whole or 3 * width > short else width

    def _leading(self, site: str, least: int, width: int) -> subspace.Leading:
        pair = self.layers[site].pair
        dtype = torch.float32 if pair.half else torch.float64
        found = subspace.leading(_held(pair, dtype), pair.columns, least, width=width, seed=site)
        pair.check(found.total)
        return found

    def recipe(self) -> dict[str, Any]:
        """The hashes are of whole files: without them nobody could tell that the inputs are the same."""
        return {"rule": "difference", "base": _hashes(self.base), "tuned": _hashes(self.tuned)}


def _held(pair: Pair, dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
    """The blocks of a difference, kept in memory if they are few; else read again for each pass."""
    if pair.base.numel * dtype.itemsize > HELD:
        return lambda: pair.blocks(dtype)
    held: list[Tensor] = []

    def blocks() -> Iterator[Tensor]:
        if not held:
            held.extend(pair.blocks(dtype))
        return iter(held)

    return blocks


def base_name(folder: Path) -> tuple[str, str | None]:
    """What to call the base, and its revision: as on the Hub, where the folder is in the Hub's cache.

    >>> base_name(Path("/cache/models--my-org--base-7b/snapshots/0123abcd"))
    ('my-org/base-7b', '0123abcd')
    """
    found = in_cache(folder)
    return (str(folder), None) if found is None else (found.repo, found.revision)


def _task(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type, where the config leaves no doubt."""
    classes = config.get("architectures")
    first = str(classes[0]) if isinstance(classes, list) and classes else ""
    return "CAUSAL_LM" if first.endswith(("ForCausalLM", "LMHeadModel")) else None


def _hashes(model: BaseModel) -> dict[str, Any]:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        files = list(model.shards)
        digests = pool.map(lambda name: sha256(model.folder / name), files)
        told = model.named
        return {"model": told.pop("name"), **told, "sha256": dict(zip(files, digests, strict=True))}
