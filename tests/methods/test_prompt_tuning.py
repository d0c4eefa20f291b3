"""Prompt tuning: the model with the prompt in front written out, PEFT's outputs and files, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import GPT2, LLAMA, Peer, load_peft, write_peft
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DynamicCache

import adapterhub_lite as ah
from adapterhub_lite.registry import registry

N = 5
DECODERS = {"llama": "model", "gpt2": "transformer"}
both = pytest.mark.parametrize("peer", [LLAMA, GPT2], ids=lambda peer: peer.name)


def adapted(peer: Peer = LLAMA, name: str = "a", **options: Any) -> tuple[Any, ah.Adapters, Tensor]:
    """The peer with a prompt of width-sized numbers, in float64; the prompt too."""
    model: Any = peer.build().double()
    adapters = ah.adapt(model)
    adapters.add(name, ah.method("prompt_tuning", num_virtual_tokens=N, **options), DECODERS[peer.name])
    decoder = model.get_submodule(DECODERS[peer.name])
    return model, adapters, decoder.adapters.get_parameter(f"{name}.prompt")


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def written_out(peer: Peer, prompt: Tensor, x: Tensor, **more: Any) -> Tensor:
    """Logits of the base for [prompt; embeddings], behind the prompt."""
    model: Any = peer.build().double()
    front = prompt.detach().expand(len(x), -1, -1)
    with torch.no_grad():
        out = model(inputs_embeds=torch.cat([front, model.get_input_embeddings()(x)], dim=1), **more)
    logits: Tensor = out.logits[:, len(prompt) :]
    return logits


def logits(model: Any, **call: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(**call).logits
    return y


@both
def test_it_is_the_model_with_the_prompt_in_front(peer: Peer) -> None:
    model, adapters, prompt = adapted(peer)
    want = written_out(peer, prompt, ids())
    base = logits(peer.build().double(), input_ids=ids())
    assert (want - base).abs().max() > 1e-2
    for call in (
        {"input_ids": ids()},
        {"inputs_embeds": model.get_input_embeddings()(ids())},
        {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)},
        {"input_ids": ids(), "position_ids": torch.arange(7)[None]},
        {"input_ids": ids(), "use_cache": False},
    ):
        torch.testing.assert_close(logits(model, **call), want, rtol=0, atol=1e-12)
    with torch.no_grad():  # the decoder by itself: positional, and without a ModelOutput
        own = model.get_submodule(DECODERS[peer.name])
        hidden = own(ids(), return_dict=False)[0] if peer is LLAMA else own(ids()).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), want, rtol=0, atol=1e-12)
    adapters.activate(None)
    assert torch.equal(logits(model, input_ids=ids()), base)


def test_a_mask_leaves_out_tokens_and_never_the_prompt() -> None:
    model, _, prompt = adapted()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3], mask[1, 6:] = 0, 0
    want = written_out(LLAMA, prompt, ids(), attention_mask=torch.cat([torch.ones(2, N), mask], dim=1))
    torch.testing.assert_close(logits(model, input_ids=ids(), attention_mask=mask), want, rtol=0, atol=1e-12)


def test_a_cache_that_is_continued_holds_the_prompt_once() -> None:
    model, _, prompt = adapted()
    x, cache = ids(2, 9), DynamicCache()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pieces = []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        call = {"input_ids": x[:, start:stop], "position_ids": positions[:, start:stop]}
        pieces.append(logits(model, **call, attention_mask=mask[:, :stop], past_key_values=cache))
    assert cache.get_seq_length() == N + 9
    whole = torch.cat([torch.ones(2, N, dtype=torch.long), mask], dim=1)
    at = torch.cat([torch.arange(N).expand(2, -1), positions + N], dim=1)
    want = written_out(LLAMA, prompt, x, attention_mask=whole, position_ids=at)
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask.bool()], want[mask.bool()], rtol=0, atol=1e-12)


def test_hidden_states_and_attentions_are_as_long_as_the_input() -> None:
    model, _, _ = adapted()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=ids(), output_hidden_states=True, output_attentions=True)
    assert {h.shape for h in out.hidden_states} == {(2, 7, 64)}
    assert {a.shape for a in out.attentions} == {(2, 4, 7, 7 + N)}
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


def test_generation_with_left_padding_is_that_of_the_sequence_alone() -> None:
    model, _, _ = adapted()
    model.generation_config.eos_token_id = None
    x = ids()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"use_cache": False}, {"num_beams": 3}):
        both_rows = model.generate(x, attention_mask=mask, **options, **more)
        for row, start in ((0, 3), (1, 0)):
            alone = model.generate(x[row : row + 1, start:], **options, **more)
            assert alone.shape == (1, 15 - start)
            assert torch.equal(both_rows[row, start:], alone[0])


def test_it_trains_with_labels_and_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model, adapters, prompt = adapted()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        calls: list[int] = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *call, calls=calls: calls.append(1))
        x = ids()
        loss = model(input_ids=x, labels=x).loss
        want = nn.functional.cross_entropy(written_out(LLAMA, prompt, x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=0)  # transformers' is float32
        loss.backward()
        assert len(calls) == 1 + checkpointing
        assert [p.shape for p in model.parameters() if p.grad is not None] == [(N, 64)]
        grads.append(prompt.grad)
        assert adapters.summary().trained == N * 64
    torch.testing.assert_close(*grads)
    assert grads[0].abs().min() > 0


def test_it_starts_at_random_or_at_words() -> None:
    _, _, prompt = adapted(init_weights="random")
    assert float(prompt.detach().std()) == pytest.approx(1, abs=0.15)
    model, _, words = adapted(init_weights="sample_vocab")
    table, words = model.get_input_embeddings().weight, words.detach()
    rows = [int((table == word).all(dim=1).nonzero()) for word in words]
    assert len(set(rows)) > 1
    assert torch.equal(table[rows], words)
    _, _, again = adapted(init_weights="sample_vocab")
    assert torch.equal(words, again)
    half: Any = LLAMA.build().bfloat16()
    ah.adapt(half).add("a", ah.method("prompt_tuning", init_weights="sample_vocab"), "model")
    assert half.model.adapters.a.prompt.dtype == torch.float32


# PEFT -----------------------------------------------------------------------------------------------------


def peft_logits(model: PeftModel, **call: Any) -> Tensor:
    return logits(model, **call)[:, N:]


def config(**options: Any) -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, **options)


@both
def test_what_peft_wrote_computes_the_same_here_and_comes_back_as_it_was(tmp_path: Path, peer: Peer) -> None:
    theirs = write_peft(tmp_path / "theirs", peer, config, seed=3)
    want = peft_logits(load_peft(theirs, peer), input_ids=ids())
    model = peer.build()
    adapters = ah.adapt(model)
    adapters.load(theirs, "a")
    assert adapters.summary().trained == N * model.config.hidden_size
    torch.testing.assert_close(logits(model, input_ids=ids()), want, rtol=0, atol=1e-6)
    for out, save in (("live", lambda to: adapters.save("a", to)), ("file", lambda to: ah.load(theirs).save(to))):
        save(tmp_path / out)
        a, b = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, tmp_path / out))
        assert a.keys() == b.keys() == {"prompt_embeddings"}
        assert torch.equal(a["prompt_embeddings"], b["prompt_embeddings"])
        torch.testing.assert_close(peft_logits(load_peft(tmp_path / out, peer), input_ids=ids()), want)
        again = peer.build()
        ah.adapt(again).load(tmp_path / out, "b")
        assert torch.equal(logits(again, input_ids=ids()), logits(model, input_ids=ids()))


@both
def test_what_is_written_here_computes_the_same_in_peft(tmp_path: Path, peer: Peer) -> None:
    model = peer.build()
    adapters = ah.adapt(model)
    method = ah.method("prompt_tuning", num_virtual_tokens=N, init_weights="sample_vocab")
    adapters.add("a", method, DECODERS[peer.name], seed=4)
    adapters.save("a", tmp_path / "ours")
    theirs = load_peft(tmp_path / "ours", peer)
    torch.testing.assert_close(peft_logits(theirs, input_ids=ids()), logits(model, input_ids=ids()), rtol=0, atol=1e-6)
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert written["prompt_tuning_init"] == "SAMPLE_VOCAB"
    assert "target_modules" not in written
    value = ah.load(tmp_path / "ours")
    assert value.single is not None
    assert value.single.own.method == method
    assert list(value.sites) == [DECODERS[peer.name]]
    value.save(tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text()) == written
    assert list(ah.load(tmp_path / "again").sites) == [DECODERS[peer.name]]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_generation_is_peft_s() -> None:
    model, _, prompt = adapted()
    theirs = get_peft_model(LLAMA.build().double(), config(), autocast_adapter_dtype=False).eval()  # type: ignore[arg-type]
    theirs.prompt_encoder["default"].embedding.weight.data = prompt.detach().clone()  # type: ignore[union-attr, index]
    for own in (model, theirs.base_model):
        own.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
        want = theirs.generate(input_ids=ids(), attention_mask=torch.ones_like(ids()), **options)
    got = model.generate(ids(), **options)
    assert len(set(got[0, 7:].tolist())) > 1
    assert torch.equal(got, want)


# What is refused --------------------------------------------------------------------------------------------


def test_it_is_alone_at_its_decoder_and_has_no_weight() -> None:
    model, adapters, _ = adapted()
    adapters.add("b", ah.method("prompt_tuning", num_virtual_tokens=3), "model", seed=1)
    adapters.add("lora", ah.method("lora", rank=2), ["q_proj"])
    for which, why in (
        ({"a": 1.0, "b": 1.0}, "'a' wraps the call .* beside 'b'"),
        ({"a": 0.5}, "'a' wraps the call .* weight 0.5"),
    ):
        with pytest.raises(ah.ConfigError, match=f"^model: {why}"):
            adapters.activate(which)
        assert adapters.active == {"a": 1.0}
    one = logits(model, input_ids=ids())
    adapters.activate("b")
    assert (logits(model, input_ids=ids()) - one).abs().max() > 1e-2
    adapters.activate({"a": 1.0, "lora": 0.5})  # at other layers others may be on
    torch.testing.assert_close(logits(model, input_ids=ids()), one)
    with pytest.raises(ah.NotMergeable, match=r"^model: .*wraps the call of the layer"):
        adapters.merge()
    adapters.activate("lora")
    adapters.merge()
    adapters.unmerge()
    for name in ("a", "b", "lora"):
        adapters.remove(name)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks
    assert torch.equal(logits(model, input_ids=ids()), logits(LLAMA.build().double(), input_ids=ids()))


def test_there_is_no_sum_of_prompts(tmp_path: Path) -> None:
    _, adapters, _ = adapted()
    adapters.save("a", tmp_path / "a")
    a = ah.load(tmp_path / "a")
    with pytest.raises(ah.NotMergeable):
        (0.5 * a).save(tmp_path / "half")


def test_calls_that_leave_no_room_for_it_are_refused() -> None:
    model, _, _ = adapted()
    with pytest.raises(ah.AdapterError, match="static cache"):
        model.generate(ids(), max_new_tokens=3, cache_implementation="static")
    plain: Any = LLAMA.build().double()
    cache = plain(input_ids=ids()).past_key_values
    with pytest.raises(ah.AdapterError, match="goes on with a cache of 7 positions"):
        logits(model, input_ids=ids(2, 1), attention_mask=torch.ones(2, 8), past_key_values=cache)
    gpt2, _, _ = adapted(GPT2)
    with pytest.raises(ah.AdapterError, match="token_type_ids"):
        logits(gpt2, input_ids=ids(), token_type_ids=ids())
    with pytest.raises(ah.AdapterError, match="neither input_ids nor inputs_embeds"):
        model.model()


def test_the_head_is_no_decoder_and_a_pooler_reads_the_first_position() -> None:
    kind = registry().site_kind("decoder")
    for peer, name in ((LLAMA, "model"), (GPT2, "transformer")):
        model = peer.build()
        assert [n for n, module in model.named_modules() if kind.accepts(module)] == [name]
        assert kind.of(name, model.get_submodule(name)).shape == ((64, 64) if peer is LLAMA else (48, 48))
    widths: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40}
    bert = BertConfig(**widths, num_hidden_layers=1, num_attention_heads=2, vocab_size=97)
    for pooling in (True, False):
        model = nn.ModuleDict({"bert": BertModel(bert, add_pooling_layer=pooling).eval()})
        adapters = ah.adapt(model)
        if pooling:
            with pytest.raises(ah.ConfigError, match=r"^bert: its pooler"):
                adapters.add("a", ah.method("prompt_tuning"), "bert")
        else:
            adapters.add("a", ah.method("prompt_tuning", num_virtual_tokens=N), "bert")
            assert model["bert"](input_ids=ids()).last_hidden_state.shape == (2, 7, 24)
    with pytest.raises(ah.ConfigError, match="num_virtual_tokens=0 is not positive"):
        ah.method("prompt_tuning", num_virtual_tokens=0)
    with pytest.raises(ah.ConfigError):
        ah.adapt(LLAMA.build()).add("a", ah.method("prompt_tuning"), "q_proj")


@pytest.mark.parametrize(
    ("entries", "tensors", "why"),
    [
        ({"num_virtual_tokens": 4}, None, "the prompt is .5, 64., and num_virtual_tokens is 4"),
        ({"num_virtual_tokens": None}, None, "num_virtual_tokens=None"),
        ({"num_transformer_submodules": 2}, None, "an encoder and a decoder"),
        ({"num_transformer_submodules": "1"}, None, "an encoder and a decoder"),
        ({"something": 3}, None, "something=3 is set"),
        ({}, {"prompt_embedding": torch.ones(N, 64)}, "is no tensor of method 'prompt_tuning'"),
        ({}, {"prompt_embeddings": torch.ones(N * 64)}, "the prompt is .320., and"),
        ({}, {"prompt_embeddings": torch.ones(N, 64, dtype=torch.int64)}, "holds I64"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path, entries: dict[str, Any], tensors: dict[str, Tensor] | None, why: str
) -> None:
    folder = write_peft(tmp_path / "theirs", LLAMA, config, seed=3)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ah.FileError, match=why):
        ah.load(folder)


def test_a_prompt_of_another_width_or_for_no_decoder_is_refused(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "theirs", LLAMA, config, seed=3)
    with pytest.raises(ah.FileError, match=r"decoder of shape .64, 64. at 'transformer'"):
        ah.adapt(GPT2.build()).load(folder, "a")
    with pytest.raises(ah.FileError, match=r"for 1 modules .* and the model has 0"):
        ah.adapt(nn.Sequential(nn.Linear(3, 4))).load(folder, "a")


def test_copies_and_pickles_have_the_prompt() -> None:
    model, adapters, _ = adapted()
    want = logits(model, input_ids=ids())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, input_ids=ids()), want)
        twin.model.adapters.a.prompt.data.zero_()
        assert (logits(twin, input_ids=ids()) - want).abs().max() > 1e-2
    assert torch.equal(logits(model, input_ids=ids()), want)
    adapters.remove("a")
    assert copy.deepcopy(model).model._forward_hooks == {}
