"""How like adapters are: at each module and over all, from their factors.

At one site each delta becomes UΣVᵀ, by QR decompositions of its factors and the SVD of what they leave. All but the
signs then comes from the small products UᵢᵀUⱼ and VᵢᵀVⱼ. Everything is float64, one site at a time, several at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import algebra
from .advice import advice
from .agreement import common
from .combine import WeightedSum, each
from .delta import Delta, LowRank
from .errors import ConfigError

if TYPE_CHECKING:
    from .adapter import Adapter
    from .source import Piece

# Singular values below this share of the largest, or of S (see `algebra`), count as zero.
_ZERO, _NOISE = 1e-12, 1e-14

# Below this share of ‖A‖² + ‖B‖², the squared distance from norms and cosine has lost too many digits.
_CANCELLED = 1e-4

# Entries of matrices held at once for the signs, all adapters together: 4 MiB of float64, near the processor.
_ENTRIES = 1 << 19


@dataclass(frozen=True)
class Likeness:
    """How like two adapters are, at one module or over all; None where a number is not defined.

    A module that an adapter lacks counts as a change of zero.
    """

    cosine: float | None
    """⟨A, B⟩ / ‖A‖‖B‖ of the deltas; None if one of them is zero."""
    distance: float | None
    """‖A − B‖ / ‖A‖; None if A is zero."""
    gap: float
    """‖A − B‖ / (‖A‖ + ‖B‖), from 0 for equal ones to 1 for opposite ones, or where only one has any."""
    overlap_out: float | None
    """Mean cos² of the principal angles between the column spaces: the directions that outputs change in."""
    overlap_in: float | None
    """The same of the row spaces: the directions that inputs are read in."""
    chance_out: float | None
    """What `overlap_out` is on average for random spaces of the same ranks."""
    chance_in: float | None
    conflicts: float | None
    """Of the entries that both change, the share with opposite signs; None unless asked for."""
    same: Literal["bits", "numbers"] | None
    """Whether factors, scale and bias have the same bits, or the deltas and biases are at least equal numbers."""


@dataclass(frozen=True)
class Pair(Likeness):
    """Two adapters over all their modules; overlaps and conflicts are of those that both have."""

    a: str
    b: str
    both: int
    """How many modules both have."""
    identical: int
    """How many of them have the same bits."""
    equal: int
    """How many are equal numbers, those with the same bits among them."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Module:
    """One module. Tuples are in the order of the adapters, with None for one that lacks the module."""

    kind: str
    shape: tuple[int, int]
    norms: tuple[float | None, ...]
    spectra: tuple[tuple[float, ...] | None, ...]
    """The singular values, descending; those that are zero but for rounding are left out."""
    bias_norms: tuple[float | None, ...]
    """‖Δbias‖ where an adapter changes the bias: it counts in no other number but `same`."""
    pairs: Mapping[tuple[int, int], Likeness]
    """By the positions (i, j), i < j, of the adapters."""


@dataclass(frozen=True)
class Diff:
    """What `diff` found."""

    names: tuple[str, ...]
    norms: tuple[float, ...]
    bias_norms: tuple[float | None, ...]
    kept: tuple[tuple[str, ...], ...]
    """Whole values that an adapter carries (heads, token rows): they are not compared."""
    pairs: Mapping[tuple[int, int], Pair]
    modules: Mapping[str, Module]

    def plain(self) -> dict[str, Any]:
        """As JSON can carry it; None also where a number is infinite."""
        adapters = [
            {
                "name": name,
                "norm": self.norms[i],
                "bias_norm": self.bias_norms[i],
                "modules": sum(module.norms[i] is not None for module in self.modules.values()),
                "kept": list(self.kept[i]),
            }
            for i, name in enumerate(self.names)
        ]
        modules = {}
        for name, module in self.modules.items():
            plain = asdict(module)
            plain["pairs"] = [
                {"a": self.names[i], "b": self.names[j], **asdict(pair)} for (i, j), pair in module.pairs.items()
            ]
            modules[name] = plain
        found = {"adapters": adapters, "pairs": [asdict(pair) for pair in self.pairs.values()], "modules": modules}
        return {key: _jsonable(value) for key, value in found.items()}


