"""Prefix tuning: attention with the prefix written out in float64, PEFT's outputs and files, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import GPT2, LLAMA, Peer, load_peft, write_peft
from peft import PrefixTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import adapterhub_lite as ah
from adapterhub_lite.registry import registry

N, WIDTH, HEAD = 5, 32, 16  # two heads of keys, four of queries


def scaled_llama(**rope: Any) -> nn.Module:
    widths: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 92, "vocab_size": 97}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**widths, **heads, rope_parameters=rope)).eval()


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, Callable[[], nn.Module]] = {
    "default": LLAMA.build,
    "llama3": lambda: scaled_llama(**LLAMA3),
    "linear": lambda: scaled_llama(rope_type="linear", rope_theta=100.0, factor=3.0),
}
PEERS = [dataclasses.replace(LLAMA, name=name, build=build) for name, build in ROPES.items()]
every_rope = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)


def adapted(peer: Peer = LLAMA, **options: Any) -> tuple[Any, ah.Adapters]:
    """The peer in float64 with a prefix at every attention layer."""
    model: Any = peer.build().double()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("prefix_tuning", num_virtual_tokens=N, **options), "self_attn")
    return model, adapters


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, **call: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(**call).logits
    return y


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x (…, length, head) with angles (length, head / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


@every_rope
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_attention_with_the_prefix_in_front(peer: Peer, masked: bool) -> None:
    """By PEFT's convention: the prefix lies at positions 0 to n − 1 unrotated, the input behind it."""
    model, _ = adapted(peer)
    attention = model.model.layers[1].self_attn
    seen: list[Any] = []
    attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    attention.register_forward_hook(lambda m, args, y: seen.append(y[0]))
    keep = torch.ones(2, 7, dtype=torch.bool)
    if masked:
        keep[0, :2] = False
    logits(model, input_ids=ids(), **({"attention_mask": keep.long()} if masked else {}))
    x = seen[0][1]["hidden_states"].double()  # (batch, length, width)
    q, k, v = (
        getattr(attention, name)(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
    )
    theta = model.model.rotary_emb.inv_freq.double()
    angles = torch.arange(N, N + 7)[:, None] * theta
    front_k, front_v = (
        t.unflatten(-1, (-1, HEAD)).transpose(0, 1).expand(2, -1, -1, -1)
        for t in attention.adapters.a.prefix.chunk(2, dim=-1)
    )
    keys = torch.cat([front_k, rotated(k, angles)], dim=2).repeat_interleave(2, dim=1)
    values = torch.cat([front_v, v], dim=2).repeat_interleave(2, dim=1)
    scores = rotated(q, angles) @ keys.mT / HEAD**0.5  # (batch, heads, length, n + length)
    visible = torch.ones(7, 7, dtype=torch.bool).tril() & keep[:, None, None]
    visible = torch.cat([torch.ones(2, 1, 7, N, dtype=torch.bool), visible], dim=-1)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    want = attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
    assert weights[..., :N].sum(-1).mean() > 0.1  # the prefix counts
    torch.testing.assert_close(seen[1][keep], want[keep], rtol=0, atol=2e-7)  # cos and sin of the input are float32


@every_rope
def test_what_is_written_here_computes_the_same_in_peft_and_back(tmp_path: Path, peer: Peer) -> None:
    model: Any = peer.build()
    adapters = ah.adapt(model)
    method = ah.method("prefix_tuning", num_virtual_tokens=N)
    adapters.add("a", method, "self_attn", seed=4)
    adapters.save("a", tmp_path / "ours")
    mine = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in mine.items()} == {"prompt_embeddings": (N, 2 * 2 * WIDTH)}
    got = logits(model, input_ids=ids())
    assert (got - logits(peer.build(), input_ids=ids())).abs().max() > 1e-2
    theirs = load_peft(tmp_path / "ours", peer)
    torch.testing.assert_close(logits(theirs, input_ids=ids()), got, rtol=0, atol=1e-6)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert torch.equal(
        load_file(tmp_path / "theirs/adapter_model.safetensors")["prompt_embeddings"], mine["prompt_embeddings"]
    )
    for folder in ("theirs", "ours"):
        again = peer.build()
        others = ah.adapt(again)
        others.load(tmp_path / folder, "b")
        assert torch.equal(logits(again, input_ids=ids()), got)
        others.save("b", tmp_path / f"{folder} again")
        saved = load_file(tmp_path / f"{folder} again/adapter_model.safetensors")
        assert torch.equal(saved["prompt_embeddings"], mine["prompt_embeddings"])
    value = ah.load(tmp_path / "ours")
    assert value.single is not None
    assert value.single.own.method == method
    assert list(value.sites) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    value.save(tmp_path / "copy")
    assert list(ah.load(tmp_path / "copy").sites) == list(value.sites)


