"""transformers loads what was folded, and it computes what the live adapters do; PEFT agrees where it is right."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fold_models import digests, off_by, same_bits, tensors_of, write_lora, write_model
from peers import (
    BERT,
    GPT2,
    LLAMA,
    Peer,
    dense_delta,
    load_peft,
    minilm,
    minilm_folder,
    native,
    output,
    write_adapter,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import adapterhub_lite as ah

if TYPE_CHECKING:
    from pathlib import Path

LOADER: dict[str, Any] = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModel}


def load(folder: Path, peer: Peer) -> nn.Module:
    """The model as transformers reads it; every tensor of the file has its place."""
    model, info = LOADER[peer.name].from_pretrained(
        folder, local_files_only=True, output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, nn.Module)
    return model.eval()


def saved(peer: Peer, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    peer.build().to(dtype).save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("peer", [LLAMA, GPT2, BERT], ids=lambda peer: peer.name)
@pytest.mark.parametrize("size", ["1GB", "60kB"])
def test_it_computes_what_the_live_adapters_do(peer: Peer, size: str, tmp_path: Path) -> None:
    base = saved(peer, tmp_path / "base", max_shard_size=size)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (size == "60kB")
    parts = [write_adapter(tmp_path / key, peer, rank=r, alpha=9, seed=r) for key, r in (("a", 4), ("b", 7))]
    a, b = map(ah.load, parts)
    ah.fold(base, 0.7 * a - 0.3 * b, tmp_path / "out")
    model = peer.build()
    adapters = ah.adapt(model)
    for key, part in zip("ab", parts, strict=True):
        adapters.load(part, name=key)
    adapters.activate({"a": 0.7, "b": -0.3})
    want = output(model, peer)
    got = output(load(tmp_path / "out", peer), peer)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert (output(peer.build(), peer) - want).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize("peer", [LLAMA, GPT2, BERT], ids=lambda peer: peer.name)
@pytest.mark.parametrize("rslora", [False, True])
def test_as_pefts_merge_and_unload(peer: Peer, rslora: bool, tmp_path: Path) -> None:
    """In float32, PEFT rounds ΔW and then the sum: it may be a few units off, and no more."""
    part = write_adapter(tmp_path / "a", peer, rank=5, alpha=9, seed=1, use_rslora=rslora)
    ah.fold(saved(peer, tmp_path / "base"), ah.load(part), tmp_path / "out")
    theirs = load_peft(part, peer).merge_and_unload().state_dict()  # type: ignore[operator]
    got, old = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "base")
    for name, tensor in got.items():
        key = name if name in theirs else f"transformer.{name}"
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6)
    assert sum(not torch.equal(got[name], old[name]) for name in got) == len(ah.load(part).sites)


def test_pefts_flag_beside_an_output_head(tmp_path: Path) -> None:
    """GPT-2's square Conv1D and a Linear head in one adapter: PEFT says in its config that nothing is transposed."""
    peer = Peer("gpt2", _untied_gpt2, ["c_proj", "lm_head"], GPT2.inputs)
    peer.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    part = _write_unwarned(tmp_path / "a", peer)
    assert json.loads((part / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    ah.fold(tmp_path / "base", ah.load(part), tmp_path / "out")
    model = peer.build()
    for name, delta in dense_delta(part).items():
        module = model.get_submodule(name)
        module.get_parameter("weight").data.add_(native(delta, module))
    torch.testing.assert_close(output(load(tmp_path / "out", peer), peer), output(model, peer), rtol=0, atol=1e-4)


def _untied_gpt2() -> Any:
    from transformers import GPT2LMHeadModel

    config = copy.deepcopy(GPT2.build().config)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


def _write_unwarned(folder: Path, peer: Peer) -> Path:
    """PEFT warns of the flag that it then corrects, layer by layer."""
    import warnings

    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, lora_alpha=6, target_modules=peer.targets)
        model = get_peft_model(peer.build(), config)  # type: ignore[arg-type]
        rng = torch.Generator().manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.data = torch.randn(p.shape, generator=rng) / math.sqrt(p.shape[-1])
        model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    base = saved(LLAMA, tmp_path / "base", dtype)
    part = write_adapter(tmp_path / "a", LLAMA, rank=4, alpha=9, seed=1)
    ah.fold(base, ah.load(part), tmp_path / "out")
    model = load(tmp_path / "out", LLAMA)
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact = LLAMA.build()
    exact.load_state_dict({key: t.float() for key, t in tensors_of(base).items()})
    exact.save_pretrained(tmp_path / "wide")  # type: ignore[operator]
    ah.fold(tmp_path / "wide", ah.load(part), tmp_path / "exact")
    for name, tensor in tensors_of(tmp_path / "exact").items():
        other, worst = off_by(tensors_of(tmp_path / "out")[name], tensor.to(dtype))
        assert worst <= 1  # the oracle rounds twice
        assert other <= 1e-2 * tensor.numel() + 1


def test_real_weights(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2: DoRA, IA3 and LoRA in one sum, a sentence's embedding."""
    model, tokenizer = minilm()
    adapters = ah.adapt(model)
    rng = torch.Generator().manual_seed(0)
    kinds: dict[str, dict[str, Any]] = {
        "lora": {"rank": 4},
        "dora": {"rank": 4},
        "ia3": {"feedforward": ("output.dense",)},
        "bitfit": {},
    }
    for method, options in kinds.items():
        adapters.add(method, ah.method(method, **options), "all-linear")
        adapters.activate(method)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape, generator=rng))
        adapters.save(method, tmp_path / method)
    weights = {"lora": 0.7, "dora": 0.5, "ia3": -0.3, "bitfit": 1.0}
    adapters.activate(weights)
    value: Any = sum(w * ah.load(tmp_path / method) for method, w in weights.items())
    ah.fold(minilm_folder(), value, tmp_path / "out")
    words = tokenizer(["Adapters are small.", "They change a model by a little."], return_tensors="pt", padding=True)
    adapters.merge()
    folded = AutoModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    with torch.no_grad():
        want, got = model(**words)[0], folded(**words)[0]
        adapters.unmerge()
        adapters.activate(None)
        before = model(**words)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (before - want).abs().max() > 1e-2
    assert _encoded(tmp_path / "out") == _encoded(minilm_folder())