class _Found(NamedTuple):
    """One site's numbers, and what only the sums over all sites need."""

    module: Module
    apart: Mapping[tuple[int, int], float]  # ‖A − B‖
    signs: Mapping[tuple[int, int], tuple[int, int]]  # entries that both change, and those with opposite signs


class _Spaces(NamedTuple):
    """A delta as UΣVᵀ, with zeros in place of what is zero but for rounding."""

    U: Tensor  # (*batch, out, k)
    S: Tensor  # (*batch, k)
    V: Tensor  # (*batch, in, k)
    norm: float

    @property
    def ranks(self) -> Tensor:
        return (self.S > 0).sum(-1).double()


def diff(
    *adapters: Adapter,
    names: Sequence[str] | None = None,
    signs: bool = False,
    any_base: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diff:
    """Compare two or more adapters, or sums of adapters.

    `names` are to be called by; by default those that they were loaded by. `signs`: count the entries of ΔW in which
    they contradict each other, which means writing the matrices out, some rows at a time. `any_base`: do not ask that
    all name the same base model. Raises `NotMergeable` where one has no ΔW from its tensors alone, or where two adapt
    one module as different layers.
    """
    if len(adapters) < 2:
        raise ConfigError(f"{len(adapters)} adapters cannot be compared", fix="give two or more")
    if names is not None and len(names) != len(adapters):
        raise ConfigError(f"{len(names)} names for {len(adapters)} adapters", fix="give one for each")
    sources = [adapter.source for adapter in adapters]
    together = WeightedSum([(1.0, source) for source in sources])
    common(together.contents, any_base=any_base, keep="none")
    sites = together.sites
    for source in sources:
        for site in source.sites:
            source.extent(site)  # refused before anything is computed
        source.prepare()

    def job(site: str) -> _Found:
        pieces = [source.piece(site) if site in source.sites else None for source in sources]
        return _compare(sites[site].kind, sites[site].shape, pieces, signs)

    found: dict[str, _Found] = {}
    for site, own in each(sites, job):
        found[site] = own
        progress(len(found), len(sites))
    labels = _unique(names or [a.single.name if a.single else repr(a)[len("<Adapter ") : -1] for a in adapters])
    kept = tuple(tuple(sorted({k for own in s.contents.values() for k in own.kept})) for s in sources)
    return _overall(labels, kept, found)


# One site -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _compare(kind: str, shape: tuple[int, int], pieces: Sequence[Piece | None], signs: bool) -> _Found:
    spaces = [None if piece is None else _spaces(piece.delta) for piece in pieces]
    counts = _signs([None if piece is None else piece.delta for piece in pieces]) if signs else {}
    pairs, apart = {}, {}
    for i, j in itertools.combinations(range(len(pieces)), 2):
        pairs[i, j], apart[i, j] = _likeness(pieces[i], pieces[j], spaces[i], spaces[j], counts.get((i, j)))
    module = Module(
        kind,
        shape,
        tuple(None if own is None else own.norm for own in spaces),
        tuple(None if own is None else _values(own.S) for own in spaces),
        tuple(None if p is None or p.bias is None else float(p.bias.double().norm()) for p in pieces),
        pairs,
    )
    return _Found(module, apart, counts)


def _spaces(delta: Delta) -> _Spaces:
    U, S, Vh = algebra.svd(delta)
    largest = float(S.max()) if S.numel() else 0.0
    size = algebra.size(delta)  # infinite where squares of the factors are
    kept = S.gt(max(_ZERO * largest, _NOISE * size if math.isfinite(size) else 0.0))
    S = S * kept
    norm = largest * float((S / largest).norm()) if kept.any() else 0.0
    return _Spaces(U * kept[..., None, :], S, (Vh * kept[..., :, None]).mT, norm)


def _values(S: Tensor) -> tuple[float, ...]:
    return tuple(sorted((s for s in S.flatten().tolist() if s > 0), reverse=True))


def _likeness(
    a: Piece | None, b: Piece | None, x: _Spaces | None, y: _Spaces | None, signs: tuple[int, int] | None
) -> tuple[Likeness, float]:
    """How like two adapters are at a module, and ‖A − B‖."""
    norm_a, norm_b = 0.0 if x is None else x.norm, 0.0 if y is None else y.norm
    if a is None or b is None or x is None or y is None:
        apart = norm_a + norm_b
        return Likeness(None, _over(apart, norm_a), 1.0 if apart else 0.0, None, None, None, None, None, None), apart
    cosine, overlaps = None, _NO_OVERLAPS
    if norm_a and norm_b:
        out, into = x.U.mT @ y.U, x.V.mT @ y.V
        terms = (x.S / norm_a)[..., :, None] * out * into * (y.S / norm_b)[..., None, :]
        cosine = min(1.0, max(-1.0, float(terms.sum())))
        overlaps = _overlaps(x, y, out, into)
    apart = _apart(a.delta, b.delta, norm_a, norm_b, cosine)
    gap = apart / (norm_a + norm_b) if apart else 0.0
    conflicts = None if signs is None else _over(signs[1], signs[0])
    return Likeness(cosine, _over(apart, norm_a), min(gap, 1.0), *overlaps, conflicts, _same(a, b, apart)), apart


_NO_OVERLAPS: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)