@pytest.mark.parametrize("projection", [False, True])
def test_what_peft_wrote_computes_the_same_here(tmp_path: Path, projection: bool) -> None:
    def config() -> PrefixTuningConfig:
        return PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=projection, encoder_hidden_size=24
        )

    folder = write_peft(tmp_path / "theirs", LLAMA, config, seed=3)
    model = LLAMA.build()
    adapters = ah.adapt(model)
    adapters.load(folder, "a")
    assert adapters.summary().trained == N * 2 * 2 * WIDTH
    theirs = load_peft(folder, LLAMA)
    want = logits(theirs, input_ids=ids())
    assert (want - logits(LLAMA.build(), input_ids=ids())).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, input_ids=ids()), want, rtol=0, atol=1e-6)
    adapters.save("a", tmp_path / "live")
    assert logits(load_peft(tmp_path / "live", LLAMA), input_ids=ids()).equal(want)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_generation_is_peft_s_and_needs_no_cache_and_takes_any(tmp_path: Path) -> None:
    model: Any = LLAMA.build()
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("prefix_tuning", num_virtual_tokens=N), "self_attn")
    adapters.save("a", tmp_path / "a")
    theirs: Any = load_peft(tmp_path / "a", LLAMA)
    for own in (model, theirs.base_model):
        own.generation_config.eos_token_id = None
    x = ids()
    mask = torch.ones_like(x)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs.generate(input_ids=x, attention_mask=mask, **options)
    assert len(set(want[0, 7:].tolist())) > 1
    static = {"cache_implementation": "static", "disable_compile": True}
    for more in ({}, {"use_cache": False}, static):
        assert torch.equal(model.generate(x, attention_mask=mask, **options, **more), want)
    mask[0, :3] = 0
    for more in ({}, {"use_cache": False}, {"num_beams": 3}, static):
        both = model.generate(x, attention_mask=mask, **options, **more)
        for row, start in ((0, 3), (1, 0)):
            alone = model.generate(x[row : row + 1, start:], **options, **more)
            assert torch.equal(both[row, start:], alone[0]), more


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_cache_that_is_continued_stays_clean(implementation: str) -> None:
    model, adapters = adapted()
    model.set_attn_implementation(implementation)
    x, cache = ids(2, 9), DynamicCache()
    pieces = [logits(model, input_ids=x[:, a:b], past_key_values=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(model, input_ids=x), rtol=0, atol=1e-12)
    assert cache.get_seq_length() == 9
    adapters.activate(None)
    first = LLAMA.build().double()(input_ids=x).past_key_values.layers[0].keys
    torch.testing.assert_close(cache.layers[0].keys, first, rtol=0, atol=1e-12)  # of the first layer, before any prefix


def test_it_trains_with_gradient_checkpointing_as_without() -> None:
    grads = []
    for checkpointing in (False, True):
        model, _ = adapted()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        calls: list[int] = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *call, calls=calls: calls.append(1))
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert len(calls) == 1 + checkpointing
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert [name.rpartition(".")[2] for name in grads[0]] == ["prefix", "prefix"]
    for name, grad in grads[0].items():
        assert grad.abs().min() > 0
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-10, atol=1e-14)


