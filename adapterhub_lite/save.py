"""Writing a sum of adapters as a folder, and measuring what is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import algebra, options, recast
from ._version import __version__
from .agreement import asked
from .checkpoint import torch_dtype
from .combine import Truncated, WeightedSum, each
from .delta import Dense, LowRank
from .errors import AdapterError, ConfigError, NotMergeable
from .format import Writer, is_floating
from .plan import Plan, plan
from .protocol import Method, Params
from .registry import registry
from .source import DEFAULT, Piece, make_site, read
from .staging import refuse_occupied, staged

LONG_FLOAT = -1.2345678901234567e-100  # no float takes more room in JSON
TRAINED = {"rule": "sum", "terms": [{"weight": 1.0, "adapter": None}]}
"""The recipe of an adapter in memory as it is: it was not merged, and none is written."""


@dataclass(frozen=True)
class RelativeError:
    """‖stored − exact‖ / ‖exact‖ in the Frobenius norm, overall and for each site.

    Biases count as one more column of ΔW. The rounding to the stored dtype is included.
    """

    overall: float
    modules: Mapping[str, float]
    of: Literal["delta", "tensors"] = "delta"
    """What it is the error of: ΔW, or the stored tensors, where they alone do not give ΔW and no model is at hand.

    The error of ΔW may then be far larger, for a tensor need not be small where ΔW is.
    """

    def __float__(self) -> float:
        return self.overall

    def plain(self) -> dict[str, Any]:
        """As JSON can carry it: None where it is infinite, for the exact value is zero and the stored is not."""
        overall, *modules = (x if math.isfinite(x) else None for x in (self.overall, *self.modules.values()))
        plain = {"overall": overall, "modules": dict(zip(self.modules, modules, strict=True))}
        return plain if self.of == "delta" else {**plain, "of": self.of}


def save(
    source: WeightedSum,
    out: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    any_base: bool = False,
    keep: str | None = None,
    search: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Plan, RelativeError]:
    """Write `source` to the folder `out`, whole or not at all; what was stored, and its error.

    Raises `OutputExists` without `force`, `NotMergeable` where the parts have no sum, `FileError` where a file is
    broken. `dtype` is spelled as in safetensors. `search` is how the weights were found, for the recipe.
    """
    own = registry().format(DEFAULT)
    facts: dict[str, Any] = {"version": __version__}
    recipe = {**source.recipe(), **({} if dtype is None else {"dtype": dtype})}
    if search is not None:
        recipe["search"] = dict(search)
    longest = RelativeError(LONG_FLOAT, dict.fromkeys(source.sites, LONG_FLOAT), of="tensors").plain()
    while True:
        try:
            with staged(out, force=force, replaceable=_replaceable) as folder:  # first: a refused OUT costs no work
                planned = plan(source, dtype=dtype, any_base=any_base, keep=keep)
                if recipe != TRAINED:
                    facts["recipe"] = {**recipe, **asked(planned.contents, any_base=any_base, keep=keep)}
                facts.update(planned.contents.facts, **_method(planned.contents.method))
                with own.writer(folder, planned.contents, room=len(json.dumps({**facts, "error": longest}))) as writer:
                    error = _write(planned, writer, progress)
                    _hold(source, error)
                    facts["error"] = error.plain()
                    writer.finish(facts)
                return planned, error
        except _TooCoarse as coarse:
            source = _tightened(source, coarse.error, planned.dtype)


def refuse_out(out: Path, *, force: bool) -> None:
    """Raise `OutputExists` where `save` would."""
    refuse_occupied(out, force=force, replaceable=_replaceable)


def _replaceable(folder: Path) -> bool:
    # A folder inside is no output of ours: a checkpoint of the training, another adapter, .git.
    return registry().format(DEFAULT).recognises(folder) and not any(path.is_dir() for path in folder.iterdir())


def _method(method: Method) -> dict[str, Any]:
    """The method and its options, where the config alone would give another one to a reader."""
    try:
        told = type(method).from_peft(method.to_peft()) == method
    except AdapterError:
        told = False
    return {} if told else {"method": {"name": method.name, "options": options.plain(method)}}


def measure(source: WeightedSum, *, dtype: str | None = None) -> RelativeError:
    """The error that `save` would report, without writing; adapters need not share a base for it."""
    while True:
        planned = plan(source, dtype=dtype, any_base=True, keep="none")
        error = _write(planned, None, lambda done, total: None)
        try:
            _hold(source, error)
        except _TooCoarse:
            source = _tightened(source, error, planned.dtype)
        else:
            return error


_AT_ONCE = 1 << 16  # entries of a matrix that are measured together


class Loss(NamedTuple):
    """‖stored − exact‖² and ‖exact‖² at one site."""

    delta: tuple[float, float] | None
    """Of ΔW; None if it is not known."""
    tensors: tuple[float, float] = (0.0, 0.0)
    """Of the tensors that are stored, those that it shares with others among them."""


class _TooCoarse(Exception):  # a signal to try again, not an error
    def __init__(self, error: RelativeError) -> None:
        self.error = error


def _hold(source: WeightedSum, error: RelativeError) -> None:
    """A promised `max_error` includes the rounding, which is known only now."""
    cut = _cut(source)
    if cut is not None and error.overall * (1 + 5e-6) > cut.promised:  # it is rounded to six digits
        raise _TooCoarse(error)


def _cut(source: WeightedSum) -> Truncated | None:
    last = source.terms[0][1]
    return last if len(source.terms) == 1 and isinstance(last, Truncated) and last.max_error else None


def _tightened(source: WeightedSum, error: RelativeError, dtype: str) -> WeightedSum:
    cut = _cut(source)
    assert cut is not None
    rounding = error.overall**2 - cut.cut_error**2
    room = cut.promised**2 - 1.02 * rounding
    if room <= 0 or cut.tightenings == 5 or cut.cut_error == 0:
        raise ConfigError(
            f"an error of at most {cut.promised:g} is below what rounding to {dtype} loses, "
            f"{math.sqrt(max(rounding, 0)):.2g}",
            fix="allow a larger error or a wider --dtype",
        )
    return WeightedSum([(source.terms[0][0], cut.tightened(min(math.sqrt(room), 0.98 * cut.cut_error)))])


def _write(planned: Plan, writer: Writer | None, progress: Callable[[int, int], None]) -> RelativeError:
    """Compute and write every site; with no writer, only measure."""
    source, whole, total = planned.source, planned.verbatim, len(planned.source.sites)
    source.prepare()

    def job(name: str) -> Loss:
        if whole is not None:
            if writer is not None:
                for key, tensor in whole.saved(name).items():
                    writer.write(name, key, tensor)
            return Loss((0.0, 1.0))
        return Loss(_one_site(source, planned, writer, name))

    if writer is not None:
        for key, info in planned.contents.kept.items():
            writer.keep(key, read(info) if is_floating(info) else info.read())
        for key, tensor in whole.saved_shared().items() if whole is not None else ():
            writer.share(key, tensor)
    losses: dict[str, Loss] = {}
    try:
        results = each(source.sites, job) if planned.recast is None else _recast(planned, writer)
        for done, (name, loss) in enumerate(results, 1):
            losses[name] = loss
            progress(done, total)
        return _relative(losses)
    except OverflowError:
        raise NotMergeable(
            "the numbers are too large to measure", fix="look for a weight or an alpha that is"
        ) from None


def _relative(losses: Mapping[str, Loss]) -> RelativeError:
    deltas = {name: loss.delta for name, loss in losses.items() if loss.delta is not None}
    tensors = {name: loss.tensors for name, loss in losses.items()}
    known = len(deltas) == len(losses)
    if not known and all(lost == 0 for lost, _ in tensors.values()):
        return RelativeError(0.0, dict.fromkeys(tensors, 0.0))  # the same numbers have the same ΔW
    squares = deltas if known else tensors
    lost, size = (math.fsum(s[i] for s in squares.values()) for i in (0, 1))
    modules = {name: _ratio(*s) for name, s in squares.items()}
    return RelativeError(_ratio(lost, size), modules, "delta" if known else "tensors")


def _recast(planned: Plan, writer: Writer | None) -> Iterator[tuple[str, Loss]]:
    """Write one adapter's own tensors in another dtype; one site at a time, for what is measured may be large."""
    own, contents = planned.recast, planned.contents
    assert own is not None
    shared, of_shared = recast.cast(own.saved_shared(), contents.shared, "the shared")
    if writer is not None:
        for key, tensor in shared.items():
            writer.share(key, tensor)
    for name, part in contents.sites.items():
        stored, of_tensors = recast.cast(own.saved(name), part.tensors, f"at {name!r}")
        if writer is not None:
            for key, tensor in stored.items():
                writer.write(name, key, tensor)
        with_shared = (of_tensors[0] + of_shared[0], of_tensors[1] + of_shared[1])
        yield name, Loss(recast.measured(own, name, Params(stored), shared), with_shared)


