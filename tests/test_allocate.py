"""Allocation of ranks against every possible choice, and against the linear bound where there are too many."""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapterhub_lite import allocate
from adapterhub_lite.allocate import within_budget, within_error
from adapterhub_lite.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Spectra = dict[str, list[float]]
Costs = dict[str, int]

VALUES = st.one_of(st.floats(1e-30, 4), st.integers(0, 4).map(float))
SPECTRA = st.lists(st.lists(VALUES, max_size=4).map(lambda s: sorted(s, reverse=True)), max_size=4)
COSTS = st.lists(st.one_of(st.sampled_from([1, 2, 3, 7]), st.integers(1, 50)), min_size=4, max_size=4)


def problem(spectra: list[list[float]], costs: list[int]) -> tuple[Spectra, Costs]:
    names = "dbca"  # not in order of sorting
    return dict(zip(names, spectra, strict=False)), dict(zip(names, costs, strict=True))


def choices(spectra: Spectra) -> Iterator[dict[str, int]]:
    for ranks in itertools.product(*(range(len(s) + 1) for s in spectra.values())):
        yield dict(zip(spectra, ranks, strict=True))


def price(ranks: dict[str, int], cost: Costs) -> int:
    return sum(rank * cost[name] for name, rank in ranks.items())


def kept(ranks: dict[str, int], spectra: Spectra) -> float:
    return math.fsum(v * v for name, rank in ranks.items() for v in spectra[name][:rank])


def dropped(ranks: dict[str, int], spectra: Spectra) -> float:
    return math.fsum(v * v for name, rank in ranks.items() for v in spectra[name][rank:])


@settings(max_examples=200, deadline=None)
@given(SPECTRA, COSTS, st.floats(0, 1.1))
@example([[3.0, 3.0], [2.0]], [5, 4, 1, 1], 10 / 14)  # greedy by density takes 3² and 2²
def test_no_choice_within_the_budget_keeps_more(spectra: list[list[float]], costs: list[int], share: float) -> None:
    sigma, cost = problem(spectra, costs)
    budget = int(share * price({name: len(s) for name, s in sigma.items()}, cost))
    ranks = within_budget(sigma, cost, budget)
    assert list(ranks) == list(sigma)
    assert price(ranks, cost) <= budget
    best = max(kept(r, sigma) for r in choices(sigma) if price(r, cost) <= budget)
    assert kept(ranks, sigma) == pytest.approx(best, rel=1e-14, abs=1e-300)
    assert all(v > 0 for name, rank in ranks.items() for v in sigma[name][:rank])


@settings(max_examples=200, deadline=None)
@given(SPECTRA, COSTS, st.one_of(st.floats(0, 1.1), st.sampled_from([0.0, 0.5, 1.0])))
@example([[5.0, 0.1, 0.1, 0.1], [0.2]], [3, 2, 1, 1], 0.04)
def test_no_choice_within_the_error_is_cheaper(spectra: list[list[float]], costs: list[int], error: float) -> None:
    sigma, cost = problem(spectra, costs)
    allowed = error**2 * dropped(dict.fromkeys(sigma, 0), sigma)
    ranks = within_error(sigma, cost, error)
    assert dropped(ranks, sigma) <= allowed
    # Where a choice drops what is allowed to the last digit, rounding decides whether it may.
    below, above = (
        min(price(r, cost) for r in choices(sigma) if dropped(r, sigma) <= allowed * slack)
        for slack in (1 + 1e-14, 1 - 1e-14)
    )
    assert below <= price(ranks, cost) <= above


@pytest.mark.parametrize(
    ("spectra", "error", "ranks"),
    [
        ({"a": [4.0], "b": [3.0]}, 0.6, {"a": 1, "b": 0}),  # 9 of 25
        ({"a": [0.3] * 4, "b": [0.3] * 12}, 0.5, {"a": 4, "b": 8}),  # 4 of 16
        ({"a": [5.0, 3e-12], "b": [1.0, 4e-12]}, 5e-13, {"a": 2, "b": 2}),
        ({"a": [5.0, 3e-12], "b": [1.0, 4e-12]}, 6e-13, {"a": 1, "b": 2}),
        ({"a": [5.0, 3e-12], "b": [1.0, 4e-12]}, 1e-12, {"a": 1, "b": 1}),
    ],
)
def test_exactly_the_error_allowed_is_used(spectra: Spectra, error: float, ranks: dict[str, int]) -> None:
    assert within_error(spectra, dict.fromkeys(spectra, 7), error) == ranks


