"""Rules `slerp`, `karcher` and `model_stock` against their formulas on flattened matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from deltas import Matrix, close, dense, merged, parts

from adapterhub_lite import LowRank, NotMergeable, Rule
from adapterhub_lite.algebra import nothing
from adapterhub_lite.registry import registry


def rule(name: str, **options: Any) -> Rule:
    return registry().rule(name)(**options)


def cosine(a: Matrix, b: Matrix) -> float:
    return float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.3], [2.0, 6.0], [1.0, 0.0]])
def test_slerp(weights: list[float]) -> None:
    own = parts(weights)
    a, b = map(dense, own)
    theta, t = np.arccos(cosine(a, b)), weights[1] / sum(weights)
    close(
        merged(rule("slerp"), own), np.sin((1 - t) * theta) / np.sin(theta) * a + np.sin(t * theta) / np.sin(theta) * b
    )


def test_slerp_of_nearly_equal_changes_is_a_line_and_of_opposite_ones_refused() -> None:
    a, _ = parts([0.5, 0.5])
    close(merged(rule("slerp"), [a, a._replace(number=1)]), dense(a))
    with pytest.raises(NotMergeable, match="opposite directions"):
        merged(rule("slerp"), [a, a._replace(delta=a.delta.scaled(-1.0))])
    left_alone = a._replace(delta=nothing((13, 9)), weight=1.5)
    close(merged(rule("slerp"), [a, left_alone]), 0.25 * dense(a))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.6, 0.1, 0.3], [1.0, 0.0, 1.0]])
def test_in_the_karcher_mean_the_logarithms_cancel(weights: list[float]) -> None:
    own = parts(weights)
    alpha = np.array(weights) / sum(weights)
    units = [dense(p) / np.linalg.norm(dense(p)) for p in own]
    found = merged(rule("karcher"), own)
    assert np.linalg.norm(found) == pytest.approx(
        sum(x * np.linalg.norm(dense(p)) for x, p in zip(alpha, own, strict=True))
    )
    m = found / np.linalg.norm(found)
    tangent = np.zeros_like(m)
    for x, u in zip(alpha, units, strict=True):
        dot = np.vdot(m, u)
        theta = np.arccos(np.clip(dot, -1, 1))
        tangent += x * theta / np.sin(theta) * (u - dot * m)
    assert np.linalg.norm(tangent) < 1e-10


def test_karcher_without_steps_is_the_normalised_mean() -> None:
    own = parts([0.6, 0.1, 0.3])
    mean = sum(p.weight * dense(p) / np.linalg.norm(dense(p)) for p in own)
    scale = sum(p.weight * np.linalg.norm(dense(p)) for p in own)
    close(merged(rule("karcher", iterations=0), own), scale * mean / np.linalg.norm(mean))


def test_karcher_refuses_directions_that_cancel() -> None:
    (a,) = parts([1.0])
    with pytest.raises(NotMergeable, match="have no mean"):
        merged(rule("karcher"), [a, a._replace(delta=a.delta.scaled(-2.0))])
    zero = a._replace(delta=nothing((13, 9)))
    assert not merged(rule("karcher"), [zero, zero]).any()


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock(count: int) -> None:
    own = parts([1.0] * count)
    Ds = [dense(p) for p in own]
    pairs = [cosine(Ds[i], Ds[j]) for i in range(count) for j in range(i)]
    c = sum(pairs) / len(pairs)
    t = count * c / (1 + (count - 1) * c)
    close(merged(rule("model_stock"), own), t * sum(Ds) / count)


def test_model_stock_of_opposites_is_the_base() -> None:
    (a,) = parts([1.0])
    assert not merged(rule("model_stock"), [a, a._replace(delta=a.delta.scaled(-1.0))]).any()
    close(merged(rule("model_stock"), [a]), dense(a))
    with_none = merged(rule("model_stock"), [a, a._replace(delta=nothing((13, 9)))])
    assert not with_none.any()  # the cosine with nothing is 0


def test_factors_that_cancel_have_no_direction() -> None:
    a, b = parts([0.5, 0.5])
    B, A = torch.cat([a.delta.B, -a.delta.B], 1), torch.cat([a.delta.A, a.delta.A], 0)  # type: ignore[union-attr]
    nothing_left = a._replace(delta=LowRank(B, A))
    close(merged(rule("karcher"), [nothing_left, b]), 0.5 * dense(b))
    close(merged(rule("slerp"), [nothing_left, b]), 0.5 * dense(b))


def test_angles_come_from_factors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = parts([0.5, 0.5], shape=(40, 30))
    monkeypatch.setattr(type(own[0].delta), "dense", None)
    for name in ("slerp", "karcher", "model_stock"):
        from adapterhub_lite import Place

        delta = rule(name).merge(own, Place("site", (40, 30)), {})
        assert torch.isfinite(delta.A).all()  # type: ignore[union-attr]
