"""Rules `svc`, `pico` and `ctm` against the same formulas on whole matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from deltas import Matrix, close, dense, elect, largest, merged, parts

from adapterhub_lite import Dense, LowRank, Part, Place, Rule
from adapterhub_lite.registry import registry

SHAPES = [(13, 11), (10, 30), (7, 4)]  # of the last, the ranks add up to more than there is


def rule(name: str, **options: Any) -> Rule:
    return registry().rule(name)(**options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.0, 0.4), (0.2, 2.0)])
def test_svc(shape: tuple[int, int], alpha: float | None, scale: float) -> None:
    own = parts([0.25, 0.5, 0.25], shape=shape)
    Ds = [dense(p) for p in own]
    U, S, Vh = np.linalg.svd(scale * 3 * sum(p.weight * D for p, D in zip(own, Ds, strict=True)))
    expected = np.zeros(shape)
    for r in range(int((1e-9 * S[0] < S).sum())):
        a = S[r] * Vh[r]
        s = [a @ (U[:, r] @ D) / np.square(U[:, r] @ D).sum() for D in Ds]
        gamma = 3 / sum(max(1 / 3 if alpha is None else alpha, one) for one in s)
        expected += gamma * S[r] * np.outer(U[:, r], Vh[r])
    close(merged(rule("svc", alpha=alpha, scale=scale), own), expected)


def test_svc_of_adapters_with_nothing_in_common_is_their_sum() -> None:
    Q, P = np.linalg.qr(np.arange(36.0).reshape(6, 6) % 7 + np.eye(6))[0], np.eye(6)
    pair = [Q[:, i : i + 2] @ np.diag([3.0 + i, 2.0]) @ P[:, i : i + 2].T for i in (0, 3)]
    own = [Part(Dense(torch.from_numpy(D)), 0.5, i, str(i)) for i, D in enumerate(pair)]
    close(merged(rule("svc", alpha=1.0), own), pair[0] + pair[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 0.5, 0.3]])
def test_pico(shape: tuple[int, int], weights: list[float]) -> None:
    own = parts(weights, shape=shape)
    U, S, _ = np.linalg.svd(np.concatenate([p.delta.scale * p.delta.B.numpy() for p in own], 1), full_matrices=False)  # type: ignore[union-attr]
    alpha = 1 / (1 + 2 * S**2 / (S**2).sum())
    calibrate = np.eye(shape[0]) + U @ np.diag(alpha - 1) @ U.T
    share = np.array(weights) / sum(weights)
    summed = sum(x * calibrate @ dense(p) for x, p in zip(share, own, strict=True))
    size = sum(x * np.linalg.norm(dense(p)) for x, p in zip(share, own, strict=True))
    close(merged(rule("pico"), own), summed * size / np.linalg.norm(summed))


def tucker(Ds: list[Matrix], rank: int) -> tuple[Matrix, Matrix]:
    """The bases in which matrices lose least together, by 500 turns from those that are best by themselves."""

    def left(M: Matrix) -> Matrix:
        found: Matrix = np.linalg.svd(M, full_matrices=False)[0][:, :rank]
        return found

    V = left(np.concatenate([D.T for D in Ds], 1))
    for _ in range(500):
        U = left(np.concatenate([D @ V for D in Ds], 1))
        V = left(np.concatenate([D.T @ U for D in Ds], 1))
    return U, V


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("beta", "density"), [(0.0, 1.0), (0.7, 0.5)])
def test_ctm(shape: tuple[int, int], beta: float, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made, weights = rule("ctm", beta=beta, density=density, dimensions=3, scale=2.0), [0.2, 0.5, 0.3]
    monkeypatch.setattr(f"{type(made).__module__}._TOLERANCE", -1.0)  # the authors stop early, and the test does not
    monkeypatch.setattr(f"{type(made).__module__}._STEPS", 500)
    own = parts(weights, shape=shape)
    Ds = [dense(p) for p in own]
    norms = [float(np.linalg.norm(D)) for D in Ds]
    U, V = tucker([D * (beta + (1 - beta) * np.mean(norms) / n) for D, n in zip(Ds, norms, strict=True)], 3)
    small = [U.T @ D @ V for D in Ds]
    expected = 2.0 * U @ elect([largest(M, int(density * M.size)) for M in small], weights) @ V.T
    close(merged(made, own), expected, 1e-8)


def test_ctm_draws_masks_for_the_small_matrices() -> None:
    made, own = rule("ctm", inside="dare_ties", density=0.4, dimensions=3), parts([0.2, 0.5, 0.3])
    whole = merged(rule("ctm", density=1.0, dimensions=3), own)
    some = merged(made, own)
    assert np.linalg.matrix_rank(whole) == 3
    assert np.linalg.norm(some - whole) > 0.1 * np.linalg.norm(whole)
    close(whole @ np.linalg.pinv(whole) @ some, some)  # in the same bases


@pytest.mark.parametrize(("name", "rank"), [("svc", 5), ("pico", 5), ("ctm", 3)])
def test_results_are_factors_of_the_rank_that_was_said(name: str, rank: int) -> None:
    made, own = rule(name), parts([0.5, 0.5], shape=(40, 30))
    delta = made.merge(own, Place("site", (40, 30)), {})
    assert isinstance(delta, LowRank)
    assert delta.rank <= made.rank([3, 2], (40, 30)) == rank
