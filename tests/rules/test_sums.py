"""Rules `sum`, `cat` and `mean` against the plain sum."""

from __future__ import annotations

import pytest
from deltas import close, dense, merged, parts

from adapterhub_lite.registry import registry


@pytest.mark.parametrize("name", ["sum", "cat"])
def test_a_sum(name: str) -> None:
    own = parts([0.7, -0.3, 2.0])
    close(merged(registry().rule(name)(), own), sum(p.weight * dense(p) for p in own))


def test_the_mean_knows_only_ratios() -> None:
    own = parts([1.0, 3.0, 4.0])
    close(merged(registry().rule("mean")(), own), sum(p.weight * dense(p) for p in own) / 8.0)
