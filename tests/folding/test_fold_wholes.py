"""Whole values that come beside an adapter, trained heads, biases and token rows, take the place of the base's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peers  # noqa: F401  # before transformers: no access to the Hub
import pytest
import torch
from fold_models import draw, same_bits, tensors_of, write_lora, write_model
from peers import BERT, EMBEDDING, LLAMA, Peer, load_peft, output, write_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite.folding import blocks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PREFIX = "base_model.model."
LAYER = {"net.q": (9, 6)}


def base(folder: Path, dtype: torch.dtype = torch.float32, **more: Tensor) -> Path:
    tensors = {"net.q.weight": draw(9, 6), "net.q.bias": draw(9, seed=1), "head.weight": draw(7, 9, seed=2)}
    tensors |= {"head.bias": draw(7, seed=3), "net.emb.weight": draw(20, 6, seed=4), **more}
    return write_model(folder, {key: t.to(dtype) for key, t in tensors.items()}, files=2)


def with_head(folder: Path, seed: int = 5, dtype: torch.dtype = torch.float32) -> Path:
    more = {f"{PREFIX}head.weight": draw(7, 9, seed=seed), f"{PREFIX}head.bias": draw(7, seed=seed + 1)}
    more = {key: t.to(dtype) for key, t in more.items()}
    return write_lora(folder, LAYER, seed=seed, more=more, modules_to_save=["head"])


@pytest.mark.parametrize("block", [1 << 18, 4])
def test_a_head_is_put_in_place(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "STRIP", block)
    part = with_head(tmp_path / "a")
    result = ah.fold(base(tmp_path / "base"), ah.load(part), tmp_path / "out")
    got, file = tensors_of(tmp_path / "out"), load_file(part / "adapter_model.safetensors")
    for key in ("head.weight", "head.bias"):
        assert same_bits(got[key], file[f"{PREFIX}{key}"])
    assert result.replaced == ("head.bias", "head.weight")
    assert list(result.modules) == ["net.q"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_the_bases_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    part = with_head(tmp_path / "a")
    file = load_file(part / "adapter_model.safetensors")
    ah.fold(base(tmp_path / "base", dtype), ah.load(part), tmp_path / "out")
    assert same_bits(tensors_of(tmp_path / "out")["head.weight"], file[f"{PREFIX}head.weight"].to(dtype))
    half = with_head(tmp_path / "half", dtype=dtype)
    ah.fold(base(tmp_path / "wide"), ah.load(half), tmp_path / "widened")
    file = load_file(half / "adapter_model.safetensors")
    assert same_bits(tensors_of(tmp_path / "widened")["head.weight"], file[f"{PREFIX}head.weight"].float())


def test_which_head(tmp_path: Path, adapter: Callable[..., Any]) -> None:
    a, b = with_head(tmp_path / "a"), with_head(tmp_path / "b", seed=8)
    folder, out = base(tmp_path / "base"), tmp_path / "out"
    done = adapter("merge", a, b, "--into", folder, "-o", out, "--weights", "1", "1")
    done.refused("head", "have different values", "--keep")
    assert not out.exists()
    for keep, wanted in ((str(a), a), (str(b), b), ("none", None)):
        done = adapter(
            "merge", a, b, "--into", folder, "-o", out, "--weights", "1", "1", "--keep", keep, "--force", "--json"
        )
        assert done.code == 0, done
        got = tensors_of(out)["head.weight"]
        if wanted is None:
            assert same_bits(got, draw(7, 9, seed=2))
            assert done.json["replaced"] == []
        else:
            assert same_bits(got, load_file(wanted / "adapter_model.safetensors")[f"{PREFIX}head.weight"])
            assert done.json["replaced"] == ["head.bias", "head.weight"]
    assert adapter("merge", a, b, "--into", folder, "-o", tmp_path / "x", "--keep", "c").code == 2


def test_equal_heads_are_no_question(tmp_path: Path) -> None:
    a, b = with_head(tmp_path / "a"), with_head(tmp_path / "b")
    ah.fold(base(tmp_path / "base"), 0.5 * ah.load(a) + 0.5 * ah.load(b), tmp_path / "out")
    assert same_bits(tensors_of(tmp_path / "out")["head.weight"], draw(7, 9, seed=5))


def test_an_adapter_of_weight_zero_brings_nothing_along(tmp_path: Path) -> None:
    """As where adapters are merged: neither its head, nor a layer that the base does not have."""
    a, b = with_head(tmp_path / "a"), with_head(tmp_path / "b", seed=8)
    other = write_lora(tmp_path / "c", {"nobodys": (3, 3)})
    ah.fold(base(tmp_path / "base"), ah.load(a) + 0 * ah.load(b) + 0 * ah.load(other), tmp_path / "out")
    ah.fold(tmp_path / "base", ah.load(a), tmp_path / "want")
    got, want = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "want")
    assert all(same_bits(got[name], want[name]) for name in want)
    with pytest.raises(ah.NotMergeable, match="all weights are zero"):
        ah.fold(tmp_path / "base", 0 * ah.load(a), tmp_path / "none")


def test_all_biases(tmp_path: Path) -> None:
    """bias="all": PEFT saves the values of every bias, those beside an adapter as base_layer.bias or without it."""
    part = write_adapter(tmp_path / "a", BERT, rank=3, alpha=6, seed=1, bias="all")
    BERT.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    result = ah.fold(tmp_path / "base", ah.load(part), tmp_path / "out")
    biases = [name for name in tensors_of(tmp_path / "base") if name.endswith("bias")]
    assert sorted(result.replaced) == sorted(biases)
    model = type(BERT.build()).from_pretrained(tmp_path / "out", local_files_only=True).eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(output(model, BERT), output(load_peft(part, BERT), BERT), rtol=0, atol=2e-5)


@pytest.mark.parametrize("block", [1 << 18, 4])
@pytest.mark.parametrize("indices", [[5, 0, 52], {"tokens": [52, 7], "positions": [3]}], ids=["list", "dict"])
def test_token_rows(tmp_path: Path, indices: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "STRIP", block)
    more: dict[str, Any] = {"trainable_token_indices": indices, "target_modules": ["proj"]}
    peer = EMBEDDING if isinstance(indices, dict) else TOKENS
    part = write_adapter(tmp_path / "a", peer, rank=3, alpha=6, seed=1, **more)
    model = peer.build()
    ah.fold(write_model(tmp_path / "base", model.state_dict()), ah.load(part), tmp_path / "out")
    got, old = tensors_of(tmp_path / "out"), model.state_dict()
    for name, own in (indices if isinstance(indices, dict) else {"embed_tokens": indices}).items():
        others = [i for i in range(len(old[f"{name}.weight"])) if i not in own]
        assert same_bits(got[f"{name}.weight"][others], old[f"{name}.weight"][others])
        assert not bool((got[f"{name}.weight"][own] == old[f"{name}.weight"][own]).any())
    model.load_state_dict(got)
    torch.testing.assert_close(output(model, peer), output(load_peft(part, peer), peer), rtol=0, atol=1e-5)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.proj = nn.Embedding(53, 24), nn.Linear(24, 20)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.proj(self.embed_tokens(ids))
        return y


def _tokens() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tokens().eval()


TOKENS = Peer("tokens", _tokens, ["proj"], EMBEDDING.inputs)


def test_rows_behind_the_end_are_refused(tmp_path: Path) -> None:
    more = {f"{PREFIX}net.emb.token_adapter.trainable_tokens_delta": draw(2, 6)}
    part = write_lora(tmp_path / "a", LAYER, more=more, trainable_token_indices={"net.emb": [3, 20]})
    with pytest.raises(ah.NotMergeable, match=r"'net.emb.weight' has the shape \[2, 6\].*resize the base's vocabulary"):
        ah.fold(base(tmp_path / "base"), ah.load(part), tmp_path / "out")


def test_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    more = {f"{PREFIX}net.emb.weight": draw(22, 6, seed=4)}
    part = write_lora(tmp_path / "a", LAYER, more=more, modules_to_save=["emb"])
    with pytest.raises(ah.NotMergeable, match=r"\[22, 6\], and the base's \[20, 6\]; resize the base's vocabulary"):
        ah.fold(base(tmp_path / "base"), ah.load(part), tmp_path / "out")
    lora = {f"{PREFIX}net.emb.lora_embedding_A": draw(3, 22), f"{PREFIX}net.emb.lora_embedding_B": draw(6, 3)}
    part = write_lora(tmp_path / "b", LAYER, more=lora, target_modules=["q", "emb"])
    with pytest.raises(
        ah.NotMergeable,
        match=r"'net.emb' as embedding of shape \[22, 6\].*\[20, 6\].*a resized vocabulary is not merged",
    ):
        ah.fold(base(tmp_path / "base"), ah.load(part), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_that_overflows_is_refused(tmp_path: Path) -> None:
    more = {f"{PREFIX}head.weight": torch.full((7, 9), 1e5), f"{PREFIX}head.bias": draw(7)}
    part = write_lora(tmp_path / "a", LAYER, more=more, modules_to_save=["head"])
    with pytest.raises(ah.NotMergeable, match=r"'head.weight' does not fit F16"):
        ah.fold(base(tmp_path / "base", torch.float16), ah.load(part), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("same", [True, False])
def test_pefts_copy_of_an_adapted_embedding(tmp_path: Path, same: bool) -> None:
    """It is the base's own; another one is not folded upon."""
    emb = draw(20, 6, seed=4 if same else 44)
    more = {
        f"{PREFIX}net.emb.lora_embedding_A": draw(3, 20),
        f"{PREFIX}net.emb.lora_embedding_B": draw(6, 3, seed=1),
        f"{PREFIX}net.emb.base_layer.weight": emb,
    }
    part = write_lora(tmp_path / "a", LAYER, more=more, target_modules=["q", "emb"])
    if not same:
        with pytest.raises(ah.NotMergeable, match=r"'net.emb' is adapted, and .* brings another .*--keep none"):
            ah.fold(base(tmp_path / "base"), ah.load(part), tmp_path / "out")
    keep = None if same else "none"
    result = ah.fold(base(tmp_path / "base"), ah.load(part), tmp_path / "out", keep=keep)
    assert result.replaced == ()
    want = draw(20, 6, seed=4).double() + 2 * (draw(6, 3, seed=1).double() @ draw(3, 20).double()).T
    assert same_bits(tensors_of(tmp_path / "out")["net.emb.weight"], want.float())


