"""Rules `dare_linear` and `dare_ties` against their formulas, and against PEFT with the same masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from deltas import Matrix, close, dense, elect, merged, parts
from peft.utils import merge_utils
from torch import Tensor

from adapterhub_lite import Part, Place, Rule
from adapterhub_lite.registry import registry


def rule(name: str, **options: Any) -> Rule:
    return registry().rule(name)(**options)


def masks(own: Rule, given: list[Part], density: float) -> list[Matrix]:
    place = Place("site", tuple(given[0].delta.shape))  # type: ignore[arg-type]
    return [(own.uniform(part, place).numpy() < density).astype(np.float64) for part in given]


def test_linear_is_a_sum_of_masked_changes() -> None:
    own, made = parts([0.7, -0.3, 2.0]), rule("dare_linear", density=0.4, seed=3)
    m = masks(made, own, 0.4)
    close(merged(made, own), sum(p.weight * mask * dense(p) / 0.4 for p, mask in zip(own, m, strict=True)))


def test_ties_elects_among_what_the_masks_leave() -> None:
    weights = [0.2, 0.5, 0.3]
    own, made = parts(weights), rule("dare_ties", density=0.6, seed=3, scale=0.5)
    Ds = [mask * dense(p) / 0.6 for p, mask in zip(own, masks(made, own, 0.6), strict=True)]
    close(merged(made, own), 0.5 * elect(Ds, weights))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_peft_computes_its_variant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [0.7, -0.3, 2.0]
    own, made = parts(weights), rule(name, density=0.4, variant="peft")
    drawn = [torch.from_numpy(m) for m in masks(made, own, 0.4)]
    monkeypatch.setattr(torch, "bernoulli", lambda chances: drawn.pop(0))
    theirs = getattr(merge_utils, name)(
        [torch.from_numpy(dense(p)) for p in own], torch.tensor(weights, dtype=torch.float64), 0.4
    )
    close(merged(made, own), theirs.numpy())
    assert not drawn


def test_masks_are_as_dense_as_asked_and_independent() -> None:
    made = rule("dare_linear", density=0.3)
    a, b = parts([1.0, 1.0], shape=(200, 300))
    place = Place("site", (200, 300))
    u, v = made.uniform(a, place), made.uniform(b, place)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(float((u < 0.3).double().mean()) - 0.3) < 0.01  # six standard deviations are 0.011
    both = float(((u < 0.3) & (v < 0.3)).double().mean())
    assert abs(both - 0.09) < 0.008
    assert torch.equal(u, made.uniform(a, place))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"site": "another"},
        {"key": "another"},
        {"rule": "dare_ties"},
    ],
    ids=str,
)
def test_masks_depend_on(other: dict[str, Any]) -> None:
    def drawn(seed: int = 0, site: str = "site", key: str = "key", name: str = "dare_linear") -> Tensor:
        part = parts([1.0])[0]._replace(key=key)
        return rule(name, seed=seed).uniform(part, Place(site, (13, 9)))

    given = {"name" if k == "rule" else k: v for k, v in other.items()}
    assert not torch.equal(drawn(), drawn(**given))


def test_the_numbers_are_the_same_for_ever() -> None:
    from adapterhub_lite.seed import uniform

    found = uniform((2, 3), "rule", "dare_linear", 1, 0, "site", "key")
    assert found.dtype == torch.float32
    assert [round(float(x), 6) for x in found.flatten()] == [
        0.42233,
        0.651281,
        0.637067,
        0.313799,
        0.661499,
        0.102836,
    ]  # Philox is the same in every numpy
