"""`adapter convert --to vllm`: a reader who knows r and lora_alpha alone gets the same ΔW, and so does PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import BERT, CONV, LLAMA, Peer, load_peft, output
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterhub_lite as ah

CASES: dict[str, tuple[Peer, str, dict[str, Any]]] = {
    "plain": (LLAMA, "lora", {"rank": 4, "alpha": 6}),
    "rslora": (LLAMA, "lora", {"rank": 3, "alpha": 5, "rslora": True}),
    "patterns": (
        LLAMA,
        "lora",
        {"rank": 4, "alpha": 6, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"up_proj": 0.3}},
    ),
    "vera": (LLAMA, "vera", {"rank": 5}),
    "pissa": (LLAMA, "lora", {"rank": 2, "alpha": 3, "init_weights": "pissa"}),
    "more than the layer": (LLAMA, "lora", {"rank": 40, "alpha": 7}),
    "bert": (BERT, "lora_fa", {"rank": 3}),
}


def saved(out: Path, peer: Peer, method: str, options: dict[str, Any]) -> Path:
    model: nn.Module = peer.build()  # type: ignore[operator]
    adapters = ah.adapt(model)
    adapters.add("a", ah.method(method, **options), peer.targets)
    rng = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        if "adapters" in key.split(".") and p.is_floating_point():
            p.data += 0.2 * torch.randn(p.shape, generator=rng)
    adapters.save("a", out)
    return out


def read_as_vllm(folder: Path) -> dict[str, Tensor]:
    """ΔW by module: s B A with s from two entries of the config, and nothing else looked at."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            assert len(A) == config["r"]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = tensors[key.replace("lora_A", "lora_B")]
            found[module] = scale * (B.double() @ A.double())
    assert len(tensors) == 2 * len(found)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_change_is_the_same_for_every_reader(
    case: tuple[Peer, str, dict[str, Any]], tmp_path: Path, adapter: Any
) -> None:
    peer, method, options = case
    folder, out = saved(tmp_path / "in", peer, method, options), tmp_path / "out"
    done = adapter("convert", folder, "-o", out, "--to", "vllm", "--json")
    assert done.code == 0, done.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", done.json["rank"])
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["bias"] == "none"
    assert not config.get("modules_to_save")
    assert done.json["max_lora_rank"] == min(n for n in (8, 16, 32, 64) if n >= config["r"])
    want = ah.load(folder)
    got = read_as_vllm(out)
    assert got.keys() == want.sites.keys()
    for module, W in got.items():
        torch.testing.assert_close(W, want.delta(module).dense().double(), rtol=1e-5, atol=1e-6)
    model: nn.Module = peer.build()  # type: ignore[operator]
    ah.adapt(model).load(folder, "a")
    torch.testing.assert_close(output(load_peft(out, peer), peer), output(model, peer), rtol=1e-4, atol=1e-5)
    assert adapter("convert", out, "-o", tmp_path / "again", "--to", "vllm").out.endswith(
        f"--max-lora-rank {done.json['max_lora_rank']}\n"
    )
    assert "made by" in adapter("info", out).out
    assert "an adapter" not in adapter("info", out).out


def test_what_vllm_does_not_serve_is_refused_by_name(tmp_path: Path, adapter: Any) -> None:
    def refused(case: tuple[Peer, str, dict[str, Any]], *said: str, more: tuple[str, ...] = ()) -> None:
        folder = tmp_path / f"{case[1]}{len(list(tmp_path.iterdir()))}"
        saved(folder, *case)
        adapter("convert", folder, "-o", tmp_path / "out", "--to", "vllm", *more).refused(*said)
        assert not (tmp_path / "out").exists()

    refused((LLAMA, "dora", {"rank": 2}), "a 'dora' adapter is no LoRA", "--into BASE")
    refused((LLAMA, "ia3", {}), "a 'ia3' adapter is no LoRA")
    refused((LLAMA, "lora", {"rank": 2, "lora_bias": True}), "changes a bias, and vLLM takes none", "down_proj")
    refused((CONV, "lora", {"rank": 2}), "no LoRA at a layer of kind 'conv")
    wide: tuple[Peer, str, dict[str, Any]] = (LLAMA, "lora", {"rank": 20})
    refused(wide, "rank 20 is above --max-lora-rank 16", "adapter resize --rank 16", more=("--max-lora-rank", "16"))
    folder = saved(tmp_path / "fine", *wide)
    assert adapter("convert", folder, "-o", tmp_path / "x", "--max-lora-rank", "32").code == 2
    assert adapter("convert", folder, "-o", tmp_path / "x", "--to", "vllm", "--max-lora-rank", "20").code == 2
    assert adapter("convert", folder, "-o", tmp_path / "x", "--to", "vllm", "--max-lora-rank", "32").code == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_trained_heads_are_refused(tmp_path: Path, adapter: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(LLAMA.build(), config).save_pretrained(tmp_path / "head")  # type: ignore[operator]
    adapter("convert", tmp_path / "head", "-o", tmp_path / "out", "--to", "vllm").refused(
        "takes no modules_to_save", "lm_head", "--into BASE"
    )