def _one_site(source: WeightedSum, planned: Plan, writer: Writer | None, name: str) -> tuple[float, float]:
    """Round one site's delta to what is stored, and write it; ‖stored − exact‖² and ‖exact‖²."""
    piece, c, dtype = source.piece(name), planned.scale, torch_dtype(planned.dtype)
    try:
        stored, lost = algebra.rounded(algebra.low_rank(piece.delta).scaled(1 / c), dtype)
    except NotMergeable as e:
        raise NotMergeable(
            f"at {name!r} {e.what}", fix="choose a wider --dtype (bfloat16 and float32 reach 3e38)"
        ) from e
    if piece.measured is not None:
        lost_square, size = piece.measured(stored.scaled(c))
    else:
        lost_square, size = _squares(piece, lost.scaled(c))
    part = planned.contents.sites.get(name)
    if part is None:  # rank 0: all of it is lost
        unstored = 0.0 if piece.bias is None else float(piece.bias.norm()) ** 2
        return lost_square + unstored, size + unstored
    site, method = make_site(name, part), planned.contents.method.at(name)
    factors = method.factors(LowRank(stored.B, stored.A, c), piece.bias)
    tensors = {key: factors[key].reshape(t.shape).to(dtype) for key, t in part.tensors.items()}
    if piece.bias is not None:
        kept = method.delta_bias(Params({key: t.double() for key, t in tensors.items()}), site)
        lost_square += float((piece.bias - (0.0 if kept is None else kept)).norm()) ** 2
        size += float(piece.bias.norm()) ** 2
    if not math.isfinite(lost_square):
        raise NotMergeable(
            f"the result at {name!r} does not fit {planned.dtype}",
            fix="choose a wider --dtype (bfloat16 and float32 reach 3e38)",
        )
    if writer is not None:
        for key, t in tensors.items():
            writer.write(name, key, t)
    return lost_square, size


