"""`adapter convert`: AdapterHub's folders compute here what its library `adapters` computed with them.

`tests/golden/make_adapterhub.py` wrote the folders, and the outputs beside them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers  # noqa: F401  # before transformers: no access to the Hub
import pytest
import torch
from adapterhub_lite_plugins.methods.bottleneck import Bottleneck
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

import adapterhub_lite as ah
from adapterhub_lite.source import stored

GOLDEN = Path(__file__).parent / "golden/adapterhub"
WEIGHTS, CONFIG, PICKLE = "adapter.safetensors", "adapter_config.json", "pytorch_adapter.bin"
BUILD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bert": lambda config: BertModel(BertConfig(**config), add_pooling_layer=False),
    "gpt2": lambda config: GPT2Model(GPT2Config(**config)),
    "llama": lambda config: LlamaModel(LlamaConfig(**config)),
    "t5": lambda config: T5EncoderModel(T5Config(**config)),
}
swish = Bottleneck(reduction_factor=4, non_linearity="swish", init_weights="normal")
relu = Bottleneck(reduction_factor=4, init_weights="normal")
# What they become, and the ends of the names of the modules that it is at.
CASES: dict[str, tuple[ah.Method, set[str]]] = {
    "bert-seq_bn": (Bottleneck.pfeiffer(reduction_factor=4), {"output.LayerNorm"}),
    "bert-double_seq_bn": (swish, {"attention.output.dense", "output.dense"}),
    "bert-seq_bn-norms": (
        Bottleneck.pfeiffer(reduction_factor=3, ln_before=True, ln_after=True, scaling="learned"),
        {"output.LayerNorm"},
    ),
    "bert-lora": (ah.method("lora", rank=3, alpha=5), {"query", "value", "intermediate.dense", "output.dense"}),
    "gpt2-seq_bn": (Bottleneck(reduction_factor=4, non_linearity="gelu", init_weights="normal"), {"mlp"}),
    "gpt2-seq_bn-layers": (relu, {"h.0", "h.1"}),
    "llama-double_seq_bn": (swish, {"self_attn", "mlp"}),
    "llama-seq_bn": (relu, {"layers.0", "layers.1"}),
    "t5-par_bn": (Bottleneck.parallel(bottleneck_size=None, reduction_factor=4), {"layer.1"}),
    "t5-seq_bn": (relu, {"layer.1"}),
    "t5-double_seq_bn": (swish, {"layer.0.SelfAttention", "layer.1.DenseReluDense"}),
}


def base(case: str) -> tuple[Any, dict[str, Tensor]]:
    """The model that the case was made with, and the tensors that were stored."""
    golden = load_file(GOLDEN / case / "golden.safetensors")
    config = json.loads((GOLDEN / case / "model_config.json").read_text())
    with torch.random.fork_rng(devices=[]):
        model = BUILD[case.partition("-")[0]](config).eval()
    weights = {key.removeprefix("model."): t for key, t in golden.items() if key.startswith("model.")}
    model.load_state_dict(weights)
    return model, golden


def output(model: Any, golden: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(golden["ids"]).last_hidden_state
        return y


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_adapterhub(tmp_path: Path, adapter: Any, case: str) -> None:
    model, golden = base(case)
    plain = output(model, golden)
    close(plain, golden["plain"])
    assert (golden["output"] - plain).abs().max() > 0.1
    assert adapter("convert", GOLDEN / case, "-o", tmp_path / "out", "-q").code == 0
    method, ends = CASES[case]
    found = stored(tmp_path / "out")
    assert found.own.method == method
    assert all(any(f".{site}".endswith(f".{end}") for end in ends) for site in found.sites)
    assert all(any(f".{site}".endswith(f".{end}") for site in found.sites) for end in ends)
    adapters = ah.adapt(model)
    adapters.load(tmp_path / "out", "a")
    close(output(model, golden), golden["output"])
    adapters.load(GOLDEN / case, "b")  # it need not be converted to be loaded
    adapters.activate("b")
    close(output(model, golden), golden["output"])


def test_converted_once_is_an_ordinary_folder(tmp_path: Path, adapter: Any) -> None:
    done = adapter("convert", GOLDEN / "bert-lora", "-o", tmp_path / "lora", "--json")
    assert done.json["method"] == "lora"
    assert len(done.json["modules"]) == 8
    again = adapter("convert", tmp_path / "lora", "-o", tmp_path / "again")
    assert "again: lora, 8 modules, F32" in again.out
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(t, two[key]) for key, t in one.items())
    assert adapter("merge", tmp_path / "lora", GOLDEN / "bert-lora", "-o", tmp_path / "both", "-q").code == 0
    adapter("convert", GOLDEN / "bert-lora", "-o", tmp_path / "lora").refused("exists", "--force")
    assert adapter("convert", GOLDEN / "bert-lora", "-o", tmp_path / "lora", "--force", "-q").code == 0
    assert "LORA" in (tmp_path / "lora" / CONFIG).read_text()


def edited(folder: Path, case: str, **changes: Any) -> Path:
    """A copy of a case without what is only golden, and with other entries; `version` stands outside of `config`."""
    folder.mkdir()
    shutil.copy(GOLDEN / case / WEIGHTS, folder / WEIGHTS)
    config = json.loads((GOLDEN / case / CONFIG).read_text())
    for key, value in changes.items():
        (config if key in config else config["config"])[key] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("version", "alpha"),
    [
        ("adapters.0.2.1", 3), ("adapters.1.0.1", 3), ("adapters.1.1.0.dev0", 3), ("adapters.1.1.0rc1", 3),
        ("adapters.1.1.0", 5), ("adapters.1.1.0.post1", 5), ("adapters.1.1.1", 5), ("adapters.1.10.0", 5),
        ("3.2.1", 5), (None, 5),
    ],
)  # fmt: skip
def test_loras_from_before_1_1_were_trained_with_alpha_r(tmp_path: Path, version: str | None, alpha: int) -> None:
    found = stored(edited(tmp_path / "a", "bert-lora", version=version)).own.method
    assert found == ah.method("lora", rank=3, alpha=alpha)


def test_layers_may_be_told_their_factor(tmp_path: Path) -> None:
    found = stored(edited(tmp_path / "a", "bert-seq_bn", reduction_factor={"default": 4, "7": 2})).own.method
    assert found == Bottleneck.pfeiffer(bottleneck_size=3)


REFUSED = [
    ("bert-seq_bn", {"use_gating": True}, "use_gating=True"),
    ("bert-seq_bn", {"phm_layer": True}, "phm_layer=True"),
    ("bert-seq_bn", {"inv_adapter": "nice"}, "inv_adapter='nice'"),
    ("bert-seq_bn", {"stochastic_depth": 0.1}, "stochastic_depth=0.1"),
    ("bert-seq_bn", {"something_new": 3}, "something_new=3"),
    ("bert-seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln='post_add'"),
    ("bert-seq_bn", {"original_ln_after": False}, "original_ln_after=False"),
    ("bert-seq_bn", {"non_linearity": "mish"}, "non_linearity='mish'"),
    ("bert-seq_bn", {"non_linearity": ["relu"]}, "non_linearity="),
    ("bert-seq_bn", {"init_weights": "zeros"}, "init_weights='zeros'"),
    ("bert-seq_bn", {"is_parallel": True}, "parallel adapter at 'encoder.layer.0.output' of a 'bert' is at no module"),
    ("bert-seq_bn", {"model_type": "bart"}, "of a 'bart' is at no module"),
    ("bert-seq_bn", {"reduction_factor": 2}, "do not fit"),
    ("bert-seq_bn", {"reduction_factor": "4"}, "reduction_factor='4'"),
    ("bert-seq_bn", {"ln_before": True}, "missing or one too many"),
    ("bert-seq_bn", {"scaling": "learned"}, "scale at"),
    ("bert-seq_bn", {"architecture": "prefix_tuning"}, "architecture='prefix_tuning'"),
    ("bert-seq_bn", {"config": None}, "config is None"),
    ("bert-seq_bn", {"architecture": "lora", "r": 4}, "is no tensor that is known here"),
    ("bert-seq_bn-norms", {"adapter_residual_before_ln": True}, "adapter_residual_before_ln=True"),
    ("gpt2-seq_bn", {"is_parallel": True}, "parallel adapter at 'h.0.output_adapters'"),
    ("llama-double_seq_bn", {"original_ln_before": True}, "at 'layers.0.attention_adapters'"),
    ("bert-lora", {"composition_mode": "scale"}, "composition_mode='scale'"),
    ("bert-lora", {"use_dora": True}, "use_dora=True"),
    ("bert-lora", {"use_gating": True}, "use_gating=True"),
    ("bert-lora", {"r": 4}, "rank"),
    ("bert-lora", {"version": "adapters.one"}, "version is 'adapters.one'"),
]


@pytest.mark.parametrize(("case", "changes", "said"), REFUSED, ids=[f"{c}-{next(iter(d))}" for c, d, _ in REFUSED])
def test_what_is_not_known_is_refused(tmp_path: Path, adapter: Any, case: str, changes: Any, said: str) -> None:
    folder = edited(tmp_path / "a", case, **changes)
    adapter("convert", folder, "-o", tmp_path / "out").refused(said, str(folder))
    assert not (tmp_path / "out").exists()


def test_heads_and_pickles_are_refused(tmp_path: Path, adapter: Any) -> None:
    folder = edited(tmp_path / "a", "bert-seq_bn-norms")
    (folder / "head_config.json").write_text("{}")
    adapter("convert", folder, "-o", tmp_path / "out").refused("prediction head", "head_config.json")
    (folder / "head_config.json").unlink()
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for key in list(tensors):  # as the library saves them: one tensor under two names
        if ".adapter_norm_before." in key:
            tensors[key.replace("adapter_norm_before", "adapter_down.0")] = tensors[key]
    torch.save(tensors, folder / PICKLE)
    line = adapter("convert", folder, "-o", tmp_path / "out").refused("pickle", PICKLE)
    program = line.partition('python -c "')[2].rstrip().removesuffix('"')
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    assert adapter("convert", folder, "-o", tmp_path / "out", "-q").code == 0


def test_tensors_of_two_adapters_or_of_none_are_refused(tmp_path: Path, adapter: Any) -> None:
    folder = edited(tmp_path / "a", "bert-seq_bn")
    tensors = load_file(folder / WEIGHTS)
    both = {key.replace(".a.", f".{name}."): t.clone() for name in "ab" for key, t in tensors.items()}
    save_file(both, folder / WEIGHTS)
    adapter("convert", folder, "-o", tmp_path / "out").refused("tensors of a, b")
    save_file({}, folder / WEIGHTS)
    adapter("convert", folder, "-o", tmp_path / "out").refused("holds no tensor")
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key].int()}, folder / WEIGHTS)
    adapter("convert", folder, "-o", tmp_path / "out").refused("I32")
    save_file({name: t for name, t in tensors.items() if name != key}, folder / WEIGHTS)
    adapter("convert", folder, "-o", tmp_path / "out").refused("missing")


def test_parts_of_fused_projections_are_refused(tmp_path: Path, adapter: Any) -> None:
    folder = edited(tmp_path / "a", "bert-lora", model_type="gpt2")
    tensors = load_file(folder / WEIGHTS)
    query = {key[-1]: t for key, t in tensors.items() if ".0.attention.self.query." in key}
    save_file({f"h.0.attn.c_attn.loras.a.lora_{key}": t for key, t in query.items()}, folder / WEIGHTS)
    adapter("convert", folder, "-o", tmp_path / "out").refused("query, key and value at once", "c_attn")
