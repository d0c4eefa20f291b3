"""The two oracles agree with each other and with what PEFT's forward does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peers import (
    BERT,
    EMBEDDING,
    GPT2,
    LLAMA,
    PEERS,
    Peer,
    dense_delta,
    load_peft,
    minilm,
    native,
    output,
    peft_delta,
    write_adapter,
)
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "half": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16, "bias": "lora_only"},
    "patterns": {"rank_pattern": (3, 7), "alpha_pattern": (5, 2)},
    "rslora patterns": {"use_rslora": True, "rank_pattern": (7, 3), "alpha_pattern": (2, 9)},
}


def write(folder: Path, peer: Peer, options: dict[str, Any]) -> Path:
    patterns = {k: dict(zip(peer.patterned, v, strict=True)) for k, v in options.items() if "_pattern" in k}
    return write_adapter(folder, peer, rank=6, alpha=9, seed=3, **{**options, **patterns})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_oracles_agree_with_peft(tmp_path: Path, peer: Peer, variant: str) -> None:
    folder = write(tmp_path, peer, VARIANTS[variant])
    dense, theirs = dense_delta(folder), peft_delta(folder, peer)
    assert dense.keys() == theirs.keys()
    assert {name.rpartition(".")[2] for name in dense} == set(peer.targets)
    base = peer.build()
    for name, matrix in dense.items():
        assert matrix.abs().max() > 1e-3
        ours = native(matrix, base.get_submodule(name))
        torch.testing.assert_close(ours, theirs[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("variant", ["plain", "rslora patterns"])
@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_delta_added_to_the_weights_is_the_forward(tmp_path: Path, peer: Peer, variant: str) -> None:
    folder = write(tmp_path, peer, VARIANTS[variant])
    theirs = output(load_peft(folder, peer).double(), peer)
    model = peer.build().double()
    without = output(model, peer)
    for name, matrix in dense_delta(folder).items():
        module = model.get_submodule(name)
        model.get_parameter(f"{name}.weight").data += native(matrix, module)
    torch.testing.assert_close(output(model, peer), theirs, rtol=1e-6, atol=1e-9)
    assert (theirs - without).abs().max() > 1e-2


def test_first_matching_pattern_wins(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, {"rank_pattern": (3, 7)})
    ranks = {name: torch.linalg.matrix_rank(delta).item() for name, delta in dense_delta(tmp_path).items()}
    mlp = "model.layers.{}.mlp.{}_proj"
    assert [ranks[mlp.format(i, "up")] for i in (0, 1)] == [7, 3]
    assert [ranks[mlp.format(i, "down")] for i in (0, 1)] == [7, 7]
    assert [ranks[mlp.format(i, "gate")] for i in (0, 1)] == [6, 6]


def test_a_file_whose_patterns_contradict_its_tensors_is_refused(tmp_path: Path) -> None:
    # PEFT applies the patterns in this order, and saves them sorted: the general one first.
    patterns = {r"layers\.1\.mlp\.up_proj": 3, "(up|down)_proj": 7}
    write_adapter(tmp_path, LLAMA, rank=6, alpha=9, seed=3, rank_pattern=patterns)
    with pytest.raises(AssertionError, match="rank 7 in the config, 3 and 3"):
        dense_delta(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_peft(tmp_path, LLAMA)


def test_trained_extras_are_written_in_the_dtype_and_are_not_zero(tmp_path: Path) -> None:
    extras: dict[str, Any] = {"bias": "all", "modules_to_save": ["pooler"]}
    write_adapter(
        tmp_path,
        BERT,
        rank=2,
        alpha=4,
        seed=0,
        dtype=torch.bfloat16,
        target_modules=["query", "value"],
        **extras,
    )
    load_peft(tmp_path, BERT)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    # With bias="all" PEFT also writes the bias of the module that the saved copy replaces: not trained.
    tensors.pop("base_model.model.pooler.original_module.dense.bias")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all((t != 0).all() for t in tensors.values())
    assert "base_model.model.pooler.dense.weight" in tensors
    assert any(name.endswith("LayerNorm.bias") for name in tensors)
    assert len(dense_delta(tmp_path)) == 4


def test_dora_is_written_and_refused_as_a_sum(tmp_path: Path) -> None:
    write_adapter(tmp_path, LLAMA, rank=4, alpha=8, seed=0, use_dora=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    magnitudes = [t for name, t in tensors.items() if name.endswith("magnitude_vector")]
    assert len(magnitudes) == 14
    assert all((t > 0).all() for t in magnitudes)
    load_peft(tmp_path, LLAMA)
    with pytest.raises(NotImplementedError, match="use_dora"):
        dense_delta(tmp_path)


def test_embedding_layers_of_a_transformers_model(tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head"]
    folder = write_adapter(tmp_path, LLAMA, rank=4, alpha=8, seed=0, target_modules=targets)
    assert any("base_layer.weight" in key for key in load_file(folder / "adapter_model.safetensors"))
    shapes = {name: tuple(delta.shape) for name, delta in dense_delta(folder).items()}
    assert shapes == {"model.embed_tokens": (64, 97), "lm_head": (97, 64)}
    torch.testing.assert_close(
        dense_delta(folder)["model.embed_tokens"].T, peft_delta(folder, LLAMA)["model.embed_tokens"]
    )


def test_same_seed_same_bytes_and_the_global_rng_is_untouched(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name, seed in {"a": 1, "b": 1, "c": 2, "d": 1, "e": 1}.items():
        write_adapter(tmp_path / name, GPT2, rank=3, alpha=3, seed=seed, randomise=name in "abc")
    assert torch.equal(state, torch.get_rng_state())
    a, b, c, d, e = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abcde")
    assert a == b
    assert d == e
    assert len({a, c, d}) == 3
    assert not any(delta.any() for delta in dense_delta(tmp_path / "d").values())


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_loading_is_strict(tmp_path: Path, change: str) -> None:
    write_adapter(tmp_path, EMBEDDING, rank=2, alpha=2, seed=0)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["base_model.model.proj.lora_B.weight"]
    else:
        tensors["base_model.model.stray.lora_A.weight"] = torch.ones(2, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((AssertionError, UserWarning), match=change):
        load_peft(tmp_path, EMBEDDING)


def test_minilm_is_the_pretrained_model() -> None:
    model, tokenizer = minilm()
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose in March."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    v = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cosines = v @ v.T
    assert cosines[0, 1] > 0.5 > 0.2 > cosines[0, 2]


def test_the_types_that_are_said_to_be_pefts_own_are() -> None:
    from adapterhub_lite_plugins.formats.peft.layout import TYPES
    from peft import PeftType

    assert {kind.value for kind in PeftType} >= TYPES