@pytest.mark.parametrize("file_has_head", [True, False])
def test_a_trained_embedding_of_a_tied_model_is_refused(tmp_path: Path, file_has_head: bool) -> None:
    config = {"vocab_size": 20, "tie_word_embeddings": True, "architectures": ["ToyForCausalLM"]}
    tensors = {"net.q.weight": draw(9, 6), "net.emb.weight": draw(20, 6, seed=4)}
    if file_has_head:
        tensors["lm_head.weight"] = tensors["net.emb.weight"].clone()
    folder = write_model(tmp_path / "base", tensors, config=config)
    part = write_lora(tmp_path / "a", LAYER, more={f"{PREFIX}net.emb.weight": draw(20, 6)}, modules_to_save=["emb"])
    with pytest.raises(ah.NotMergeable, match=r"'net.emb.weight' is the embedding and the output head at once"):
        ah.fold(folder, ah.load(part), tmp_path / "out")


def test_token_rows_of_a_tied_model(tmp_path: Path) -> None:
    """PEFT trains them in the embedding and the head at once: so they are folded."""
    import copy

    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    config = copy.deepcopy(LLAMA.build().config)
    config.tie_word_embeddings = True

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = LlamaForCausalLM(config).eval()  # type: ignore[arg-type]
        return model

    peer = Peer("tied", build, ["q_proj"], LLAMA.inputs)
    part = write_adapter(tmp_path / "a", peer, rank=3, alpha=6, seed=1, trainable_token_indices=[5, 17, 96])
    build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    ah.fold(tmp_path / "base", ah.load(part), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    torch.testing.assert_close(output(model, peer), output(load_peft(part, peer), peer), rtol=0, atol=2e-5)
