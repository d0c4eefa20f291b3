"""Rules `tsv`, `iso_c`, `iso_cts`, `knots` and `core_space` against the same formulas on whole matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from deltas import RANKS, Matrix, close, dense, elect, largest, merged, parts, run

from adapterhub_lite import Dense, Part, Place, Rule
from adapterhub_lite.registry import registry

SHAPES = [(13, 11), (10, 30), (7, 4)]  # of the last, the ranks add up to more than there is


def rule(name: str, **options: Any) -> Rule:
    return registry().rule(name)(**options)


def svd(M: Matrix, rank: int | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """The SVD of a matrix without its zeros, by default."""
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    r = int((1e-9 * S[0] < S).sum()) if rank is None else rank
    return U[:, :r], S[:r], Vh[:r]


def nearest(M: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns, on the directions that M has."""
    U, _, Vh = svd(M)
    found: Matrix = U @ Vh
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top", [0, 1])
def test_tsv(shape: tuple[int, int], top: int) -> None:
    own = parts([1.0, 0.5, -2.0], shape=shape)
    found = [svd(p.weight * dense(p)) for p in own]
    end = top or None
    U = np.concatenate([u[:, :end] for u, _, _ in found], 1)
    V = np.concatenate([v[:end] for _, _, v in found], 0).T
    S = np.concatenate([s[:end] for _, s, _ in found])
    close(merged(rule("tsv", top=top), own), nearest(U) @ np.diag(S) @ nearest(V).T)


def test_tsv_of_orthogonal_adapters_is_their_sum() -> None:
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(13, 6)))
    P, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 6)))
    pair = [Q[:, i : i + 3] @ np.diag([3.0, 2.0, 1.0]) @ P[:, i : i + 3].T for i in (0, 3)]
    own = [Part(Dense(torch.from_numpy(D)), 1.0, i, str(i)) for i, D in enumerate(pair)]
    close(merged(rule("tsv"), own), pair[0] + pair[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("over", ["rank", "all"])
def test_iso_c(shape: tuple[int, int], over: str) -> None:
    own = parts([1.0, 0.5, -2.0], shape=shape)
    U, S, Vh = svd(sum(p.weight * dense(p) for p in own))
    mean = S.sum() / (len(S) if over == "rank" else min(shape))
    close(merged(rule("iso_c", over=over, scale=1.5), own), 1.5 * mean * U @ Vh)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("common", [0.3, 0.8, 1.0])
def test_iso_cts(shape: tuple[int, int], common: float) -> None:
    own = parts([1.0, 0.5, -2.0], shape=shape)
    Ds = [p.weight * dense(p) for p in own]
    R = min(sum(RANKS), *shape)
    outside = round((R - int(R * common)) / 3)
    k = R - 3 * outside
    u, s, v = svd(sum(Ds))
    U, S, V = [u[:, :k]], [s[:k]], [v[:k]]
    for D in Ds:
        a, b, c = svd(D - u[:, :k] @ u[:, :k].T @ D) if k < shape[0] else (u[:, :0], s[:0], v[:0])
        U.append(a[:, :outside])
        S.append(b[:outside])
        V.append(c[:outside])
    mean = np.concatenate(S).sum() / R
    expected = mean * nearest(np.concatenate(U, 1)) @ nearest(np.concatenate(V, 0).T).T
    close(merged(rule("iso_cts", common=common), own), expected)


def aligned(own: list[Part]) -> tuple[Matrix, list[Matrix]]:
    """The basis and Σ Vᵢᵀ of KnOTS, from whole matrices."""
    U, S, Vh = svd(np.concatenate([dense(p) for p in own], 1))
    return U, [np.diag(S) @ V for V in np.split(Vh, len(own), 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots(shape: tuple[int, int], density: float) -> None:
    weights = [0.2, 0.5, 0.3]
    own = parts(weights, shape=shape)
    U, Vs = aligned(own)
    expected = 2.0 * U @ elect([largest(V, int(density * V.size)) for V in Vs], weights)
    close(merged(rule("knots", density=density, scope="site", scale=2.0), own), expected)


def test_knots_over_the_whole_model() -> None:
    weights, density = [0.5, 0.25, 0.25], 0.2
    sites = {name: parts(weights, site=name, shape=shape) for name, shape in zip("abc", SHAPES, strict=True)}
    found = run(rule("knots", density=density), sites)
    bases = {name: aligned(own) for name, own in sites.items()}
    whole = [np.concatenate([Vs[i].ravel() for _, Vs in bases.values()]) for i in range(3)]
    kept = [largest(own, int(density * len(own))) for own in whole]
    at = 0
    for name, (U, Vs) in bases.items():
        n = Vs[0].size
        close(found[name], U @ elect([k[at : at + n].reshape(Vs[0].shape) for k in kept], weights))
        at += n


def core(own: list[Part]) -> tuple[Matrix, Matrix, list[Matrix]]:
    factors = [(p.delta.scale * p.delta.B.numpy(), p.delta.A.numpy()) for p in own]  # type: ignore[union-attr]
    U = svd(np.concatenate([B for B, _ in factors], 1))[0]
    V = svd(np.concatenate([A for _, A in factors], 0))[2].T
    return U, V, [U.T @ B @ A @ V for B, A in factors]


@pytest.mark.parametrize("shape", SHAPES)
def test_core_space_with_ties(shape: tuple[int, int]) -> None:
    weights = [0.2, 0.5, 0.3]
    own = parts(weights, shape=shape)
    U, V, M = core(own)
    expected = U @ elect([largest(m, int(0.4 * m.size)) for m in M], weights) @ V.T
    close(merged(rule("core_space", density=0.4), own), expected)


def test_core_space_with_dare() -> None:
    weights = [0.2, 0.5, 0.3]
    own, made = parts(weights), rule("core_space", inside="dare_ties", density=0.4, scale=2.0)
    U, V, M = core(own)
    # Signs of singular vectors are arbitrary, and masks do not mind; but the rule's own have to be known for them.
    place = Place("site", M[0].shape)  # type: ignore[arg-type]
    masks = [made.uniform(p, place).numpy() < 0.4 for p in own]
    expected = 2.0 * U @ elect([m * mask / 0.4 for m, mask in zip(M, masks, strict=True)], weights) @ V.T
    close(merged(made, own), expected)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "knots", "core_space"])
def test_results_are_factors_of_the_rank_that_was_said(name: str) -> None:
    made, own = rule(name), parts([0.5, 0.5], shape=(40, 30))
    place = Place("site", (40, 30))
    facts: Any = {}
    for _ in range(made.passes):
        facts = made.conclude({"site": made.observe(own, place, facts)}, facts)
    delta = made.merge(own, place, facts)
    assert delta.rank <= made.rank([3, 2], (40, 30)) == 5  # type: ignore[union-attr]