def model(values: int, cost: Callable[[int], int], seed: int = 0) -> tuple[Spectra, Costs]:
    """224 modules with decaying spectra."""
    rng = np.random.default_rng(seed)
    decay = np.exp(-3 * np.arange(values) / values)
    spectra = {
        f"m{i:03}": sorted((abs(rng.standard_normal(values)) * decay * rng.uniform(0.3, 3)).tolist(), reverse=True)
        for i in range(224)
    }
    return spectra, {name: cost(i) for i, name in enumerate(spectra)}


LLAMA = (8192, 8192, 5120, 5120, 20480, 20480, 20480)
COST_KINDS: dict[str, Callable[[int], int]] = {
    "seven layers": lambda i: LLAMA[i % 7],
    "one size": lambda i: 8192,
    "all differ": lambda i: 1000 + 7919 * i % 20011,
}


def linear_bound(spectra: Spectra, cost: Costs, budget: float) -> tuple[float, float]:
    """The most energy if singular values could be split, and the energy of the one that is."""
    items = sorted(((v * v / cost[n], v * v, cost[n]) for n, s in spectra.items() for v in s), reverse=True)
    bound = 0.0
    for density, energy, weight in items:
        if weight > budget:
            return bound + density * budget, energy
        bound, budget = bound + energy, budget - weight
    return bound, 0.0


@pytest.mark.parametrize("kind", COST_KINDS)
@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_a_large_model_stays_near_the_linear_bound(kind: str, share: float) -> None:
    spectra, cost = model(48, COST_KINDS[kind])
    whole = price(dict.fromkeys(spectra, 48), cost)
    budget = int(share * whole)
    ranks = within_budget(spectra, cost, budget)
    bound, split = linear_bound(spectra, cost, budget)
    assert price(ranks, cost) <= budget
    assert bound - split < kept(ranks, spectra) <= bound * (1 + 1e-12)

    ranks = within_error(spectra, cost, share)
    total = dropped(dict.fromkeys(spectra, 0), spectra)
    assert dropped(ranks, spectra) <= share**2 * total
    # With one unit of rank less to spend, even split values could not keep what has to be kept.
    bound, _ = linear_bound(spectra, cost, price(ranks, cost) - max(cost.values()))
    assert bound < (1 - share**2) * total


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_seven_layer_sizes_are_solved_to_the_end(share: float) -> None:
    """The optimum for three sizes, from every way to share the budget among them."""
    spectra, cost = model(6, COST_KINDS["seven layers"], seed=3)
    budget = int(share * price(dict.fromkeys(spectra, 6), cost)) + 1000
    sums, sizes = [], sorted(set(cost.values()))
    for size in sizes:
        energies = sorted((v * v for n, s in spectra.items() if cost[n] == size for v in s), reverse=True)
        sums.append(np.concatenate([[0.0], np.cumsum(energies)]))
    best = 0.0
    for many, first in enumerate(sums[0]):
        for more, second in enumerate(sums[1]):
            left = (budget - many * sizes[0] - more * sizes[1]) // sizes[2]
            if left < 0:
                break
            best = max(best, first + second + sums[2][min(left, len(sums[2]) - 1)])
    assert kept(within_budget(spectra, cost, budget), spectra) == pytest.approx(best, rel=1e-13)


def test_the_limit_of_the_search_costs_less_than_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    spectra, cost = model(48, COST_KINDS["all differ"])
    budget = price(dict.fromkeys(spectra, 20), cost)
    searched = within_budget(spectra, cost, budget)
    for limit in (0, 1, 1000):
        monkeypatch.setattr(allocate, "_STATES", limit)
        ranks = within_budget(spectra, cost, budget)
        bound, split = linear_bound(spectra, cost, budget)
        assert price(ranks, cost) <= budget
        assert bound - split < kept(ranks, spectra) <= kept(searched, spectra)
        assert dropped(within_error(spectra, cost, 0.1), spectra) <= 0.01 * kept(dict.fromkeys(cost, 48), spectra)


@pytest.mark.parametrize(
    "same", [lambda c: 1.0, lambda c: math.sqrt(c), lambda c: c], ids=["equal", "equal density", "rising"]
)
@pytest.mark.parametrize("kind", COST_KINDS)
def test_ties_do_not_stall_the_search(kind: str, same: Callable[[int], float]) -> None:
    _, cost = model(1, COST_KINDS[kind])
    spectra = {name: [same(c)] * 48 for name, c in cost.items()}
    budget = price(dict.fromkeys(cost, 17), cost) + 999
    start = time.process_time()
    ranks = within_budget(spectra, cost, budget)
    cheap = within_error(spectra, cost, 0.3)
    assert time.process_time() - start < 2  # some 0.1 s; without limits it would take all memory
    bound, split = linear_bound(spectra, cost, budget)
    assert bound - split < kept(ranks, spectra) * (1 + 1e-12)
    assert price(ranks, cost) <= budget
    assert dropped(cheap, spectra) <= 0.3**2 * dropped(dict.fromkeys(cost, 0), spectra)


