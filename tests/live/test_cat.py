"""CAT: trained weights of its own at each layer, whatever the input; merged, compiled and saved as what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import LLAMA, load_peft
from peers import output as logits_of
from safetensors.torch import load_file, save_file
from test_composition import Net, close, formulas, inputs, net, output
from torch import Tensor, nn
from toy import base_bits

import adapterhub_lite as ah
from adapterhub_lite.live.folder import lower

A, B, E = ah.use("a"), ah.use("b"), ah.use("e")
Z = {"up": (0.4, -1.0, 0.9), "down": (2.0, 0.1, -0.3)}


def routed(ways: Any, softmax: bool = True) -> tuple[Net, ah.Adapters, ah.Route]:
    model, adapters = net()
    route = adapters.add_router("cat", ah.router("cat", softmax=softmax), ways)
    for layer, z in Z.items():
        own: Any = model.get_submodule(layer).adapters
        for i in range(len(ways)):
            own.cat.get_parameter(f"z_{i}").data.fill_(z[i])
    adapters.activate(route)
    return model, adapters, route


def alpha(layer: str, softmax: bool, count: int = 3) -> Tensor:
    z = torch.tensor(Z[layer][:count], dtype=torch.float64)
    return z.exp() / z.exp().sum() if softmax else 1 / count + z


@torch.no_grad()
def expected(model: Net, ways: list[str], softmax: bool, x: Tensor) -> Tensor:
    """Each layer by itself: y + Σ αᵢ (fᵢ(y) − y), fᵢ as its paper writes it; a way that is not there adds nothing."""

    def layer(name: str, x: Tensor) -> Tensor:
        module: Any = model.get_submodule(name)
        y, f = nn.functional.linear(x, module.weight, module.bias), formulas(model, name)
        g = alpha(name, softmax, len(ways))
        return y + sum(float(g[i]) * (f[own](x, y) - y) for i, own in enumerate(ways) if own in f)

    return layer("down", torch.tanh(layer("up", x)))


@pytest.mark.parametrize("softmax", [True, False])
def test_it_is_its_formula_and_merges_to_it(softmax: bool) -> None:
    model, adapters, _ = routed(["a", "c", "e"], softmax)  # LoRA, IA3 and VeRA, which is at one layer only
    x = inputs()
    want = expected(model, ["a", "c", "e"], softmax, x)
    close(output(model, x), want)
    before = base_bits(model)
    adapters.merge()
    close(output(model, x), want)
    assert base_bits(model) != before
    adapters.unmerge()
    assert base_bits(model) == before
    close(output(model, x), want)


def test_it_begins_at_the_mean_and_trains_its_weights_alone() -> None:
    model, adapters = net()
    x, goal = inputs(), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(5)).double()
    for softmax in (True, False):
        route = adapters.add_router("cat", ah.router("cat", softmax=softmax), ["a", "b", None])
        with adapters.using(ah.mean("a", "b", None)):
            mean = output(model, x)
        adapters.activate(route, train="gates")
        close(output(model, x), mean)
        assert {key for key, p in model.named_parameters() if p.requires_grad} == {
            f"{layer}.adapters.cat.z_{i}" for layer in ("up", "down") for i in range(3)
        }
        frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
        optimizer, losses = torch.optim.AdamW(adapters.param_groups(lr=0.1)), list[float]()
        for _ in range(6):
            loss = (model(x) - goal).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert all(torch.equal(frozen[key], p) for key, p in model.named_parameters() if key in frozen)
        weights = {tuple(part.fixed()) for part in (model.up.adapters.cat, model.down.adapters.cat)}  # type: ignore
        assert len(weights) == 2  # each layer has found its own
        assert all((abs(sum(w) - 1) < 1e-9) == softmax for w in weights)
        adapters.activate(None)
        adapters.remove("cat")


def test_it_goes_with_layers_that_no_gate_can_read() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Conv1d(3, 5, 2, bias=False)).double()
    adapters = ah.adapt(model)
    for i, name in enumerate("ab"):
        adapters.add(name, ah.method("lora", rank=2, init_weights="random"), "all", seed=i)
    route = adapters.add_router("cat", ah.router("cat"), ["a", "b"])
    part: Any = model[1].adapters.cat  # type: ignore[union-attr]
    part.z_0.data += 1.0
    adapters.activate(route)
    ids, x = torch.tensor([[0, 6, 3]]), torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        live = model[0](ids), model[1](x)
        p = 1 / (1 + torch.tensor(-1.0, dtype=torch.float64).exp())
        adapters.activate({"a": float(p), "b": 1 - float(p)})
        close(live[1], model[1](x))
        adapters.activate(ah.mean("a", "b"))
        close(live[0], model[0](ids))
    with pytest.raises(ah.ConfigError, match="a gate cannot read the input of a embedding"):
        adapters.add_router("arrow", ah.router("arrow"), ["a", "b"])


def test_it_is_saved_and_compiled_with_a_weight_for_each_layer(tmp_path: Path) -> None:
    model, adapters, route = routed(["a", B - 0.5 * A, E])
    tree = ah.chain(0.5 * route, "a")
    adapters.activate(tree)
    want = output(model, inputs())
    adapters.save_composition(tmp_path / "out")
    other, _ = net()
    others = ah.adapt(other)
    for own in others.names:
        others.remove(own)
    assert others.load_composition(tmp_path / "out") == tree
    assert torch.equal(output(other, inputs()), want)
    adapter, weights = lower(tmp_path / "out")
    up, down = alpha("up", True).tolist(), alpha("down", True).tolist()
    assert weights == {
        "a": pytest.approx({"up": 1 + up[0] / 2 - up[1] / 4, "down": 1 + down[0] / 2 - down[1] / 4}),
        "b": pytest.approx({"up": up[1] / 2, "down": down[1] / 2}),
        "e": pytest.approx({"up": up[2] / 2, "down": 0.0}),
    }
    adapter.save(tmp_path / "one", dtype=torch.float64)
    for own in others.names:
        others.remove(own)
    others.load(tmp_path / "one", "one")
    close(output(other, inputs()), want)


def test_one_lora_is_what_peft_computes_too(tmp_path: Path, adapter: Any) -> None:
    model: Any = LLAMA.build()  # type: ignore[operator]
    adapters: Any = ah.adapt(model)
    for i, name in enumerate("ab"):
        targets = LLAMA.targets if i else ["q_proj"]
        adapters.add(name, ah.method("lora", rank=3 + i, init_weights="random"), targets, seed=i)
    adapters.activate(adapters.add_router("cat", ah.router("cat"), ["a", "b"]))
    for i, (_, p) in enumerate(own for own in model.named_parameters() if ".cat." in own[0]):
        p.data += torch.randn(1, generator=torch.Generator().manual_seed(i))
    want = logits_of(model, LLAMA)
    adapters.save_composition(tmp_path / "composed")
    done = adapter("compile", tmp_path / "composed", "-o", tmp_path / "out", "--json")
    assert done.code == 0
    assert done.json["error"] < 1e-6
    assert len({w for own in done.json["adapters"] for _, w in own["weight"]}) > 3
    torch.testing.assert_close(logits_of(load_peft(tmp_path / "out", LLAMA), LLAMA), want, rtol=1e-4, atol=1e-5)


def test_other_routers_among_its_ways_and_it_among_theirs(tmp_path: Path) -> None:
    _, adapters, route = routed(["a", "b"])
    arrow = adapters.add_router("arrow", ah.router("arrow", top_k=1), [route, "e"])
    shown = adapters.model.up.adapters.arrow.v_0  # type: ignore[union-attr]
    a, b = (adapters.model.up.adapters.get_submodule(name) for name in "ab")  # type: ignore[union-attr]
    g = alpha("up", True, 2)
    dW = g[0] * 6 / 4 * a.B @ a.A + g[1] * 5 / 3 * b.B @ b.A  # type: ignore[operator]
    close(shown.abs(), torch.linalg.svd(dW.detach()).Vh[0].abs())  # type: ignore[union-attr]
    adapters.activate(ah.mean(route, arrow))
    adapters.save_composition(tmp_path / "out")
    for fold in (adapters.merge, lambda: lower(tmp_path / "out")):
        with pytest.raises(ah.NotMergeable, match="the gate 'arrow' weighs by the input"):
            fold()


STRANGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "one less": (lambda t: t.pop("up.cat.z_1"), "lacks the tensor 'up.cat.z_1'"),
    "one more": (lambda t: t.update({"up.cat.z_9": torch.ones(1)}), "a tensor 'up.cat.z_9', which is of no gate"),
    "too long": (lambda t: t.update({"up.cat.z_0": torch.ones(2)}), "'up.cat.z_0' is F32 .2., and does not fit"),
    "whole numbers": (lambda t: t.update({"up.cat.z_0": torch.ones(1).long()}), "is I64 .1., and does not fit"),
    "infinite": (lambda t: t.update({"up.cat.z_0": torch.tensor([float("inf")])}), "up.cat.z_0"),
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_strange_weights_are_not_compiled(strange: tuple[Callable[[Any], Any], str], tmp_path: Path) -> None:
    _, adapters, _ = routed(["a", "b"])
    adapters.save_composition(tmp_path / "out")
    path = tmp_path / "out" / "gates.safetensors"
    tensors = load_file(path)
    change, what = strange
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ah.FileError, match=what):
        lower(tmp_path / "out")
