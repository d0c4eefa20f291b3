"""Bottlenecks against AdapterHub's `adapters`, whose outputs `tests/golden/make_bottleneck.py` stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers  # noqa: F401  # before transformers: no access to the Hub
import pytest
import torch
from adapterhub_lite_plugins.methods.bottleneck import Bottleneck
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, T5Config, T5EncoderModel

import adapterhub_lite as ah

GOLDEN = Path(__file__).parents[1] / "golden/bottleneck"
BUILD: dict[str, Any] = {
    "bert": lambda config: BertModel(BertConfig(**config), add_pooling_layer=False),
    "gpt2": lambda config: GPT2Model(GPT2Config(**config)),
    "t5": lambda config: T5EncoderModel(T5Config(**config)),
}


def base(case: str) -> tuple[Any, dict[str, Tensor]]:
    """The model that the case was made with, and the tensors that were stored."""
    golden = load_file(GOLDEN / case / "golden.safetensors")
    config = json.loads((GOLDEN / case / "model_config.json").read_text())
    with torch.random.fork_rng(devices=[]):
        model = BUILD[case.partition("-")[0]](config).eval()
    weights = {key.removeprefix("model."): t for key, t in golden.items() if key.startswith("model.")}
    model.load_state_dict(weights, strict="t5" not in case)  # T5's embeddings have two names
    close(output(model, golden), golden["plain"])
    return model, golden


def output(model: Any, golden: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(golden["ids"]).last_hidden_state
        return y


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# What in AdapterHub's names stands for our site, for each case: where its adapter hangs, and our target.
PLACES = {
    "bert-seq_bn": (Bottleneck.pfeiffer(reduction_factor=4), {"output": "output.LayerNorm"}),
    "bert-double_seq_bn": (
        Bottleneck(reduction_factor=4, non_linearity="swish"),
        {"attention.output": "attention.output.dense", "output": "output.dense"},
    ),
    "bert-seq_bn-norms": (
        Bottleneck.pfeiffer(reduction_factor=3, ln_before=True, ln_after=True, scaling="learned"),
        {"output": "output.LayerNorm"},
    ),
    "gpt2-seq_bn": (Bottleneck(reduction_factor=4, non_linearity="gelu"), {"output_adapters": "mlp"}),
    "t5-par_bn": (Bottleneck.parallel(reduction_factor=4, bottleneck_size=None), {"layer.1": "layer.1"}),
}


@pytest.mark.parametrize("case", PLACES)
def test_outputs_are_those_of_adapterhub(case: str) -> None:
    model, golden = base(case)
    method, places = PLACES[case]
    theirs = load_file(GOLDEN / case / "adapter.safetensors")
    down = "adapter_down.1" if method.ln_before else "adapter_down.0"
    names = {
        "down": f"{down}.weight", "down_bias": f"{down}.bias", "up": "adapter_up.weight", "up_bias": "adapter_up.bias",
        "scale": "scaling",
        **{f"norm_{end}": f"adapter_norm_{end}.weight" for end in ("before", "after")},
        **{f"norm_{end}_bias": f"adapter_norm_{end}.bias" for end in ("before", "after")},
    }  # fmt: skip
    layers = {"bert": "encoder.layer", "gpt2": "h", "t5": "encoder.block"}[case.partition("-")[0]]
    sites = {f"{layers}.{i}.{ours}": f"{layers}.{i}.{own}" for i in range(2) for own, ours in places.items()}
    ah.adapt(model).add("a", method, list(sites))
    used = set()
    for site, own in sites.items():
        for name, p in model.get_submodule(f"{site}.adapters.a").named_parameters():
            key = f"{own}.adapters.a.{names[name]}"
            used.add(key)
            assert p.shape == theirs[key].shape
            p.data = theirs[key]
    aliases = {key for key in theirs if method.ln_before and ".adapter_down.0." in key}  # of adapter_norm_before
    assert used == theirs.keys() - aliases
    assert (golden["output"] - golden["plain"]).abs().max() > 0.1
    close(output(model, golden), golden["output"])
