"""Rules `magnitude_prune`, `breadcrumbs`, `della` and `sce` against their formulas, entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from deltas import Matrix, close, dense, elect, largest, merged, parts
from peft.utils import merge_utils

from adapterhub_lite import ConfigError, Place, Rule, elementwise
from adapterhub_lite.registry import registry


def rule(name: str, **options: Any) -> Rule:
    return registry().rule(name)(**options)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_magnitude_prune_is_pefts(density: float) -> None:
    weights = [0.7, -0.3, 2.0]
    own = parts(weights)
    found = merged(rule("magnitude_prune", density=density), own)
    close(found, sum(p.weight * largest(dense(p), int(density * dense(p).size)) for p in own))
    theirs = merge_utils.magnitude_prune(
        [torch.from_numpy(dense(p)) for p in own], torch.tensor(weights, dtype=torch.float64), density
    )
    close(found, theirs.numpy())


def crumbs(values: Matrix, density: float, gamma: float) -> Matrix:
    """Of a flat list: without the largest, and then the largest of what is left."""
    order = np.argsort(-np.abs(values), kind="stable")
    dropped = int(gamma * len(values))
    kept = order[dropped : dropped + int(density * len(values))]
    found = np.zeros_like(values)
    found[kept] = values[kept]
    return found


@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.5, 0.0), (0.8, 0.2)])
@pytest.mark.parametrize("within", ["site", "row"])
def test_breadcrumbs(density: float, gamma: float, within: str) -> None:
    own = parts([0.7, -0.3, 2.0])
    found = merged(rule("breadcrumbs", density=density, gamma=gamma, within=within), own)
    masked = []
    for part in own:
        D = dense(part)
        if within == "row":
            masked.append(np.stack([crumbs(row, density, gamma) for row in D]))
        else:
            masked.append(crumbs(D.ravel(), density, gamma).reshape(D.shape))
    close(found, sum(p.weight * m for p, m in zip(own, masked, strict=True)))


def test_della() -> None:
    weights = [0.2, 0.5, 0.3]
    own, made = parts(weights), rule("della", density=0.5, window=0.4, seed=2, scale=1.5)
    Ds = []
    for part in own:
        D, u = dense(part), made.uniform(part, Place("site", (13, 9))).numpy()
        n = D.shape[1]
        for row, drawn in zip(D, u, strict=True):
            for rank, i in enumerate(np.argsort(np.abs(row))):
                q = 0.3 + 0.4 * rank / (n - 1)
                row[i] = row[i] / q if drawn[i] < q else 0.0
        Ds.append(D)
    close(merged(made, own), 1.5 * elect(Ds, weights))


def test_della_refuses_chances_beyond_0_and_1() -> None:
    with pytest.raises(ConfigError, match=r"density 0\.1 ± half of window 0\.4"):
        rule("della", density=0.1, window=0.4)
    with pytest.raises(ConfigError, match="more than everything"):
        rule("breadcrumbs", density=0.9, gamma=0.2)


@pytest.mark.parametrize("select", [0.3, 1.0])
def test_sce(select: float) -> None:
    own = parts([1.0, 1.0, 1.0])
    Ds = [dense(p) for p in own]
    mean = sum(Ds) / 3
    variance = sum((D - mean) ** 2 for D in Ds) / 3
    mask = largest(variance, int(select * variance.size)) != 0
    Ds = [D * mask for D in Ds]
    eta = [np.sum(D**2) for D in Ds]
    close(merged(rule("sce", select=select), own), elect_by_sum(Ds, eta))


def elect_by_sum(Ds: list[Matrix], weights: list[float]) -> Matrix:
    """Signs by the plain sum, the mean by weights."""
    found = np.zeros(Ds[0].shape)
    sign = np.where(sum(Ds) >= 0, 1, -1)
    for i in np.ndindex(*found.shape):
        agree = [(w, D[i]) for w, D in zip(weights, Ds, strict=True) if np.sign(D[i]) == sign[i]]
        found[i] = sum(w * d for w, d in agree) / sum(w for w, _ in agree) if agree else 0.0
    return found


def test_thresholds_are_compared_in_float32() -> None:
    rng = torch.Generator().manual_seed(0)
    kept = torch.rand(50, generator=rng).add_(0.5).tolist()
    for t in [1.0, float(np.nextafter(np.float32(1), np.float32(2))), 2.0**-130, *kept]:
        near = np.float32(t)
        middles = [(float(np.nextafter(near, np.float32(x))) + float(near)) / 2 for x in (0, 9)]
        around = [*middles, *(np.nextafter(m, x) for m in middles for x in (0, 9)), float(near), 0.0]
        D = torch.tensor([[[*around, *(-x for x in around)]]], dtype=torch.float64)
        expected = torch.where(elementwise.largest(D, [float(near)]), D, 0.0)
        assert torch.equal(elementwise.trimmed(D.clone(), [float(near)]), expected)


def test_masks_are_the_numbers_below() -> None:
    made, part = registry().rule("dare_linear")(), parts([1.0])[0]
    for chance in (0.0, 0.2, 0.7, 1.0):
        mask = made.drawn(part, Place("site", (13, 9)), chance)
        assert torch.equal(mask, made.uniform(part, Place("site", (13, 9))) < chance)
