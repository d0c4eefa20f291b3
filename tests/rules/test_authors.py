"""Rules as the code of their authors computes them; `tests/golden/make_authors.py` wrote the file to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deltas import close, merged
from safetensors import safe_open

from adapterhub_lite import LowRank, Part
from adapterhub_lite.registry import registry

GOLDEN = Path(__file__).parents[1] / "golden/authors/golden.safetensors"

# Name of the case: the options of our rule.
OURS: dict[str, dict[str, Any]] = {
    "pico": {},
    "svc": {},
    "svc-suppressive": {"alpha": 1.0, "scale": 0.3},
    "ctm": {"density": 1.0},
    "ctm-larger": {"dimensions": 6, "beta": 0.25, "density": 10 / 36},  # theirs keeps one more than a quarter of 36
}
BOUND = {"pico": 1e-6, "svc": 1e-6, "svc-suppressive": 1e-6}  # theirs have float32 inside


@pytest.mark.parametrize("case", OURS)
def test_the_authors_compute_the_same(case: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert cases.keys() == OURS.keys()
    own = [Part(LowRank(stored[f"B.{i}"], stored[f"A.{i}"]), 1 / 3, i, str(i)) for i in range(3)]
    rule = registry().rule(cases[case]["rule"])(**OURS[case])
    close(merged(rule, own), stored[f"result.{case}"].numpy(), BOUND.get(case, 1e-8))
