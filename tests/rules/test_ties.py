"""Rule `ties` against TIES entry by entry, and against PEFT and mergekit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deltas import Matrix, close, dense, elect, largest, merged, parts, run
from peft.utils import merge_utils

import adapterhub_lite as ah
from adapterhub_lite import Rule
from adapterhub_lite.registry import registry


def ties(**options: object) -> Rule:
    return registry().rule("ties")(**options)


def trimmed(Ds: list[Matrix], density: float) -> list[Matrix]:
    return [largest(D, int(density * D.size)) for D in Ds]


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 0.5, 0.3], [1.0, 0.0, 2.0]])
def test_in_each_layer(density: float, weights: list[float]) -> None:
    own = parts(weights)
    expected = 1.5 * elect(trimmed([dense(p) for p in own], density), weights)
    close(merged(ties(density=density, scope="site", scale=1.5), own), expected)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.999])
def test_over_the_whole_model(density: float) -> None:
    weights = [0.5, 0.25, 0.25]
    shapes = {"a": (13, 9), "b": (4, 21), "c": (1, 1)}
    sites = {name: parts(weights, site=name, shape=shape) for name, shape in shapes.items()}
    found = run(ties(density=density), sites)
    whole = [np.concatenate([dense(own[i]).ravel() for own in sites.values()]) for i in range(3)]
    kept = trimmed(whole, density)
    at = 0
    for name, shape in shapes.items():
        n = shape[0] * shape[1]
        expected = elect([k[at : at + n].reshape(shape) for k in kept], weights)
        at += n
        assert np.abs(found[name] - expected).max() < 1e-10
    assert any(np.abs(own).max() > 0.1 for own in found.values())


def test_a_tie_has_no_sign_in_the_paper_and_a_positive_one_elsewhere() -> None:
    D = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    own = [ah.Part(ah.Dense(D), 1.0, 0, "a"), ah.Part(ah.Dense(torch.tensor([[-1.0, 1.0]])), 1.0, 1, "b")]
    assert merged(ties(density=1.0), own).tolist() == [[0.0, 1.5]]
    assert merged(ties(density=1.0, variant="mergekit"), own).tolist() == [[1.0, 1.5]]
    assert merged(ties(density=1.0, variant="peft"), own).tolist() == [[1.0, 1.5]]


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, -0.5, 0.3]])
def test_peft_computes_its_variant(density: float, weights: list[float]) -> None:
    own = parts(weights)
    theirs = merge_utils.ties(
        [torch.from_numpy(dense(p)) for p in own], torch.tensor(weights, dtype=torch.float64), density
    )
    close(merged(ties(density=density, variant="peft"), own), theirs.numpy())


def test_one_threshold_keeps_entries_of_equal_size_together() -> None:
    D = torch.tensor([[3.0, -2.0, 2.0, 1.0]])
    own = [ah.Part(ah.Dense(D), 1.0, 0, "a")]
    assert merged(ties(density=0.5), own).tolist() == [[3.0, -2.0, 2.0, 0.0]]
    assert merged(ties(density=0.1), own).tolist() == [[0.0, 0.0, 0.0, 0.0]]  # a tenth of four entries is none
