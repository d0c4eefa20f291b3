"""Other weights in an adapter's place: the same memory, no compilation, the scales of both sides counted right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_composition import Net, close, inputs, output
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy import fill, llama, logits, tokens

import adapterhub_lite as ah

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 4, "alpha": 6}),
    "smaller": ("lora", {"rank": 2, "alpha": 9}),
    "rslora": ("lora", {"rank": 3, "alpha": 5, "rslora": True}),
    "patterns": ("lora", {"rank": 4, "alpha": 6, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 0.5}}),
    "vera": ("vera", {"rank": 4}),
    "pissa": ("lora", {"rank": 2, "alpha": 3, "init_weights": "pissa"}),
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def saved(out: Path, kind: str, targets: Any = TARGETS) -> Path:
    model = llama()
    adapters = ah.adapt(model)
    name, options = KINDS[kind]
    adapters.add("x", ah.method(name, **options), targets)
    fill(model, "x", list(KINDS).index(kind))
    adapters.save("x", out / kind)
    return out / kind


def loaded(folder: Path) -> torch.Tensor:
    model = llama()
    ah.adapt(model).load(folder, "x")
    return logits(model)


@pytest.mark.parametrize("reserve", [None, 7])
def test_nothing_is_compiled_anew_and_the_memory_stays(reserve: int | None, tmp_path: Path) -> None:
    folders = [saved(tmp_path, kind) for kind in KINDS]
    model = llama()
    adapters = ah.adapt(model)
    adapters.load(folders[0], "a", reserve=reserve)
    torch.testing.assert_close(logits(model), loaded(folders[0]), rtol=1e-4, atol=1e-5)
    own = {key: p for key, p in model.named_parameters() if ".adapters.a." in key}
    assert all(7 in p.shape for p in own.values()) or reserve is None
    pointers = {key: p.data_ptr() for key, p in own.items()}
    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=count)
    x = tokens(2, 7)
    with torch.no_grad():
        compiled(input_ids=x)
        first = count.frame_count
        for folder in [*folders[1:], folders[0]]:
            adapters.hotswap("a", folder)
            got, want = compiled(input_ids=x).logits, loaded(folder)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert torch.equal(logits(model), got)
    assert count.frame_count == first
    assert {key: p.data_ptr() for key, p in model.named_parameters() if key in own} == pointers
    adapters.save("a", tmp_path / "again")
    torch.testing.assert_close(loaded(tmp_path / "again"), loaded(folders[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_added_adapter_may_have_a_reserve_too(kind: str, tmp_path: Path) -> None:
    name, options = KINDS[kind]
    model, other = llama(), llama()
    adapters, others = ah.adapt(model), ah.adapt(other)
    targets = {"q_proj": {}, "v_proj": {"rank": 1}} if kind == "lora" else TARGETS
    adapters.add("a", ah.method(name, **options), targets, seed=3, reserve=9)
    others.add("a", ah.method(name, **options), targets, seed=3)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    own = {key: p for key, p in model.named_parameters() if ".adapters.a." in key}
    assert own
    assert all(9 in p.shape for p in own.values())
    pointers = {key: p.data_ptr() for key, p in own.items()}
    folder = saved(tmp_path, "smaller", ["q_proj", "v_proj"])
    adapters.hotswap("a", folder)
    torch.testing.assert_close(logits(model), loaded(folder), rtol=1e-4, atol=1e-5)
    assert {key: p.data_ptr() for key, p in model.named_parameters() if key in own} == pointers
    model(input_ids=tokens(2, 7)).logits.square().sum().backward()  # the rank of what is trained stays what it was
    assert all(p.grad is not None for p in own.values())
    assert all(not p.grad[2:].any() for key, p in own.items() if key.endswith(".A"))  # type: ignore[index]


def test_layers_that_the_new_one_leaves_alone_get_nothing(tmp_path: Path) -> None:
    model = llama()
    adapters = ah.adapt(model)
    adapters.load(saved(tmp_path, "lora"), "a")
    few = saved(tmp_path, "smaller", ["v_proj"])
    adapters.hotswap("a", few)
    torch.testing.assert_close(logits(model), loaded(few), rtol=1e-4, atol=1e-5)
    adapters.hotswap("a", 2.0 * ah.load(few))
    adapters.activate({"a": 0.5})
    torch.testing.assert_close(logits(model), loaded(few), rtol=1e-4, atol=1e-5)


def value(
    method: str, targets: Any = "all-linear", seed: int = 1, layers: nn.Module | None = None, **options: Any
) -> Any:
    """A saved adapter's stand-in: one on a copy of the net, as a value."""
    from adapterhub_lite.live.files import held

    model: Any = Net().double() if layers is None else layers
    adapters = ah.adapt(model)
    adapters.add("x", ah.method(method, **options), targets)
    for i, (key, p) in enumerate(model.named_parameters()):
        if ".x." in key:
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)).to(p)
    return ah.Adapter(((1.0, held(model, "x")),))


