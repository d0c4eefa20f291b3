"""How many parameters each method trains at a layer, by the formula that its documentation gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import adapterhub_lite as ah
from adapterhub_lite.site import Site
from adapterhub_lite.testing.zoo import EXAMPLES

RANK = 3
Count = Callable[[Site], int]


def low_rank(site: Site) -> int:
    """r (d + k), where k counts one group's channels and the kernel."""
    return RANK * sum(site.shape)


def scaled_inputs(site: Site) -> int:
    groups = getattr(site.module, "groups", 1)
    return groups * site.shape[1] // math.prod(site.kernel)


FORMULAS: list[tuple[str, dict[str, Any], Count]] = [
    ("lora", {"rank": RANK}, low_rank),
    ("lora", {"rank": RANK, "init_weights": "pissa"}, low_rank),
    ("lora_plus", {"rank": RANK}, low_rank),
    ("lora_fa", {"rank": RANK}, lambda site: RANK * site.shape[0]),
    ("delta_lora", {"rank": RANK}, low_rank),
    ("dora", {"rank": RANK}, lambda site: low_rank(site) + site.shape[0]),
    ("vera", {"rank": RANK}, lambda site: RANK + site.shape[0]),
    ("ia3", {}, lambda site: site.shape[0]),
    ("ia3", {"feedforward": ("first", "second", "third")}, scaled_inputs),
]


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS, ids=lambda v: v if isinstance(v, str) else "")
def test_as_many_are_trained_as_the_formula_says(name: str, options: dict[str, Any], formula: Count) -> None:
    method = ah.method(name, **options)
    for kind in method.site_kinds & EXAMPLES.keys():
        example = EXAMPLES[kind]
        model = example.model()
        adapters = ah.adapt(model)
        sites = example.sites(model)
        adapters.add("a", method, list(sites))
        counts = {
            layer: sum(p.numel() for p in site.module.parameters() if p.requires_grad)  # type: ignore[union-attr]
            for layer, site in sites.items()
        }
        assert counts == {layer: formula(site) for layer, site in sites.items()}, kind
        assert adapters.summary().trained == sum(counts.values())
        assert len(set(counts.values())) > 1 or kind == "embedding"  # the layers differ, so a constant would not do