def test_gradients_are_those_of_differences() -> None:
    model, _ = adapted()
    attention = model.model.layers[0].self_attn
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 64, generator=rng, dtype=torch.float64, requires_grad=True)
    angles = torch.arange(4, dtype=torch.float64)[:, None] * model.model.rotary_emb.inv_freq.repeat(2)
    positions = (angles.cos()[None], angles.sin()[None])

    def output(x: Tensor, prefix: Tensor) -> Tensor:
        call = {"hidden_states": x, "position_embeddings": positions}
        y: Tensor = functional_call(attention, {"adapters.a.prefix": prefix}, kwargs=call)[0]
        return y

    assert torch.autograd.gradcheck(output, (x, attention.adapters.a.prefix), fast_mode=True)


def test_it_starts_at_random_or_at_zero() -> None:
    model, adapters = adapted()
    prefixes = [layer.self_attn.adapters.a.prefix.detach() for layer in model.model.layers]
    assert [tuple(p.shape) for p in prefixes] == [(N, 2 * WIDTH)] * 2
    assert not torch.equal(*prefixes)
    assert float(prefixes[0].std()) == pytest.approx(1, abs=0.15)
    assert adapters.summary().trained == 2 * N * 2 * WIDTH
    zero, others = adapted(init_weights="zero")
    assert not any(layer.self_attn.adapters.a.prefix.any() for layer in zero.model.layers)
    with torch.no_grad():
        assert not torch.equal(zero(input_ids=ids()).logits, LLAMA.build().double()(input_ids=ids()).logits)
    others.activate(None)
    assert torch.equal(logits(zero, input_ids=ids()), logits(LLAMA.build().double(), input_ids=ids()))


@pytest.mark.parametrize("start", ["random", "zero"])
def test_a_projection_is_trained_and_dropped_when_it_is_saved(tmp_path: Path, start: str) -> None:
    model: Any = LLAMA.build()
    adapters = ah.adapt(model)
    options: dict[str, Any] = {"num_virtual_tokens": N, "init_weights": start}
    method = ah.method("prefix_tuning", **options, prefix_projection=True, encoder_hidden_size=24)
    adapters.add("a", method, "self_attn")
    own = N * WIDTH + (24 * WIDTH + 24) + (2 * WIDTH * 24 + 2 * WIDTH)
    assert adapters.summary().trained == 2 * own
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=1e-2), weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    prefixes = []
    for layer in model.model.layers:
        p = layer.self_attn.adapters.a
        prefixes.append((torch.tanh(p.E @ p.W1.T + p.b1) @ p.W2.T + p.b2).detach())
    adapters.save("a", tmp_path / "a")
    saved = load_file(tmp_path / "a/adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(saved, torch.cat(prefixes, dim=1), rtol=0, atol=1e-6)
    got = logits(model, input_ids=ids())
    torch.testing.assert_close(logits(load_peft(tmp_path / "a", LLAMA), input_ids=ids()), got, rtol=0, atol=1e-6)
    again = LLAMA.build()
    others = ah.adapt(again)
    others.load(tmp_path / "a", "a")
    torch.testing.assert_close(logits(again, input_ids=ids()), got, rtol=0, atol=1e-6)
    assert others.summary().trained == 2 * N * 2 * WIDTH
    value = ah.load(tmp_path / "a").single
    assert value is not None
    assert value.own.method == ah.method("prefix_tuning", **options)


# What is refused --------------------------------------------------------------------------------------------


def test_it_is_alone_at_its_layers_and_has_no_weight() -> None:
    model, adapters = adapted()
    one = logits(model, input_ids=ids())
    adapters.add("b", ah.method("prefix_tuning", num_virtual_tokens=2), "1.self_attn", seed=1)
    adapters.add("prompt", ah.method("prompt_tuning", num_virtual_tokens=2), "model")
    for which in ({"a": 1.0, "b": 1.0}, {"a": 0.5}, {"b": -1.0}):
        with pytest.raises(ah.ConfigError, match="wraps the call of the layer"):
            adapters.activate(which)
    with pytest.raises(ah.NotMergeable, match=r"^model.layers.0.self_attn: .*wraps the call"):
        adapters.merge()
    adapters.activate({"a": 1.0, "prompt": 1.0})
    assert logits(model, input_ids=ids()).shape == one.shape
    for name in ("a", "b", "prompt"):
        adapters.remove(name)
    assert torch.equal(logits(model, input_ids=ids()), logits(LLAMA.build().double(), input_ids=ids()))


def test_attention_that_is_not_known_is_refused() -> None:
    kind = registry().site_kind("attention")
    assert [name for name, module in LLAMA.build().named_modules() if kind.accepts(module)] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    method = ah.method("prefix_tuning")
    with pytest.raises(ah.ConfigError, match="no site kind knows what a GPT2Attention"):
        ah.adapt(GPT2.build()).add("a", method, "attn")
    for rope_type in ("dynamic", "longrope"):
        model = LLAMA.build()
        model.config.rope_parameters["rope_type"] = rope_type
        with pytest.raises(ah.ConfigError, match=rf"^model.layers.0.self_attn: .*rope_type '{rope_type}'"):
            ah.adapt(model).add("a", method, "self_attn")
    widths: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 11, "num_hidden_layers": 1}
    for window in (4, None):
        config = MistralConfig(**widths, num_attention_heads=2, num_key_value_heads=1, sliding_window=window)
        adapters = ah.adapt(MistralForCausalLM(config))
        if window:
            with pytest.raises(ah.ConfigError, match="sliding window"):
                adapters.add("a", method, "self_attn")
        else:
            adapters.add("a", method, "self_attn")
            assert adapters.summary().trained == 20 * 2 * 8
    other, _ = adapted()
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(ah.AdapterError, match=r"'flex_attention', which no prefix was tried with; call model.set_attn"):
        other.model.layers[0].self_attn(hidden_states=torch.ones(1, 2, 64).double(), position_embeddings=None)
    for option in ("num_virtual_tokens", "encoder_hidden_size"):
        with pytest.raises(ah.ConfigError, match=f"{option}=0 is not positive"):
            ah.method("prefix_tuning", **{option: 0})


