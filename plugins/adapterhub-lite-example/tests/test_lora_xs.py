"""LoRA-XS keeps the promises that every adapter method makes, and is the paper's formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapterhub_lite_example import LoraXs
from torch import nn

from adapterhub_lite import ConfigError, Method, Params
from adapterhub_lite.registry import registry
from adapterhub_lite.testing import parametrize_checks


@parametrize_checks(LoraXs(), LoraXs(rank=3, sigma=0))
def test_conforms(method: Method, check: Callable[[Method], object]) -> None:
    check(method)


def test_the_delta_is_the_paper_s_formula() -> None:
    layer = nn.Linear(11, 7)
    site = registry().site_kinds()["linear"].of("layer", layer)
    start = LoraXs(rank=4).init(site, torch.Generator().manual_seed(0))
    assert [name for name, t in start.items() if isinstance(t, nn.Parameter)] == ["R"]
    R = torch.randn(4, 4)
    got = LoraXs(rank=4).delta(Params({**start, "R": R}), site).dense().double()

    # With the eigenvectors of W Wᵀ for U, and Σ Vᵀ = Uᵀ W: another way to the same matrix, up to signs in R.
    W = layer.weight.detach().double()
    squares, vectors = torch.linalg.eigh(W @ W.mT)
    U, S = vectors.flip(1)[:, :4], squares.flip(0)[:4].sqrt()
    V = (U.mT @ W) / S[:, None]
    signs = torch.diag((U.mT @ (start["B"].double() / S)).diagonal().sign())
    torch.testing.assert_close(got, (U * S) @ signs @ R.double() @ signs @ V, rtol=1e-4, atol=1e-5)


def test_a_rank_above_the_weight_s_is_refused() -> None:
    site = registry().site_kinds()["linear"].of("layer", nn.Linear(11, 7))
    with pytest.raises(ConfigError, match="rank 8 exceeds the weight's, 7"):
        LoraXs(rank=8).init(site, torch.Generator())