def _squares(piece: Piece, rounding: LowRank) -> tuple[float, float]:
    """‖missed‖² and ‖exact‖², without a bias."""
    if any(isinstance(lost, Dense) for lost in piece.lost) and len(rounding.shape) == 2:
        return _squares_by_rows(piece, rounding)
    missed = algebra.total([*piece.lost, rounding])
    if isinstance(missed, Dense):  # one matrix after the other
        lost_square, missed = algebra.norm(missed) ** 2, rounding
        return lost_square, algebra.norm(algebra.total([piece.delta, *(d.scaled(-1.0) for d in piece.lost)])) ** 2
    exact = algebra.total([piece.delta, *(d.scaled(-1.0) for d in piece.lost)])
    lost_square, size = (length**2 for length in algebra.norms([missed, exact]))
    return lost_square, size


def _squares_by_rows(piece: Piece, rounding: LowRank) -> tuple[float, float]:
    """The same where a matrix is at hand: no other of its size is made."""
    rows, columns = rounding.shape
    step, lost_square, size = max(1, _AT_ONCE // columns), 0.0, 0.0
    for start in range(0, rows, step):
        lost, *more = (algebra.rows(delta, start, min(start + step, rows)) for delta in piece.lost)
        for other in more:
            lost = lost + other  # the first may be the matrix itself
        exact = algebra.rows(piece.delta, start, min(start + step, rows)) - lost
        missed = algebra.rows(rounding, start, min(start + step, rows)) + lost
        lost_square += algebra.norm(Dense(missed)) ** 2
        size += algebra.norm(Dense(exact)) ** 2
    return lost_square, size


def _ratio(lost_square: float, square: float) -> float:
    """To six digits: more would only tell one machine's libraries from another's."""
    if lost_square == 0:
        return 0.0
    return float(f"{math.sqrt(lost_square / square):.6g}") if square > 0 else math.inf