def _overlaps(x: _Spaces, y: _Spaces, out: Tensor, into: Tensor) -> tuple[float, float, float, float]:
    """Of the column and the row spaces: the mean cos² of their principal angles, and its mean for random spaces."""
    fewest = min(float(x.ranks.sum()), float(y.ranks.sum()))
    products = float((x.ranks * y.ranks).sum())
    found = [min(1.0, float(both.square().sum()) / fewest) for both in (out, into)]
    # A random direction has 1/d of its square along any other, in a space of dimension d.
    chance = [products / space.shape[-2] / fewest for space in (x.U, x.V)]
    return found[0], found[1], chance[0], chance[1]


def _apart(a: Delta, b: Delta, norm_a: float, norm_b: float, cosine: float | None) -> float:
    if cosine is None:
        return norm_a + norm_b
    larger, smaller = max(norm_a, norm_b), min(norm_a, norm_b) / max(norm_a, norm_b)
    # ‖A − B‖² in two squares that do not cancel: across the larger one, and along it.
    ratio = math.hypot(1 - smaller * cosine, smaller * math.sqrt(1 - cosine * cosine))
    if ratio * ratio < _CANCELLED:
        near = algebra.norm(algebra.total([a, b.scaled(-1.0)]))
        return near if near > _NOISE * (algebra.size(a) + algebra.size(b)) else 0.0
    return larger * ratio


def _same(a: Piece, b: Piece, apart: float) -> Literal["bits", "numbers"] | None:
    bits = _bits(a) == _bits(b)
    for one, other in zip(_tensors(a), _tensors(b), strict=bits):
        bits = bits and torch.equal(_as_bits(one), _as_bits(other))
    if bits:
        return "bits"
    zero = torch.zeros((), dtype=torch.float64)
    biases = torch.equal(*torch.broadcast_tensors(*(zero if p.bias is None else p.bias.to(zero) for p in (a, b))))
    return "numbers" if apart == 0 and biases else None


def _bits(piece: Piece) -> list[Any]:
    """All but the numbers."""
    shapes = [(t.dtype, t.shape) for t in _tensors(piece)]
    return [type(piece.delta), piece.delta.scale if isinstance(piece.delta, LowRank) else None, *shapes]


def _tensors(piece: Piece) -> list[Tensor]:
    return [t for t in (*piece.delta, piece.bias) if isinstance(t, Tensor)]


def _as_bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