def test_biases_convolutions_and_other_methods() -> None:
    model = Net().double()
    adapters = ah.adapt(model)
    options: dict[str, dict[str, Any]] = {
        "lora": {"rank": 3, "alpha": 5, "lora_bias": True},
        "ia3": {},
        "dora": {"rank": 2},
    }
    for i, (method, own) in enumerate(options.items()):
        adapters.load(value(method, seed=i, **own), method, any_base=True)
        other = value(method, seed=100 + i, **own)
        adapters.hotswap(method, other, any_base=True)
        adapters.load(other, "same", any_base=True)
        adapters.activate(method)
        got = output(model, inputs())
        adapters.activate("same")
        close(got, output(model, inputs()))
        adapters.remove("same")
    conv = nn.Sequential(nn.Conv1d(3, 5, 2), nn.Embedding(7, 4)).double()
    others = ah.adapt(conv)

    def convolution(seed: int, rank: int) -> Any:
        return value(
            "lora", "all", seed, nn.Sequential(nn.Conv1d(3, 5, 2), nn.Embedding(7, 4)).double(), rank=rank, alpha=3
        )

    others.load(convolution(0, 2), "a", any_base=True, reserve=4)
    others.hotswap("a", convolution(9, 3), any_base=True)
    others.load(convolution(9, 3), "b", any_base=True)
    x, ids = torch.randn(2, 3, 6, dtype=torch.float64), torch.tensor([[0, 6, 3]])
    with torch.no_grad():
        a = conv[0](x), conv[1](ids)
        others.activate("b")
        b = conv[0](x), conv[1](ids)
    close(a[0], b[0])
    close(a[1], b[1])


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = Net().double()
    adapters = ah.adapt(model)
    adapters.load(value("lora", rank=3), "a", any_base=True)
    adapters.load(value("ia3"), "i", any_base=True)
    adapters.load(value("dora", rank=2), "d", any_base=True)
    adapters.load(value("lora", "up", rank=3), "u", any_base=True)
    adapters.load(value("lora", rank=3, alpha=0), "z", any_base=True)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    refusals: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: adapters.hotswap("a", value("lora", rank=4), any_base=True),
            "up: rank 4 does not fit into 3; begin with reserve=4",
        ),
        (lambda: adapters.hotswap("a", value("ia3"), any_base=True), "method 'ia3' has no low-rank ΔW of its own"),
        (lambda: adapters.hotswap("a", value("dora", rank=2), any_base=True), "method 'dora' has no low-rank ΔW"),
        (
            lambda: adapters.hotswap("a", value("lora", rank=2, lora_bias=True), any_base=True),
            "factors and a bias alone",
        ),
        (
            lambda: adapters.hotswap("u", value("lora", rank=3), any_base=True),
            "changes a layer 'down', and 'u' has nothing",
        ),
        (
            lambda: adapters.hotswap("i", value("lora", rank=3), any_base=True),
            "only one with the same options and shapes",
        ),
        (
            lambda: adapters.hotswap("d", value("dora", rank=3), any_base=True),
            "only one with the same options and shapes",
        ),
        (lambda: adapters.hotswap("i", value("ia3", "up"), any_base=True), "down: the new adapter has nothing here"),
        (lambda: adapters.hotswap("z", value("lora", rank=3), any_base=True), "with alpha 0 nothing can be put"),
        (lambda: adapters.hotswap("n", value("lora"), any_base=True), "there is no adapter 'n'"),
        (lambda: adapters.hotswap("a", value("lora", rank=3)), "was trained on other weights"),
        (lambda: adapters.load(value("lora", rank=3), "b", any_base=True, reserve=2), "rank 3 does not fit into 2"),
        (lambda: adapters.load(value("ia3"), "b", any_base=True, reserve=2), "has no low-rank ΔW of its own"),
        (lambda: adapters.add("b", ah.method("lora", rank=3), "up", reserve=2), "rank 3 does not fit into 2"),
        (lambda: adapters.add("b", ah.method("dora", rank=3), "up", reserve=4), "has no low-rank ΔW of its own"),
    ]
    for call, what in refusals:
        with pytest.raises(ah.AdapterError, match=what):
            call()
    adapters.activate("a")
    adapters.merge()
    with pytest.raises(ah.ConfigError, match="cannot swap an adapter while adapters are merged"):
        adapters.hotswap("a", value("lora", rank=3))
    adapters.unmerge()
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(before[key], p) for key, p in model.named_parameters())