def _encoded(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return list(tokenizer("The tokenizer came along.")["input_ids"])


# Names that begin differently -------------------------------------------------------------------------


def bert_config() -> BertConfig:
    shape: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return BertConfig(**shape, num_attention_heads=4, vocab_size=97, max_position_embeddings=16, num_labels=3)


def _peer(kind: Any, name: str) -> Peer:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = kind(bert_config()).eval()
        return model

    return Peer(name, build, ["query", "value", "attention.output.dense"], GPT2.inputs)


CLASSIFIER, ENCODER = _peer(BertForSequenceClassification, "classifier"), _peer(BertModel, "encoder")


@pytest.mark.parametrize("outer", [True, False])
def test_a_model_inside_of_another(outer: bool, tmp_path: Path) -> None:
    """An adapter of the classifier, whose layers are bert.…, for the encoder alone, and the other way round."""
    trained_on, peer = (CLASSIFIER, ENCODER) if outer else (ENCODER, CLASSIFIER)
    part = write_adapter(tmp_path / "a", trained_on, rank=3, alpha=6, seed=2)
    peer.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    ah.fold(tmp_path / "base", ah.load(part), tmp_path / "out")
    ours, old = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "base")
    assert sum(not torch.equal(ours[name], old[name]) for name in old) == 6
    oracle: dict[str, Tensor] = {}
    peers_own = write_adapter(tmp_path / "own", peer, rank=3, alpha=6, seed=2)  # of the same shapes, filled alike below
    theirs = load_file(part / "adapter_model.safetensors")
    strip, add = ("bert.", "") if outer else ("", "bert.")
    for key, tensor in theirs.items():
        rest = key.removeprefix("base_model.model.")
        oracle[f"base_model.model.{add}{rest.removeprefix(strip)}"] = tensor
    save_file(oracle, peers_own / "adapter_model.safetensors", {"format": "pt"})
    ah.fold(tmp_path / "base", ah.load(peers_own), tmp_path / "plain")
    plain = tensors_of(tmp_path / "plain")
    assert all(same_bits(ours[name], plain[name]) for name in plain)


def test_a_trained_head_that_the_encoder_lacks(tmp_path: Path) -> None:
    part = write_adapter(tmp_path / "a", CLASSIFIER, rank=3, alpha=6, seed=2, modules_to_save=["classifier"])
    ENCODER.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with pytest.raises(ah.NotMergeable, match=r"classifier.(weight|bias)' has no place in the base; pass --keep none"):
        ah.fold(tmp_path / "base", ah.load(part), tmp_path / "out")
    ah.fold(tmp_path / "base", ah.load(part), tmp_path / "out", keep="none")
    CLASSIFIER.build().save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    result = ah.fold(tmp_path / "whole", ah.load(part), tmp_path / "done")
    assert result.replaced == ("classifier.bias", "classifier.weight")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "done", local_files_only=True).eval()
    want = output(load_peft(part, CLASSIFIER), CLASSIFIER)
    torch.testing.assert_close(output(model, CLASSIFIER), want, rtol=0, atol=1e-5)


def test_two_beginnings_that_fit_are_no_answer(tmp_path: Path) -> None:
    names = [f"{side}.layers.0.q.weight" for side in ("encoder", "decoder")]
    folder = write_model(tmp_path / "base", {name: torch.ones(4, 3) for name in names})
    part = write_lora(tmp_path / "a", {"layers.0.q": (4, 3)})
    with pytest.raises(ah.UnknownName, match=r"layers\.0\.q"):
        ah.fold(folder, ah.load(part), tmp_path / "out")


def test_a_folded_model_is_a_base_too(tmp_path: Path) -> None:
    """Fold, and fold the opposite into the result: float64 sums back to nearly where they were."""
    base = saved(LLAMA, tmp_path / "base")
    a = ah.load(write_adapter(tmp_path / "a", LLAMA, rank=4, alpha=9, seed=1))
    ah.fold(base, a, tmp_path / "there")
    ah.fold(tmp_path / "there", -a, tmp_path / "back")
    for name, tensor in tensors_of(tmp_path / "back").items():
        torch.testing.assert_close(tensor, tensors_of(base)[name], rtol=0, atol=1e-6)
    assert digests(tmp_path / "back").keys() == digests(tmp_path / "there").keys()
