"""`robust_merge` against what its authors' code does, entry by entry; and adapters that it does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from deltas import Matrix, close, merged

import adapterhub_lite as ah
from adapterhub_lite import LowRank, NotMergeable, Part
from adapterhub_lite.registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Done, Handmade

    Command = Callable[..., Done]


def pruned(X: Matrix, density: float) -> Matrix:
    sizes = sorted(abs(x) for x in X.flatten())
    least = sizes[max(int(X.size * (1 - density)), 1) - 1]  # kthvalue counts from 1
    return np.array([[x if abs(x) >= least else 0.0 for x in row] for row in X])


def expected(As: list[Matrix], Bs: list[Matrix], density: float, floor: float, factor: float) -> Matrix:
    r = len(As[0])
    A, B, total = np.zeros(As[0].shape), np.zeros(Bs[0].shape), np.zeros(r)
    for A_i, B_i in zip(As, Bs, strict=True):
        kept = pruned(A_i, density)
        s = [abs(A_i[k]).sum() / abs(kept[k]).sum() if kept[k].any() else -1.0 for k in range(r)]
        s = [max(s) if x < 0 else x for x in s]
        least = sorted(s)[int(r * floor)]
        s = [max(x, least) for x in s]
        A += factor * kept
        B += factor * pruned(B_i, density) * np.array(s)
        total += s
    matrix: Matrix = (B / total) @ A
    return matrix


@pytest.mark.parametrize("shape", [(13, 9), (6, 40)])
@pytest.mark.parametrize("options", [(0.2, 0.8, 2.0), (0.5, 0.3, 1.0), (1.0, 0.0, 2.0), (0.02, 0.5, 2.0)])
def test_the_formula(shape: tuple[int, int], options: tuple[float, float, float]) -> None:
    rng = torch.Generator().manual_seed(3)
    deltas = []
    for i in range(3):
        B, A = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((shape[0], 5), (5, shape[1])))
        deltas.append(LowRank(B, A, 0.5 + i))
    own = [Part(delta, 1 / 3, i, str(i)) for i, delta in enumerate(deltas)]
    As = [delta.A.numpy() for delta in deltas]
    Bs = [delta.scale * delta.B.numpy() for delta in deltas]
    rule = registry().rule("robust_merge")(**dict(zip(("density", "floor", "factor"), options, strict=True)))
    close(merged(rule, own), expected(As, Bs, *options))


def test_an_adapter_that_is_zero() -> None:
    own = [Part(LowRank(torch.zeros(7, 2), torch.zeros(2, 4)), 0.5, i, str(i)) for i in range(2)]
    assert not merged(registry().rule("robust_merge")(), own).any()


def piece(adapter: ah.Adapter, site: str) -> Any:
    ((_, source),) = adapter.terms
    return source.piece(site)


def test_files(handmade: Handmade, adapter: Command, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        handmade(tmp_path / name, {"net.layers.0.q": 3, "net.layers.0.k": 2}, seed=seed)
    refs = [tmp_path / name for name in "ab"]
    done = adapter("merge", *refs, "--rule", "robust_merge", "--density", "0.5", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done
    assert {name: own["rank"] for name, own in done.json["modules"].items()} == {
        "net.layers.0.q": 3,
        "net.layers.0.k": 2,
    }
    got = ah.load(tmp_path / "out")
    for site in ("net.layers.0.q", "net.layers.0.k"):
        lows = [piece(ah.load(ref), site).delta for ref in refs]
        As, Bs = [d.A.double().numpy() for d in lows], [d.scale * d.B.double().numpy() for d in lows]
        close(piece(got, site).delta.dense().double().numpy(), expected(As, Bs, 0.5, 0.8, 2.0), 1e-6)


@pytest.mark.parametrize("other", [{"net.layers.0.q": 2}, {"net.layers.0.q": 3, "net.layers.0.k": 3}])
def test_other_ranks_and_layers_are_refused(
    handmade: Handmade, adapter: Command, tmp_path: Path, other: dict[str, int]
) -> None:
    handmade(tmp_path / "a", {"net.layers.0.q": 3})
    handmade(tmp_path / "b", other)
    for more in (["-o", tmp_path / "out"], ["--dry-run"], ["-o", tmp_path / "out", "--rank", "2"]):
        done = adapter("merge", tmp_path / "a", tmp_path / "b", "--rule", "robust_merge", *more)
        done.refused("one rank", "adapter resize")
    assert not (tmp_path / "out").exists()
    a, b = ah.load(tmp_path / "a"), ah.load(tmp_path / "b")
    with pytest.raises(NotMergeable, match="one rank"):
        ah.merge([a, b], "robust_merge").save(tmp_path / "out")