def _signs(deltas: Sequence[Delta | None]) -> dict[tuple[int, int], tuple[int, int]]:
    """For each two that are there, in how many entries neither is zero, and in how many their signs differ."""
    there = [(i, delta) for i, delta in enumerate(deltas) if delta is not None]
    pairs = list(itertools.combinations(range(len(there)), 2))
    changed = dict.fromkeys(pairs, 0)
    opposite = dict.fromkeys(pairs, 0)
    if not pairs:
        return {}
    *batch, height, width = there[0][1].shape
    step = max(1, _ENTRIES // (len(there) * math.prod(batch) * width))
    for start in range(0, height, step):
        signs = [algebra.rows(delta, start, min(start + step, height)).sign().view(-1) for _, delta in there]
        sizes = [own.abs() for own in signs]
        for p, q in pairs:
            both, agreeing = int(torch.dot(sizes[p], sizes[q])), int(torch.dot(signs[p], signs[q]))
            changed[p, q] += both
            opposite[p, q] += (both - agreeing) // 2
    return {(there[p][0], there[q][0]): (changed[p, q], opposite[p, q]) for p, q in pairs}


# All sites ----------------------------------------------------------------------------------------------


def _overall(names: tuple[str, ...], kept: tuple[tuple[str, ...], ...], found: Mapping[str, _Found]) -> Diff:
    modules = {site: own.module for site, own in found.items()}
    every = range(len(names))
    norms = tuple(math.hypot(*(module.norms[i] or 0.0 for module in modules.values())) for i in every)
    pairs = {}
    for i, j in itertools.combinations(every, 2):
        pairs[i, j] = _pair(names, norms, found, i, j)
    return Diff(names, norms, tuple(_bias_norm(modules, i) for i in every), kept, pairs, modules)


def _bias_norm(modules: Mapping[str, Module], i: int) -> float | None:
    norms = [norm for module in modules.values() if (norm := module.bias_norms[i]) is not None]
    return math.hypot(*norms) if norms else None


def _pair(names: tuple[str, ...], norms: tuple[float, ...], found: Mapping[str, _Found], i: int, j: int) -> Pair:
    modules = {site: own.module for site, own in found.items()}
    both = {site: m for site, m in modules.items() if m.norms[i] is not None and m.norms[j] is not None}
    apart = math.hypot(*(own.apart[i, j] for own in found.values()))
    cosine = None
    if norms[i] and norms[j]:
        shares = [
            cosine * ((m.norms[i] or 0.0) / norms[i]) * ((m.norms[j] or 0.0) / norms[j])
            for m in both.values()
            if (cosine := m.pairs[i, j].cosine) is not None
        ]
        cosine = min(1.0, max(-1.0, math.fsum(shares)))
    counts = [own.signs[i, j] for own in found.values() if (i, j) in own.signs]
    same = [m.pairs[i, j].same for m in both.values()]
    only_a, only_b = (
        tuple(s for s, m in modules.items() if m.norms[p] is not None and m.norms[q] is None)
        for p, q in ((i, j), (j, i))
    )
    whole = bool(both) and not only_a and not only_b and None not in same
    numbers = Likeness(
        cosine=cosine,
        distance=_over(apart, norms[i]),
        gap=min(1.0, apart / (norms[i] + norms[j])) if apart else 0.0,
        overlap_out=_mean(both, i, j, "overlap_out"),
        overlap_in=_mean(both, i, j, "overlap_in"),
        chance_out=_mean(both, i, j, "chance_out"),
        chance_in=_mean(both, i, j, "chance_in"),
        conflicts=_over(sum(n for _, n in counts), sum(n for n, _ in counts)),
        same=("bits" if set(same) == {"bits"} else "numbers") if whole else None,
    )
    return Pair(
        **asdict(numbers),
        a=names[i],
        b=names[j],
        both=len(both),
        identical=same.count("bits"),
        equal=len(same) - same.count(None),
        only_a=only_a,
        only_b=only_b,
        advice=advice(numbers, norms[i], norms[j], names[i], names[j], len(both)),
    )


def _mean(both: Mapping[str, Module], i: int, j: int, what: str) -> float | None:
    """Over all principal angles of all modules: those of the block diagonal matrix that all of them make up."""
    total, angles = [], 0
    for module in both.values():
        value = getattr(module.pairs[i, j], what)
        if value is not None:
            n = min(len(module.spectra[i] or ()), len(module.spectra[j] or ()))
            total.append(n * value)
            angles += n
    return math.fsum(total) / angles if angles else None


def _over(x: float, y: float) -> float | None:
    return x / y if y else None


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Each name once: a second `a` is called `a (2)`."""
    found: list[str] = []
    for name in names:
        label, n = name, 1
        while label in found:
            n += 1
            label = f"{name} ({n})"
        found.append(label)
    return tuple(found)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