@pytest.mark.parametrize(("values", "seconds"), [(48, 0.05), (512, 1.0)])
@pytest.mark.parametrize("kind", COST_KINDS)
def test_it_is_quick(kind: str, values: int, seconds: float) -> None:
    spectra, cost = model(values, COST_KINDS[kind])
    budget = price(dict.fromkeys(cost, values // 3), cost)
    for solve in (lambda: within_budget(spectra, cost, budget), lambda: within_error(spectra, cost, 0.2)):
        taken = []
        for _ in range(3):
            start = time.process_time()
            solve()
            taken.append(time.process_time() - start)
        assert min(taken) < 3 * seconds  # a shared machine is up to three times as slow


def test_ties_go_by_name_whatever_the_order_given() -> None:
    spectra = {"b": [1.0, 1.0], "a": [1.0, 1.0], "c": [1.0]}
    cost = dict.fromkeys("abc", 10)
    assert within_budget(spectra, cost, 30) == {"b": 1, "a": 2, "c": 0}
    assert list(within_budget(spectra, cost, 30)) == ["b", "a", "c"]
    assert within_error(spectra, cost, math.sqrt(0.41)) == {"b": 1, "a": 2, "c": 0}
    many = {f"m{i:02}": [1.0] for i in range(60, 0, -1)}
    ranks = within_budget(many, dict.fromkeys(many, 3), 3 * 25)
    assert sorted(name for name, rank in ranks.items() if rank) == sorted(many)[:25]
    backwards = dict(reversed(spectra.items()))
    assert within_budget(backwards, cost, 30) == within_budget(spectra, cost, 30)


def test_the_ends_of_the_range() -> None:
    spectra, cost = {"a": [2.0, 1.0, 0.0], "b": [0.0], "c": []}, {"a": 5, "b": 1, "c": 1, "unused": 0}
    assert within_budget(spectra, cost, 0) == {"a": 0, "b": 0, "c": 0}
    assert within_budget(spectra, cost, 4) == {"a": 0, "b": 0, "c": 0}
    assert within_budget(spectra, cost, 10**30) == {"a": 2, "b": 0, "c": 0}  # zeros are never kept
    assert within_error(spectra, cost, 0.0) == {"a": 2, "b": 0, "c": 0}
    assert within_error(spectra, cost, 1.0) == {"a": 0, "b": 0, "c": 0}
    assert within_error({"a": [0.1] * 3}, {"a": 1}, 1.0) == {"a": 0}
    assert within_error({"a": [0.0]}, {"a": 1}, math.inf) == {"a": 0}
    assert within_budget({}, {}, 5) == within_error({}, {}, 0.5) == {}


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_of_the_values_does_not_matter(scale: float) -> None:
    spectra = {"a": [3 * scale, scale], "b": [2 * scale, 0.5 * scale]}
    assert within_budget(spectra, {"a": 3, "b": 2}, 6) == {"a": 1, "b": 1}
    assert within_error(spectra, {"a": 3, "b": 2}, 0.35) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("spectra", "cost", "amount"),
    [
        ({"m": [1.0, math.nan]}, {"m": 1}, 1),
        ({"m": [math.inf]}, {"m": 1}, 1),
        ({"m": [1.0, -1e-9]}, {"m": 1}, 1),
        ({"m": [[1.0]]}, {"m": 1}, 1),
        ({"m": [1.0]}, {}, 1),
        ({"m": [1.0]}, {"m": 0}, 1),
        ({"m": [1.0]}, {"m": 2.5}, 1),
        ({"m": [1.0]}, {"m": math.nan}, 1),
        ({"m": [1.0]}, {"m": 1}, -1),
        ({"m": [1.0]}, {"m": 1}, math.nan),
    ],
)
def test_what_is_no_size_is_refused(spectra: Spectra, cost: Costs, amount: float) -> None:
    for solve in (within_budget, within_error):
        with pytest.raises(ConfigError, match=r"m: |^the budget|^the error"):
            solve(spectra, cost, amount)  # type: ignore[arg-type]
