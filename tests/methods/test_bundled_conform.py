"""The conformance suite on the bundled methods, with options that are not their defaults too."""

from __future__ import annotations

import adapterhub_lite as ah
from adapterhub_lite import Method
from adapterhub_lite.testing import Check, parametrize_checks

m = ah.method


@parametrize_checks(
    m("lora_plus", rank=4),
    m("lora_plus", rank=3, ratio=4.0, alpha=7, rank_pattern={"second": 2}),
    m("lora_fa", rank=4),
    m("lora_fa", rank=3, projection=False, rslora=True),
    m("lora_fa", rank=3, lora_bias=True),
    m("delta_lora", rank=4),
    m("delta_lora", rank=3, alpha=7, update_ratio=0.5, rslora=True),
    m("delta_lora", rank=4, alpha_pattern={"first": 3}, init_weights="orthogonal"),
    m("vera", rank=5),
    m("vera", rank=4, d_initial=0.7, save_projection=False, projection_prng_key=3),
    m("ia3"),
    m("ia3", feedforward=("second",)),
    m("ia3", feedforward=("first", "third")),
    m("bottleneck"),
    m("bottleneck", reduction_factor=4, non_linearity="swish", init_weights="normal", ln_before=True),
    m("bottleneck", bottleneck_size=7, placement="parallel", scaling=4.0, dropout=0.25),
    m("bottleneck", placement="parallel", reduction_factor=3, scaling="learned", ln_after=True, non_linearity="gelu"),
    m("bottleneck", reduction_factor=5, scaling="channel", init_weights="truncated_normal", std=0.1),
    m("bitfit"),
    m("ln_tuning"),
    m("prompt_tuning", num_virtual_tokens=3),
    m("prefix_tuning", num_virtual_tokens=3),
    m("prefix_tuning", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
)
def test_conforms(method: Method, check: Check) -> None:
    check(method)
