"""Which singular values to keep, over all modules at once.

Keeping rank k of a module costs k times the size of one unit of its rank. What keeps the
most energy Σσ² within a size, and what is cheapest within an error, are both 0/1 knapsacks
over single values: since those of one module cost the same, a best choice takes the
largest of each. Zeros are never kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adapterhub_lite.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# How many states the search may look at. Three layer sizes need some thousands, a dozen up to
# hundreds of thousands; beyond are dozens of sizes, where what little is left to gain is given up.
_STATES = 400_000

# Costs below this cannot overflow in sums.
_HIGHEST_COST = 1 << 40


def within_budget(spectra: Mapping[str, Sequence[float]], cost: Mapping[str, int], budget: int) -> dict[str, int]:
    """The ranks that keep the most energy with Σ rank · cost ≤ budget.

    `spectra` has the singular values of each module, `cost` what one unit of its rank
    takes, in bytes for example. Among equal values those of the names that sort first are
    kept. A budget below the cheapest unit gives rank 0 everywhere. The result is optimal;
    where the search has to stop at its limit, it keeps less than an optimal one by less
    than the energy of one singular value.

    >>> within_budget({"q": [3.0, 2.0, 0.1], "v": [1.0, 0.5]}, {"q": 10, "v": 4}, 24)
    {'q': 2, 'v': 1}
    """
    if not 0 <= budget < math.inf:
        raise ConfigError(f"the budget is {budget}", fix="give 0 or more")
    classes = _by_cost(spectra, cost)
    unit = math.gcd(*(c.cost for c in classes)) or 1
    items = [_Items(c.energy, np.full(len(c.energy), c.cost // unit, np.int64)) for c in classes]
    return _ranks(spectra, classes, _knapsack(items, int(budget // unit), 0.0))


def within_error(spectra: Mapping[str, Sequence[float]], cost: Mapping[str, int], max_error: float) -> dict[str, int]:
    """The cheapest ranks that drop at most max_error² of the total energy.

    `max_error` is thus the relative Frobenius error allowed over all modules together.
    Otherwise as `within_budget`: the result is optimal; where the search has to stop at its
    limit, it costs more than an optimal one by less than one unit of rank.

    >>> within_error({"q": [3.0, 2.0, 0.1], "v": [1.0, 0.5]}, {"q": 10, "v": 4}, 0.2)
    {'q': 2, 'v': 1}
    """
    if not max_error >= 0:
        raise ConfigError(f"the error allowed is {max_error}", fix="give a number from 0 to 1")
    classes = _by_cost(spectra, cost)
    allowed = min(max_error, 1.0) ** 2 * math.fsum(e for c in classes for e in c.energy.tolist())
    # The knapsack holds what is dropped, the smallest first, and its weights are energies.
    droppable = [c.energy[c.energy <= allowed][::-1] for c in classes]
    most = math.fsum(e for energy in droppable for e in energy.tolist())
    if most <= allowed:
        dropped = [len(energy) for energy in droppable]
    else:
        # As integers they add up exactly; rounded up, they never add up to too little.
        exponent = 60 - math.frexp(most)[1]
        items = [
            _Items(np.full(len(e), float(c.cost)), np.ceil(np.ldexp(e, exponent)).astype(np.int64))
            for c, e in zip(classes, droppable, strict=True)
        ]
        unit = float(math.gcd(*(c.cost for c in classes)))
        dropped = _knapsack(items, math.floor(math.ldexp(allowed, exponent)), unit)
    kept = [len(c.energy) - count for c, count in zip(classes, dropped, strict=True)]
    return _ranks(spectra, classes, kept)


class _Class(NamedTuple):
    """All singular values that cost the same, the largest first."""

    cost: int
    energy: NDArray[np.float64]  # squares, all in units of one power of two
    module: NDArray[np.int64]  # whose each is: an index into the sorted names


def _by_cost(spectra: Mapping[str, Sequence[float]], cost: Mapping[str, int]) -> list[_Class]:
    values = {name: _checked(name, spectra[name], cost) for name in sorted(spectra)}
    largest = max((float(v.max()) for v in values.values() if len(v)), default=0.0)
    exponent = -math.frexp(largest)[1]  # squares neither overflow nor round differently
    classes = []
    for price in sorted({cost[name] for name in values}):
        chosen = [(i, np.ldexp(values[name], exponent) ** 2) for i, name in enumerate(values) if cost[name] == price]
        energy = np.concatenate([e for _, e in chosen])
        module = np.concatenate([np.full(len(e), i) for i, e in chosen])
        order = np.argsort(-energy, kind="stable")
        order = order[energy[order] > 0]
        classes.append(_Class(price, energy[order], module[order]))
    return classes


def _checked(name: str, spectrum: Sequence[float], cost: Mapping[str, int]) -> NDArray[np.float64]:
    values = np.asarray(spectrum, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ConfigError("the spectrum is no list of finite values from 0", where=name, fix="check its tensors")
    price = cost.get(name, 0)
    if not 0 < price < _HIGHEST_COST or price % 1:
        raise ConfigError(f"the cost of a rank is {price}", where=name, fix="give a whole number from 1")
    return values


def _ranks(spectra: Mapping[str, Sequence[float]], classes: list[_Class], kept: list[int]) -> dict[str, int]:
    ranks = np.zeros(len(spectra), np.int64)
    for c, count in zip(classes, kept, strict=True):
        np.add.at(ranks, c.module[:count], 1)
    by_name = dict(zip(sorted(spectra), ranks.tolist(), strict=True))
    return {name: by_name[name] for name in spectra}


class _Items(NamedTuple):
    """A class for the knapsack: what it takes of these, it takes from the front."""

    value: NDArray[np.float64]
    weight: NDArray[np.int64]  # value / weight does not increase


def _knapsack(classes: list[_Items], capacity: int, unit: float) -> list[int]:
    """How many items of each class make the most value within `capacity`.

    `unit` is a number of which all values are multiples, 0 if none is known. First the
    linear relaxation: items by value per weight, up to the first that does not fit. At its
    price λ for a unit of weight, no choice is worth more than the bound it gives, and a
    choice falls short of that by λ for each unit of weight left free, plus the loss
    |value - λ·weight| of each item it decides otherwise than the relaxation. The search
    then looks for the choice that falls short least.
    """
    if sum(int(c.weight.sum()) for c in classes) <= capacity:
        return [len(c.value) for c in classes]
    density = np.concatenate([c.value / c.weight for c in classes])
    owner = np.repeat(np.arange(len(classes)), [len(c.value) for c in classes])
    order = np.argsort(-density, kind="stable")
    filled = np.cumsum(np.concatenate([c.weight for c in classes])[order])
    fitting = int(np.searchsorted(filled, capacity, side="right"))
    price = float(density[order[fitting]])
    free = capacity - (int(filled[fitting - 1]) if fitting else 0)
    counts = np.bincount(owner[order[:fitting]], minlength=len(classes))
    moves = [_moves(c, k, price, price * free) for c, k in zip(classes, counts.tolist(), strict=True)]
    for i, move in _search(moves, free, price, unit):
        counts[i] += move
    result: list[int] = counts.tolist()
    return result


class _Moves(NamedTuple):
    """Ways to take more or fewer of one class than the relaxation does; the first changes nothing."""

    change: NDArray[np.int64]  # in how many are taken
    weight: NDArray[np.int64]
    loss: NDArray[np.float64]  # does not decrease


def _moves(c: _Items, taken: int, price: float, limit: float) -> _Moves:
    loss = np.abs(c.value - price * c.weight)
    more = np.cumsum(loss[taken:])
    fewer = np.cumsum(loss[:taken][::-1])
    more, fewer = more[more < limit], fewer[fewer < limit]
    change = np.concatenate([[0], np.arange(1, len(more) + 1), -np.arange(1, len(fewer) + 1)])
    added = np.cumsum(c.weight[taken : taken + len(more)])
    removed = np.cumsum(c.weight[:taken][::-1][: len(fewer)])
    weight, loss = np.concatenate([[0], added, -removed]), np.concatenate([[0.0], more, fewer])
    order = np.argsort(loss, kind="stable")
    return _Moves(change[order], weight[order], loss[order])


def _search(moves: list[_Moves], free: int, price: float, unit: float) -> list[tuple[int, int]]:
    """The moves, as (class, count), that together fall short of the bound least.

    Branch and bound, one class after the other and all open branches at once. A branch is
    given up where its losses alone, or with the weight that must stay free, reach the best
    shortfall known, and where another is no heavier and worth no less.
    """
    # Those with the least to lose come first: a good choice found early closes most branches.
    order = sorted((i for i, m in enumerate(moves) if len(m.change) > 1), key=lambda i: moves[i].loss[1])
    can_add = _sums_behind([int(moves[i].weight.max()) for i in order])
    can_free = _sums_behind([-int(moves[i].weight.min()) for i in order])
    weight, loss = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # of each state: its parent, its move
    best: list[tuple[int, int]] = []
    shortest, room = price * free - unit / 2, _STATES
    for depth, i in enumerate(order):
        if shortest <= 0 or not 0 < len(loss) <= room:
            break
        options = room // len(loss)
        change, heavier, lost = moves[i].change[:options], moves[i].weight[:options], moves[i].loss[:options]
        room -= len(loss) * len(change)
        parent, move = np.divmod(np.arange(len(loss) * len(change)), len(change))
        weight, loss = weight[parent] + heavier[move], loss[parent] + lost[move]
        short = np.where(weight <= free, loss + price * (free - weight), math.inf)
        at = int(short.argmin())
        if short[at] < shortest:
            shortest = float(short[at]) - unit / 2
            best = [(i, int(change[move[at]])), *_path(order, trail, int(parent[at]))]
        within_reach = (loss < shortest) & (weight <= free + can_free[depth])
        within_reach &= loss + price * (free - weight - can_add[depth]) < shortest
        states = np.flatnonzero(within_reach)
        states = states[np.lexsort((loss[states], weight[states]))]
        worth = price * weight[states] - loss[states]
        states = states[worth > np.maximum.accumulate(np.concatenate([[-math.inf], worth]))[:-1]]
        trail.append((parent[states], change[move[states]]))
        weight, loss = weight[states], loss[states]
    return best


def _path(
    order: list[int], trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]], state: int
) -> list[tuple[int, int]]:
    """The moves that led to this state of the last step."""
    path = []
    for i, (parent, change) in reversed(list(zip(order, trail, strict=False))):
        path.append((i, int(change[state])))
        state = int(parent[state])
    return path


def _sums_behind(amounts: list[int]) -> list[int]:
    """For each, the sum of those after it."""
    return [sum(amounts[i + 1 :]) for i in range(len(amounts))]
