"""Generation, compilation, autocast, and saving the base alone, with every method."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from toy import adapted, base_bits, bits, every_method, fill, llama, logits, merges, targets, tokens
from transformers import LlamaForCausalLM

import adapterhub_lite as ah


def filled(method: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, ah.Adapters]:
    model, adapters = adapted(method, dtype)
    fill(model)
    return model, adapters


@every_method
def test_generation_with_a_cache_is_that_without_and_that_of_the_merged_model(method: Any) -> None:
    model, adapters = filled(method, torch.float64)
    x = tokens(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generated(**more: Any) -> Tensor:
        found: Tensor = model.generate(input_ids=x, attention_mask=torch.ones_like(x), **options, **more)
        return found

    cached = generated(use_cache=True)
    assert cached.shape == (2, 17)
    assert torch.equal(cached, generated(use_cache=False))
    with adapters.inference():
        assert torch.equal(cached, generated(use_cache=True))
    if merges(method):
        adapters.merge()
        assert torch.equal(cached, generated(use_cache=True))
        adapters.unmerge()
    adapters.activate(None)
    assert not torch.equal(cached, generated(use_cache=True))


@every_method
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, for any Function
def test_switching_among_adapters_compiles_nothing_anew(method: Any) -> None:
    model, adapters = filled(method)
    name, options = method
    for seed, other in enumerate("bcdef", 1):
        adapters.add(other, ah.method(name, **options), targets(method), seed=seed)
        fill(model, other, seed)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    x = tokens(2, 7)
    with torch.no_grad():
        for turn in range(2):
            for own in "abcdef":
                adapters.activate(own)
                torch.testing.assert_close(compiled(input_ids=x).logits, logits(model), rtol=1e-4, atol=1e-5)
            if turn == 0:
                first = count.frame_count
    assert count.frame_count == first
    assert first <= 2


@every_method
def test_the_base_is_saved_alone_and_the_merged_model_too(tmp_path: Path, method: Any) -> None:
    model, adapters = filled(method)
    want = logits(model)
    model.save_pretrained(tmp_path / "base", state_dict=adapters.base_state_dict())
    expected_of = {"base": logits(llama())}
    if merges(method):
        adapters.merge()
        expected_of["merged"] = logits(model)
        model.save_pretrained(tmp_path / "merged", state_dict=adapters.base_state_dict())
        adapters.unmerge()
        torch.testing.assert_close(expected_of["merged"], want, rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(ah.NotMergeable):
            adapters.merge()
    for name, expected in expected_of.items():
        again, info = LlamaForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
        assert torch.equal(logits(again.eval()), expected)
    assert base_bits(model) == bits(llama())


@every_method
def test_copies_and_pickles_compute_the_same_and_stand_alone(method: Any) -> None:
    model, adapters = filled(method)
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        ah.adapt(twin).activate(None)
        assert torch.equal(logits(twin), logits(llama()))
        ah.adapt(twin).remove("a")
        assert bits(twin) == bits(llama())
    assert torch.equal(logits(model), want)
    assert adapters.active == {"a": 1.0}


@every_method
def test_autocast_and_a_half_base_are_near_the_exact_output(method: Any) -> None:
    model, _ = filled(method)
    want = logits(model)
    size = float((want - logits(llama())).abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model).float() - want).abs().max() < 0.15 * size + 0.1
    half, adapters = adapted(method, torch.bfloat16)
    fill(half)
    assert {p.dtype for key, p in half.named_parameters() if ".adapters.a." in key} <= {torch.float32, torch.int64}
    loss = half(input_ids=tokens(2, 7), labels=tokens(2, 7)).loss
    loss.backward()
    grads = [p.grad for group in adapters.param_groups(1e-3) for p in group["params"]]
    assert all(grad is not None and grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads)
