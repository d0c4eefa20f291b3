"""Targets with options of their own: which layer has which, in the model, in the file and for PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import Peer, load_peft
from toy import llama

import adapterhub_lite as ah
from adapterhub_lite import ConfigError
from adapterhub_lite.pattern import matches

TARGETS: Mapping[str, Mapping[str, Any]] = {
    "all-linear": {},
    "mlp.down_proj": {"rank": 3, "alpha": 5},
    "layers.1.*.q_proj": {"rank": 7},
    "layers.1.self_attn.v_proj": {"alpha": 1},
    "*.1.self_attn.v_proj": {"rank": 6},  # the same layer: both hold
    "gate_proj": {"rank": 1},
    "layers.0.mlp.gate_proj": {"rank": 2},  # of two that say otherwise the later one holds
}
WANT = {  # rank and scaling
    "layers.0.mlp.down_proj": (3, 5 / 3),
    "layers.1.mlp.down_proj": (3, 5 / 3),
    "layers.1.self_attn.q_proj": (7, 8 / 7),
    "layers.1.self_attn.v_proj": (6, 1 / 6),
    "layers.0.mlp.gate_proj": (2, 8 / 2),
    "layers.1.mlp.gate_proj": (1, 8 / 1),
}


def adapted() -> tuple[Any, ah.Adapters]:
    model = llama()
    adapters = ah.adapt(model)
    adapters.add("a", ah.LoRA(rank=4, alpha=8), TARGETS)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    return model, adapters


def test_each_layer_has_the_options_of_its_targets() -> None:
    model, _ = adapted()
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module, "adapters"):
            part: Any = module.adapters.a
            rank, scaling = WANT.get(name.removeprefix("model."), (4, 2))
            assert tuple(part.A.shape) == (rank, module.in_features), name
            assert part.method.scaling == pytest.approx(scaling), name
            seen.add(name.removeprefix("model."))
    assert len(seen) == 14
    assert WANT.keys() <= seen


def test_the_file_says_the_same_to_us_and_to_peft(tmp_path: Path) -> None:
    model, adapters = adapted()
    adapters.save("a", tmp_path / "a")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        theirs = load_peft(tmp_path / "a", Peer("llama", llama, [], dict))(input_ids=ids).logits
        other = llama()
        ah.adapt(other).load(tmp_path / "a", "b")
        ours = other(input_ids=ids).logits
    assert torch.equal(ours, want)
    assert (theirs - want).abs().max() < 1e-5
    assert (want - llama()(input_ids=ids).logits).abs().max() > 1e-2
    method = ah.load(tmp_path / "a").single.own.method  # type: ignore[union-attr]
    assert isinstance(method, ah.LoRA)
    assert method.rank_pattern["down_proj"] == 3  # one entry where all layers of that name agree
    for name in WANT:  # at most one pattern matches, so their order means nothing
        assert sum(matches(key, f"model.{name}") for key in method.rank_pattern) == 1


def test_options_of_the_method_hold_where_no_target_says_otherwise() -> None:
    model = llama()
    method = ah.LoRA(rank=4, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 5})
    ah.adapt(model).add("a", method, {"q_proj": {}, "up_proj": {"rank": 3}, "v_proj": {"alpha": 4}})
    ranks = {
        n: m.adapters.a.A.shape[0] for n, m in model.named_modules() if n.endswith("_proj") and "adapters" in dir(m)
    }
    assert {n.removeprefix("model.layers."): r for n, r in ranks.items()} == {
        "0.self_attn.q_proj": 2,
        "1.self_attn.q_proj": 2,
        "0.self_attn.v_proj": 4,
        "1.self_attn.v_proj": 4,
        "0.mlp.up_proj": 3,
        "1.mlp.up_proj": 3,
    }


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lora", {"rnak": 4}, "did you mean 'rank'"),
        ("lora", {"dropout": 0.1}, "no option 'dropout' that may differ from layer to layer"),
        ("lora", {"rank": 0}, "rank 0"),
        ("lora", {"rank": "4"}, "rank_pattern"),
        ("vera", {"rank": 4}, "give it to the method"),
        ("lora", 4, "give a mapping"),
    ],
)
def test_options_that_cannot_be_are_refused(method: str, options: Any, said: str) -> None:
    model = llama()
    adapters = ah.adapt(model)
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=said):
        adapters.add("a", ah.method(method), {"q_proj": options})
    assert adapters.names == ()
    assert list(model.state_dict()) == before
