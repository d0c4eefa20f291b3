"""Adapters at one site for the tests of rules, and running a rule on them as `Merged` does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from adapterhub_lite import LowRank, Part, Place, Rule
from adapterhub_lite.rule import Facts

Matrix = np.ndarray  # (out, in), float64
OUT, IN = 13, 9
RANKS = (3, 2, 4)


def parts(weights: Sequence[float], *, site: str = "site", shape: tuple[int, int] = (OUT, IN)) -> list[Part]:
    """One adapter for each weight, of ranks that differ; others at another site."""
    made = []
    for i, w in enumerate(weights):
        rng = torch.Generator().manual_seed(sum(site.encode()) * 10 + i)
        r = RANKS[i % len(RANKS)]
        B = torch.randn(shape[0], r, generator=rng, dtype=torch.float64)
        A = torch.randn(r, shape[1], generator=rng, dtype=torch.float64)
        made.append(Part(LowRank(B, A, 0.5 + 0.25 * i), w, i, f"key {i}"))
    return made


def dense(part: Part) -> Matrix:
    """The change itself, by numpy."""
    assert isinstance(part.delta, LowRank)
    found: Matrix = part.delta.scale * (part.delta.B.numpy() @ part.delta.A.numpy())
    return found


def run(rule: Rule, sites: dict[str, list[Part]]) -> dict[str, Matrix]:
    """The rule's result at each site, after its passes over all of them."""
    facts: Facts = {}
    places = {name: Place(name, tuple(own[0].delta.shape)) for name, own in sites.items()}  # type: ignore[arg-type]
    for _ in range(rule.passes):
        facts = rule.conclude({n: rule.observe(own, places[n], facts) for n, own in sites.items()}, facts)
    return {n: rule.merge(own, places[n], facts).dense().double().numpy() for n, own in sites.items()}


def merged(rule: Rule, own: list[Part]) -> Matrix:
    """The rule's result where there is one site."""
    return run(rule, {"site": own})["site"]


def close(found: Matrix, expected: Matrix, bound: float = 1e-10) -> None:
    assert np.abs(expected).max() > 1e-3, "nothing is tested"
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def largest(D: Matrix, kept: int) -> Matrix:
    """D with its `kept` largest entries alone."""
    order = np.argsort(-np.abs(D), axis=None, kind="stable")[:kept]
    mask = np.zeros(D.size)
    mask[order] = 1
    found: Matrix = D * mask.reshape(D.shape)
    return found


def elect(Ds: list[Matrix], w: Sequence[float]) -> Matrix:
    """TIES's last two steps, entry by entry: the sign of Σ wD, and the mean of those that have it, by weights."""
    found = np.zeros(Ds[0].shape)
    for i in np.ndindex(*found.shape):
        sign = np.sign(sum(x * D[i] for x, D in zip(w, Ds, strict=True)))
        agree = [(x, D[i]) for x, D in zip(w, Ds, strict=True) if sign != 0 and np.sign(D[i]) == sign and x > 0]
        if agree:
            found[i] = sum(x * d for x, d in agree) / sum(x for x, _ in agree)
    return found
