"""The leading singular vectors against the decomposition in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapterhub_lite import Dense, algebra, krylov


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()).Q


def matrix(spectrum: Tensor, m: int = 600, n: int = 520) -> Tensor:
    U, V = orthonormal(m, len(spectrum), 1), orthonormal(n, len(spectrum), 2)
    return (U * spectrum.double()) @ V.mT


SPECTRA = {
    "slow": 1 / (1 + torch.arange(520.0)).sqrt(),
    "flat tail": torch.cat([torch.linspace(3, 2, 24), torch.full((496,), 0.5)]),
    "equal around the cut": torch.cat([torch.full((20,), 2.0), torch.full((500,), 1.0)]),
    "low rank": torch.linspace(3, 2, 5),
    "tiny": 1e-30 * torch.linspace(3, 2, 100),
    "zero": torch.zeros(1),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("wide", [False, True])
def test_nothing_is_nearer(name: str, wide: bool) -> None:
    W = matrix(SPECTRA[name])
    W, rank = (W.mT.contiguous() if wide else W), 16
    found = krylov.leading(W, rank)
    assert found is not None
    U, S, Vh = found
    for Q in (U, Vh.mT):
        torch.testing.assert_close(Q.mT @ Q, torch.eye(rank).double(), rtol=0, atol=1e-12)
    exact = torch.linalg.svdvals(W)
    torch.testing.assert_close(S, exact[:rank], rtol=0, atol=1e-11 * float(exact[0]))
    best, error = float(exact[rank:].norm()), float((W - (U * S) @ Vh).norm())
    assert error <= best * (1 + 1e-11) + 1e-13 * float(exact[0])


def test_it_is_the_same_each_time_whatever_the_global_state() -> None:
    W = matrix(SPECTRA["slow"])
    one = krylov.leading(W, 4)
    torch.manual_seed(5)
    other = krylov.leading(W, 4)
    assert one is not None
    assert other is not None
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_truncation_uses_it_and_its_rest_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix(SPECTRA["slow"])
    expected, _ = algebra.truncate(Dense(W), 520 // 16 + 1)  # in full
    monkeypatch.setattr(algebra, "svd", None)
    kept, dropped = algebra.truncate(Dense(W), 8)
    torch.testing.assert_close(kept.dense() + dropped.dense(), W, rtol=0, atol=1e-14)
    torch.testing.assert_close(kept.dense(), expected.B[:, :8] @ expected.A[:8], rtol=0, atol=1e-8)


def test_what_does_not_converge_is_decomposed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix(SPECTRA["slow"])
    monkeypatch.setattr(krylov, "_STEPS", 2)
    assert krylov.leading(W, 8) is None
    kept, _ = algebra.truncate(Dense(W), 8)
    assert algebra.norm(kept) == pytest.approx(float(torch.linalg.svdvals(W)[:8].norm()))


def test_small_matrices_and_many_vectors_are_left_to_the_decomposition_in_full() -> None:
    assert krylov.pays(torch.Size((512, 600)), 32)
    assert not krylov.pays(torch.Size((512, 600)), 33)
    assert not krylov.pays(torch.Size((511, 600)), 1)
    assert not krylov.pays(torch.Size((4, 512, 600)), 1)
