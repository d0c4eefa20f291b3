"""Searching weights: against functions whose optimum is known, and what must not be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import adapterhub_lite as ah
from adapterhub_lite import search
from adapterhub_lite.reproduction import reproduce
from adapterhub_lite.source import Stored

if TYPE_CHECKING:
    from conftest import Handmade

LAYERS = {"net.layers.0.q": 2, "net.layers.1.k": 3, "net.conv": 2}


@pytest.fixture
def adapters(handmade: Handmade, tmp_path: Path) -> list[ah.Adapter]:
    return [ah.load(handmade(tmp_path / name, LAYERS, seed=seed)) for seed, name in enumerate("abc")]


def distance(target: ah.Adapter) -> Callable[[ah.Adapter], float]:
    """The squared distance of a merge from a target, of matrices that are written out."""
    wanted = {site: target.delta(site).dense().double() for site in target.sites}
    return lambda merged: sum(float((merged.delta(s).dense() - w).square().sum()) for s, w in wanted.items())


def smallest(value: Callable[[np.ndarray], float], start: Sequence[float], box: Sequence[float], trials: int) -> float:
    points, best = search.points(start, *box, seed=3), np.inf
    point = next(points)
    for _ in range(trials):
        found = value(np.array(point))
        best = min(best, found)
        try:
            point = points.send(found)
        except StopIteration:
            break
    return float(best)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_search_finds_the_bottom_of_a_bowl(n: int) -> None:
    bottom, steep = np.linspace(-0.7, 1.2, n) if n > 1 else np.array([1.21]), np.geomspace(1, 20, n)
    assert smallest(lambda x: float((steep * (x - bottom) ** 2).sum()), [0.0] * n, (-1.5, 1.5), 300) < 2e-3


@pytest.mark.parametrize("start", [[0.0], [1.0, 0.0], [0.2, 0.5, 1.0]])
def test_the_search_stays_within_the_bounds_and_reaches_them(start: list[float]) -> None:
    seen: list[np.ndarray] = []

    def outside(x: np.ndarray) -> float:
        seen.append(x)
        return float(((x - 3) ** 2).sum())  # the best in the box is its corner, 1 each

    assert smallest(outside, start, (0.0, 1.0), 300) == pytest.approx(4 * len(start), rel=1e-3)
    assert all((x >= 0).all() and (x <= 1).all() for x in seen)


def test_a_line_has_no_smooth_valley() -> None:
    steps = lambda x: float(np.floor(8 * abs(x[0] + 0.9)))  # noqa: E731
    assert smallest(steps, [0.0], (-1.5, 1.5), 100) == 0


def test_tune_finds_the_weights_that_a_target_was_made_by(adapters: list[ah.Adapter], tmp_path: Path) -> None:
    a, b, c = adapters
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index, union-attr]
    found = ah.tune(adapters, distance(0.6 * a - 0.3 * b + 1.1 * c), maximize=False, l1=0.0, trials=300)
    assert np.allclose(found.weights, [0.6, -0.3, 1.1], atol=1e-3)
    assert found.trials[0].weights == (1 / 3, 1 / 3, 1 / 3)
    assert found.score == min(trial.score for trial in found.trials)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_before)
    # What is saved is the plain merge by these weights, and says how they were found.
    assert found.save(tmp_path / "out").overall < 1e-6
    (found.weights[0] * a + found.weights[1] * b + found.weights[2] * c).save(tmp_path / "plain")
    for site, delta in ((s, ah.load(tmp_path / "plain").delta(s)) for s in a.sites):
        assert torch.equal(ah.load(tmp_path / "out").delta(site).dense(), delta.dense())
    recipe = ah.load(tmp_path / "out").single.own.facts["recipe"]  # type: ignore[union-attr]
    assert [term["weight"] for term in recipe["terms"]] == list(found.weights)
    assert recipe["search"] == {
        "seed": 0, "maximize": False, "l1": 0.0, "bounds": [-1.5, 1.5], "start": [1 / 3] * 3,
        "trials": len(found.trials), "score": found.score,
    }  # fmt: skip
    assert reproduce(tmp_path / "out").differences == ()


def test_the_penalty_is_on_the_mean_magnitude(adapters: list[ah.Adapter]) -> None:
    """With s(w) = -(w - 1)², the best of s - x |w| is at 1 - x/2."""
    one = adapters[:1]
    found = ah.tune(one, lambda merged: -((weight_of(merged) - 1) ** 2), l1=0.5, trials=60)
    assert found.weights[0] == pytest.approx(0.75, abs=1e-3)
    assert found.score == pytest.approx(-0.0625, abs=1e-3)  # without the penalty


def weight_of(merged: ah.Adapter) -> float:
    return merged.terms[0][0]


def test_the_same_seed_tries_the_same(adapters: list[ah.Adapter]) -> None:
    score = distance(adapters[0])
    first, again, other = (ah.tune(adapters, score, trials=25, seed=s, maximize=False) for s in (5, 5, 6))
    assert first.trials == again.trials
    assert first.trials != other.trials
    assert len(first.trials) == 25
    assert not first.settled


def test_zeros_are_a_start_and_no_trial(adapters: list[ah.Adapter]) -> None:
    """LoRAHub begins there; no file holds the sum of nothing."""
    for some in (adapters, adapters[:1]):
        found = ah.tune(some, distance(adapters[0]), start=[0.0] * len(some), trials=12, maximize=False)
        assert all(any(trial.weights) for trial in found.trials)
        assert len(found.trials) == 12


def test_any_merge_and_more_weights_than_adapters(adapters: list[ah.Adapter]) -> None:
    """Weights from the first layer to the last, by `cat`; here four for two adapters."""
    a, b, _ = adapters

    def along(some: Sequence[ah.Adapter], w: Sequence[float]) -> ah.Adapter:
        return ah.merge(some, "cat", weights=[{"*": list(w[:2])}, {"*": list(w[2:])}])

    target = along([a, b], [1.0, 0.0, 0.2, 0.9])
    found = ah.tune([a, b], distance(target), merge=along, start=[0.5] * 4, maximize=False, l1=0.0, trials=400)
    assert np.allclose(found.weights, [1.0, 0.0, 0.2, 0.9], atol=0.01)


def test_the_adapters_are_read_once(adapters: list[ah.Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    saved = Stored.saved
    monkeypatch.setattr(Stored, "saved", lambda self, site: (reads.append(site), saved(self, site))[1])
    ah.tune(adapters, distance(adapters[0]), trials=10)
    assert len(reads) == 3 * len(LAYERS) + len(LAYERS)  # and the target's own


# The log ------------------------------------------------------------------------------------------------


def test_a_log_is_gone_on_with_and_nothing_is_scored_twice(adapters: list[ah.Adapter], tmp_path: Path) -> None:
    log, score = tmp_path / "trials.jsonl", distance(adapters[1])
    whole = ah.tune(adapters, score, trials=30, maximize=False)
    calls: list[int] = []

    def stopping(merged: ah.Adapter) -> float:
        if len(calls) == 12:
            raise KeyboardInterrupt
        calls.append(1)
        return score(merged)

    with pytest.raises(KeyboardInterrupt, match=r"the best of 12 trials was .* --resume goes on"):
        ah.tune(adapters, stopping, trials=30, maximize=False, log=log)
    lines = log.read_text().splitlines()
    assert len(lines) == 13
    log.write_text(log.read_text() + lines[1][:20])  # a line that a killed run had begun

    def counted(merged: ah.Adapter) -> float:
        calls.append(2)
        return score(merged)

    found = ah.tune(adapters, counted, trials=30, maximize=False, log=log, resume=True)
    assert found.trials == whole.trials
    assert calls.count(2) == 18
    assert [json.loads(line)["trial"] for line in log.read_text().splitlines()[1:]] == list(range(1, 31))
    with pytest.raises(ah.OutputExists, match="there is a log already"):
        ah.tune(adapters, score, log=log)
    with pytest.raises(ah.FileError, match="the log of another search"):
        ah.tune(adapters, score, trials=30, maximize=False, seed=1, log=log, resume=True)
    with pytest.raises(ah.FileError, match="the log of another search"):
        ah.tune(adapters[:2], score, trials=30, maximize=False, log=log, resume=True)
    lines[3] = json.dumps({**json.loads(lines[3]), "weights": [0.1, 0.2, 0.3]})
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(ah.FileError, match="trial 3 is of weights that this search does not come to"):
        ah.tune(adapters, score, trials=30, maximize=False, log=log, resume=True)


@pytest.mark.parametrize("text", ["no json\n", '{"a": 1}\n[]\n', '{}\n{"weights": [1], "score": NaN}\n', "[[[[[\n"])
def test_a_file_that_is_no_log_is_left_alone(adapters: list[ah.Adapter], tmp_path: Path, text: str) -> None:
    log = tmp_path / "notes.txt"
    log.write_text(text)
    with pytest.raises(ah.FileError):
        ah.tune(adapters, distance(adapters[0]), log=log, resume=True)
    assert log.read_text() == text


# Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5 or so", None])
def test_a_score_is_a_finite_number(adapters: list[ah.Adapter], value: object) -> None:
    with pytest.raises(ah.ScoreError, match=r"trial 1, weights 0.333333 0.333333 0.333333: the score is"):
        ah.tune(adapters, lambda merged: value)  # type: ignore[arg-type, return-value]


def test_what_the_score_raises_is_raised(adapters: list[ah.Adapter]) -> None:
    with pytest.raises(ZeroDivisionError):
        ah.tune(adapters, lambda merged: 1 / 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bounds": (1.0, -1.0)}, "hold no interval"),
        ({"bounds": (0.0, float("nan"))}, "hold no interval"),
        ({"start": [0.1, 2.0]}, "begin at 2, which is not within -1.5 and 1.5"),
        ({"trials": 0}, "0 trials"),
        ({"l1": -0.1}, "penalty of -0.1"),
    ],
)
def test_options_that_make_no_sense(adapters: list[ah.Adapter], options: dict[str, object], words: str) -> None:
    with pytest.raises(ah.ConfigError, match=words):
        ah.tune(adapters[:2], lambda merged: 0.0, **options)  # type: ignore[arg-type]


def test_without_cma_it_says_what_to_install(adapters: list[ah.Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ah.ConfigError, match=r"adapterhub-lite\[search\]"):
        ah.tune(adapters, lambda merged: 0.0)
    assert ah.tune(adapters[:1], lambda merged: 0.0, trials=3).weights == (1.0,)  # a line needs none