@pytest.mark.parametrize(
    ("entries", "shape", "why"),
    [
        ({"num_virtual_tokens": 4}, None, "the prefix of a layer is .5, 64., and num_virtual_tokens is 4"),
        ({"num_layers": 3}, None, "which is not that of 3 side by side"),
        ({"num_layers": 0}, None, "num_layers is 0 and not a number from 1"),
        ({"num_layers": 128}, None, "the prefix of a layer is .5, 1."),
        ({"num_transformer_submodules": 2}, None, "an encoder and a decoder"),
        ({"init_weights": "ones"}, None, "init_weights='ones'"),
        ({}, (N, 4 * WIDTH, 1), "the prefix of a layer|side by side"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path, entries: dict[str, Any], shape: tuple[int, ...] | None, why: str
) -> None:
    def config() -> PrefixTuningConfig:
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)

    folder = write_peft(tmp_path / "theirs", LLAMA, config, seed=3)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    if shape is not None:
        save_file({"prompt_embeddings": torch.ones(shape)}, folder / "adapter_model.safetensors")
    with pytest.raises(ah.FileError, match=why):
        ah.load(folder)


def test_a_file_for_other_layers_is_refused(tmp_path: Path) -> None:
    _, adapters = adapted()
    adapters.save("a", tmp_path / "a")
    small = LlamaForCausalLM(LlamaConfig(**{**LLAMA.build().config.to_dict(), "num_hidden_layers": 1}))
    with pytest.raises(ah.UnknownName, match=r"'model.layers.1.self_attn', which the model does not have"):
        ah.adapt(small).load(tmp_path / "a", "a")
    load_peft(tmp_path / "a", LLAMA).save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ah.FileError, match=r"for 2 modules .* and the model has 1"):
        ah.adapt(small).load(tmp_path / "theirs", "a")
    with pytest.raises(ah.NotMergeable, match="no change of weights"):
        (0.5 * ah.load(tmp_path / "a")).save(tmp_path / "half")


def test_copies_and_pickles_have_the_prefix() -> None:
    model, _ = adapted()
    want = logits(model, input_ids=ids())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, input_ids=ids()), want)
        ah.adapt(twin).remove("a")
        assert torch.equal(logits(twin, input_ids=ids()), logits(LLAMA.build().double(), input_ids=ids()))
