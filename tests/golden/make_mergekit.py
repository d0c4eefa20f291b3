"""Write the golden file of mergekit's merges, in an environment of its own: `python make_mergekit.py`.

    pip install torch==2.13.0 mergekit==0.1.5

mergekit pins other versions than the tests use, so what it computes is stored: three changes of one weight (the base
is 0), the masks that its random rules are made to draw, and for each case the merged change, all in float64. The
parameters of the cases are in the header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import save_file

HERE = Path(__file__).parent / "mergekit"
SHAPE, COUNT, DENSITY = (7, 10), 3, 0.4

# Name: mergekit's method, how many of the changes, whether 0 is its base, its parameters.
CASES: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "ties": ("ties", 3, True, {"density": 0.3, "weight": [0.2, 0.5, 0.3]}),
    "ties-scaled": ("ties", 3, True, {"density": 0.7, "weight": 1.0, "lambda": 1.5}),
    "ties-one-entry": ("ties", 3, True, {"density": 0.001, "weight": 1.0}),
    "dare_linear": ("dare_linear", 3, True, {"density": DENSITY, "weight": [0.7, -0.3, 2.0]}),
    "dare_ties": ("dare_ties", 3, True, {"density": DENSITY, "weight": [0.7, -0.3, 2.0], "lambda": 0.5}),
    "breadcrumbs": ("breadcrumbs", 3, True, {"density": 0.5, "gamma": 0.1, "weight": [0.7, -0.3, 2.0]}),
    "sce": ("sce", 3, True, {}),
    "sce-selected": ("sce", 3, True, {"select_topk": 0.4}),
    "model_stock": ("model_stock", 3, True, {}),
    "karcher": ("karcher", 3, False, {"max_iter": 1000, "tol": 1e-12}),
    "multislerp": ("multislerp", 3, True, {"weight": [0.2, 0.5, 0.3]}),
}


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    changes = [torch.randn(SHAPE, generator=rng, dtype=torch.float64) * (1 + i) for i in range(COUNT)]
    masks = [(torch.rand(SHAPE, generator=rng) < DENSITY).double() for _ in range(COUNT)]
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    stored = {f"change.{i}": t for i, t in enumerate(changes)} | {f"mask.{i}": t for i, t in enumerate(masks)}
    for name, (method, count, based, parameters) in CASES.items():
        drawn = iter(masks)
        torch.bernoulli = lambda chances, drawn=drawn: next(drawn)  # type: ignore[assignment]
        given = {key: value[:count] if isinstance(value, list) else value for key, value in parameters.items()}
        inputs = [zero, *changes[:count]] if based else changes[:count]
        result = merge_tensors(inputs, method, parameters=given, base_index=0 if based else None)
        assert result.dtype == torch.float64
        assert result.abs().max() > 0
        stored[f"result.{name}"] = result
    HERE.mkdir(exist_ok=True)
    about = {name: {"method": m, "count": n, "parameters": p} for name, (m, n, _, p) in CASES.items()}
    save_file(stored, HERE / "golden.safetensors", {"cases": json.dumps(about), "mergekit": "0.1.5"})
    print(*sorted(stored), sep="\n")


if __name__ == "__main__":
    main()
