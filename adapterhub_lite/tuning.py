"""Weights for a merge, found by a score: each trial is an exact sum of adapters that are read once.

The idea is LoRAHub's (https://arxiv.org/abs/2307.13269): a search without gradients, within ±1.5, with a penalty of
0.05 times the mean magnitude of the weights. What is summed is ΔW; the authors' code sums the A's and the B's
separately, which is something else. It begins with the mean, theirs with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import search
from .adapter import Adapter
from .checkpoint import dtype_name
from .errors import ConfigError, ScoreError
from .format import Contents, SiteContents
from .source import Extent, Piece, Source
from .trials import Trial, TrialLog

if TYPE_CHECKING:
    import torch

    from .plan import Plan
    from .save import RelativeError

TRIALS, L1, BOUNDS = 100, 0.05, (-1.5, 1.5)

Merge = Callable[[Sequence[Adapter], Sequence[float]], Adapter]


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    adapter: Adapter
    """The merge with the best weights."""
    best: Trial
    trials: tuple[Trial, ...]
    settled: bool
    """Whether the search ended by itself, before it had used up its trials."""
    facts: Mapping[str, Any]
    """What is stored of the search with the adapter."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The best."""
        return self.best.weights

    @property
    def score(self) -> float:
        """That of the best, without the penalty: on what it was chosen by, so it flatters."""
        return self.best.score

    def write(self, out: Path, **options: Any) -> tuple[Plan, RelativeError]:
        """As `Adapter.write`."""
        return self.adapter.write(out, search=self.facts, **options)

    def save(self, out: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> RelativeError:
        """Write the best merge to the folder `out`, as `Adapter.save`; its recipe tells of the search."""
        return self.write(Path(out), dtype=None if dtype is None else dtype_name(dtype), **options)[1]


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Σ wᵢ ΔWᵢ, exactly."""
    terms = [w * one for w, one in zip(weights, adapters, strict=True)]
    return sum(terms[1:], terms[0])


def tune(
    adapters: Sequence[Adapter],
    score: Callable[[Adapter], float],
    *,
    merge: Merge = weighted_sum,
    trials: int = TRIALS,
    seed: int = 0,
    maximize: bool = True,
    l1: float = L1,
    bounds: tuple[float, float] = BOUNDS,
    start: Sequence[float] | None = None,
    log: str | Path | None = None,
    resume: bool = False,
    command: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """The weights by which the merged adapters score best, searched without gradients, and the merge by them.

    `score` gets a merge, an `Adapter` that is computed when it is used, and gives a finite number: the more the
    better, or with `maximize=False` the less. `l1` times the mean magnitude of the weights counts against it.
    `merge(adapters, weights)` makes the merge, by default the exact sum. There are as many weights as `start` has
    numbers, by default 1/N for each adapter; all lie within `bounds`. The first trial is the start itself, but for one
    of zeros alone, which is no adapter. With the same arguments and scores all trials are the same.

    Each trial is a line in the file `log`. With `resume` those that are there already are not scored again: all other
    arguments but `trials` must be the same. `command` says in the recipe what the score is.

    Raises `ScoreError` where the score is no finite number, `ConfigError`, and for the log `FileError` and
    `OutputExists`. What `score` raises is raised.
    """
    if not adapters:
        raise ConfigError("nothing to merge", fix="give at least one adapter")
    first = [1 / len(adapters)] * len(adapters) if start is None else [float(x) for x in start]
    _check(first, trials, l1, bounds)
    held = [Adapter(((1.0, Kept(one.inner)),)) for one in adapters]
    asked: dict[str, Any] = {"seed": seed, "maximize": maximize, "l1": l1, "bounds": list(bounds), "start": first}
    if command is not None:
        asked["command"] = command
    settings = {**asked, "merge": merge(held, [1.0] * len(first)).source.recipe()}

    def loss(trial: Trial) -> float:
        penalty = l1 * sum(map(abs, trial.weights)) / len(trial.weights)
        return penalty - trial.score if maximize else penalty + trial.score

    found: list[Trial] = []
    points = search.points(first, *bounds, seed)
    with nullcontext() if log is None else TrialLog(Path(log), settings, resume) as known:
        weights: tuple[float, ...] | None = next(points)
        try:
            while weights is not None and len(found) < trials:
                value = math.inf
                if any(weights):
                    found.append(_trial(len(found), weights, held, merge, score, known))
                    value = loss(found[-1])
                    progress(len(found), trials)
                weights = _following(points, value)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(found, loss, log)) from None
    best = min(found, key=loss)
    facts = {**asked, "trials": len(found), "score": best.score}
    return Tuned(merge(held, best.weights), best, tuple(found), weights is None, facts)


class Kept:
    """A source that is read once: what it gives at each site stays in memory."""

    def __init__(self, of: Source) -> None:
        self.of = of
        self._pieces: dict[str, Piece] = {}

    @property
    def contents(self) -> Mapping[str, Contents]:
        return self.of.contents

    @property
    def sites(self) -> Mapping[str, SiteContents]:
        return self.of.sites

    @property
    def written_out(self) -> frozenset[str]:
        return self.of.written_out

    def extent(self, site: str) -> Extent:
        return self.of.extent(site)

    def prepare(self) -> None:
        self.of.prepare()

    def piece(self, site: str) -> Piece:
        if site not in self._pieces:
            self._pieces[site] = self.of.piece(site)
        return self._pieces[site]

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return self.of.recipe()

    def recipe(self) -> dict[str, Any]:
        return self._recipe


def _check(start: Sequence[float], trials: int, l1: float, bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"the bounds {low:g} and {high:g} hold no interval", fix="give the lower one, then the upper")
    if outside := [x for x in start if not low <= x <= high]:
        raise ConfigError(
            f"the search would begin at {outside[0]:g}, which is not within {low:g} and {high:g}",
            fix="give another start, or wider bounds",
        )
    if trials < 1:
        raise ConfigError(f"{trials} trials find nothing", fix="give at least 1")
    if not (math.isfinite(l1) and l1 >= 0):
        raise ConfigError(f"a penalty of {l1:g} is none", fix="give 0 or more")
    if len(start) > 1:
        search.check()


def _trial(
    number: int,
    weights: tuple[float, ...],
    adapters: Sequence[Adapter],
    merge: Merge,
    score: Callable[[Adapter], float],
    log: TrialLog | None,
) -> Trial:
    """The trial of that number: as the log knows it, or scored now."""
    before = None if log is None else log.known(number, weights)
    if before is not None:
        return before
    where = f"trial {number + 1}, weights {shown(weights)}"
    try:
        given = score(merge(adapters, weights))
    except ScoreError as e:
        raise ScoreError(e.what, where=where, fix=e.fix) from e
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ScoreError(f"the score is {given!r}", where=where, fix="give a finite number for every weights")
    trial = Trial(weights, value)
    if log is not None:
        log.note(number, trial)
    return trial


def _following(points: search.Points, value: float) -> tuple[float, ...] | None:
    try:
        return points.send(value)
    except StopIteration:
        return None


def shown(weights: Sequence[float]) -> str:
    """As they can be typed again.

    >>> shown((0.5, -0.25, 1 / 3))
    '0.5 -0.25 0.333333'
    """
    return " ".join(f"{w:.{search.DIGITS}f}".rstrip("0").rstrip(".") for w in weights)


def _interrupted(found: Sequence[Trial], loss: Callable[[Trial], float], log: str | Path | None) -> str:
    if not found:
        return ""
    best = min(found, key=loss)
    said = f"the best of {len(found)} trials was {shown(best.weights)}, with a score of {best.score:g}"
    return said if log is None else f"{said}; --resume goes on with {log}"
