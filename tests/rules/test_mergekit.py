"""Rules as mergekit computes them; `tests/golden/make_mergekit.py` wrote the file that they are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deltas import close, merged
from safetensors import safe_open
from torch import Tensor

from adapterhub_lite import Dense, Part, Place, Rule
from adapterhub_lite.registry import registry

GOLDEN = Path(__file__).parents[1] / "golden/mergekit/golden.safetensors"

# Name of the case: our rule and its options.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "ties": ("ties", {"density": 0.3, "variant": "mergekit"}),
    "ties-scaled": ("ties", {"density": 0.7, "scale": 1.5, "variant": "mergekit"}),
    "ties-one-entry": ("ties", {"density": 0.001, "variant": "mergekit"}),
    "dare_linear": ("dare_linear", {"density": 0.4, "variant": "mergekit"}),
    "dare_ties": ("dare_ties", {"density": 0.4, "scale": 0.5, "variant": "mergekit"}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    "sce": ("sce", {}),
    "sce-selected": ("sce", {"select": 0.4}),
    "model_stock": ("model_stock", {}),
    "karcher": ("karcher", {}),
    "multislerp": ("karcher", {"iterations": 0}),
}
# mergekit masks in float32, and adds 1e-8 to the norms of multislerp.
BOUND = {"dare_linear": 1e-6, "dare_ties": 1e-6, "multislerp": 1e-7}


def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["cases"])  # noqa: SIM118


def test_every_case_is_compared() -> None:
    assert golden()[1].keys() == OURS.keys()


@pytest.mark.parametrize("case", OURS)
def test_mergekit_computes_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, cases = golden()
    count = cases[case]["count"]
    weights = cases[case]["parameters"].get("weight", 1.0)
    weights = weights if isinstance(weights, list) else [weights] * count
    own = [Part(Dense(stored[f"change.{i}"]), weights[i], i, str(i)) for i in range(count)]

    def drawn(self: Rule, part: Part, place: Place, chance: float) -> Tensor:
        return stored[f"mask.{part.number}"] == 1

    monkeypatch.setattr(Rule, "drawn", drawn)
    name, options = OURS[case]
    close(merged(registry().rule(name)(**options), own), stored[f"result.{case}"].numpy(), BOUND.get(case, 1e-10))
