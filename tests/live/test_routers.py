"""Routers: Arrow and PHATGOOSE against their formulas and PEFT's Arrow; trained, saved, copied, compiled, refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_composition import Net, close, inputs, net, output
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy import base_bits, llama, logits, tokens

import adapterhub_lite as ah
from adapterhub_lite import compose
from adapterhub_lite.routing import top

A, B, E = ah.use("a"), ah.use("b"), ah.use("e")
Weigh = Callable[[str, Tensor], Tensor]  # the layer's name and its input (…, width) to weights (…, ways)


def changes(model: Net, layer: str) -> dict[str, tuple[Tensor, Tensor | float]]:
    """ΔW (out, in) and the change of the bias, of the adapters with one there, as their papers write them."""
    own: Any = model.get_submodule(layer).adapters
    found: dict[str, tuple[Tensor, Tensor | float]] = {
        "a": (6 / 4 * own.a.B @ own.a.A, 0.0),
        "b": (5 / 3 * own.b.B @ own.b.A, 5 / 3 * own.b.bias),
    }
    if layer == "up":
        shared: Any = model.adapters.e  # type: ignore[union-attr]
        found["e"] = (own.e.b[:, None] * (shared.B[:20] @ (own.e.d[:, None] * shared.A[:, :12])), 0.0)
    return {name: (W.detach(), b) for name, (W, b) in found.items()}


def total(model: Net, layer: str, way: dict[str, float]) -> tuple[Tensor, Any]:
    own, W = changes(model, layer), model.get_submodule(layer).weight
    dW = sum((w * own[name][0] for name, w in way.items() if name in own), torch.zeros_like(W.detach()))
    return dW, sum(w * own[name][1] for name, w in way.items() if name in own)


@torch.no_grad()
def plainly(model: Net, ways: list[dict[str, float]], weigh: Weigh, x: Tensor) -> Tensor:
    """The net with each way's ΔW written out, weighed token by token."""

    def layer(name: str, x: Tensor) -> Tensor:
        module: Any = model.get_submodule(name)
        y, g = nn.functional.linear(x, module.weight, module.bias), weigh(name, x)
        for i, way in enumerate(ways):
            dW, b = total(model, name, way)
            y = y + g[..., i : i + 1] * (x @ dW.T + b)
        return y

    return layer("down", torch.tanh(layer("up", x)))


def softmax_of_largest(scores: Tensor, k: int) -> Tensor:
    found = torch.zeros_like(scores)
    for own, row in zip(scores.reshape(-1, scores.shape[-1]), found.view(-1, scores.shape[-1]), strict=True):
        best = own.argsort(descending=True)[:k]
        row[best] = own[best].exp() / own[best].exp().sum()
    return found


def arrow(model: Net, ways: list[dict[str, float]], k: int, temperature: float) -> Weigh:
    def weigh(layer: str, x: Tensor) -> Tensor:
        scores = []
        for way in ways:
            dW, _ = total(model, layer, way)
            v = torch.linalg.svd(dW).Vh[0] if dW.any() else dW[0]
            scores.append((x @ v).abs())
        return softmax_of_largest(torch.stack(scores, dim=-1) / temperature, k)

    return weigh


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.3), (4, 2.0)])
def test_arrow_is_its_formula_and_subtracts_general_knowledge_from_the_weight_change(
    k: int, temperature: float
) -> None:
    model, adapters = net()
    ways = [{"a": 1.0}, {"b": 1.0}, {"a": 0.7, "b": -0.5, "e": -0.5}, {"e": 1.0}]
    trees = ["a", B, 0.7 * A - ah.mean("b", "e"), E]  # "e" has nothing at the layer "down"
    route = adapters.add_router("r", ah.router("arrow", top_k=k, temperature=temperature), trees)
    adapters.activate(route)
    x = inputs()
    close(output(model, x), plainly(model, ways, arrow(model, ways, k, temperature), x))
    with adapters.using(ah.chain(0.5 * route, "a")):
        assert not torch.allclose(output(model, x), output(net()[0], x))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_arrow_is_pefts_where_that_has_converged(tmp_path: Path) -> None:
    from peft import ArrowConfig, create_arrow_model

    model = llama()
    adapters = ah.adapt(model)
    for i, name in enumerate("abc"):
        adapters.add(name, ah.method("lora", rank=2, alpha=6), ["q_proj", "down_proj"], seed=i)
    rng = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        if key.endswith((".A", ".B")):
            p.data = torch.randn(p.shape, generator=rng)
        if key.endswith(".B"):
            p.data *= torch.tensor([1.0, 0.2])  # singular values far apart: PEFT makes 15 steps of power iteration
    for name in "abc":
        adapters.save(name, tmp_path / name)
    adapters.activate(adapters.add_router("r", ah.router("arrow", top_k=2, temperature=0.7), ["a", "b", "c"]))
    mine = logits(model)
    config = ArrowConfig(top_k=2, router_temperature=0.7)
    peft = create_arrow_model(llama(), [str(tmp_path / name) for name in "abc"], config).eval()
    with torch.no_grad():
        theirs = peft(input_ids=tokens(2, 7)).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert (mine - logits(llama())).abs().max() > 0.1


def phatgoose(model: Net, k: int) -> Weigh:
    def standard(t: Tensor) -> Tensor:
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

    def weigh(layer: str, x: Tensor) -> Tensor:
        own: Any = model.get_submodule(layer).adapters.r
        V = torch.stack([own.v_0, own.v_1, own.v_2]).detach()
        return softmax_of_largest(standard(x) @ standard(V).T / x.shape[-1] ** 0.5, k)

    return weigh


def test_phatgoose_is_trained_one_gate_at_a_time_and_is_its_formula() -> None:
    model, adapters = net()
    route = adapters.add_router("r", ah.router("phatgoose", top_k=2), ["a", "b", {"a": 0.5, "e": 1}])
    before, x = base_bits(model), inputs()
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if ".adapters.r." not in key}
    goal = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(5)).double()
    for way in range(3):
        adapters.activate(route.alone(way), train="gates")
        learned = {key for key, p in model.named_parameters() if p.requires_grad}
        assert learned == {f"up.adapters.r.v_{way}", f"down.adapters.r.v_{way}"}
        if way == 0:  # σ(0)
            with adapters.using({"a": 0.5}):
                half = output(model, x)
            close(output(model, x), half)
            assert {key for key, p in model.named_parameters() if p.requires_grad} == learned
        optimizer = torch.optim.AdamW(adapters.param_groups(lr=0.1))
        assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 12 + 20
        losses = []
        for _ in range(5):
            loss = (model(x) - goal).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
    assert base_bits(model) == before
    assert all(torch.equal(frozen[key], p) for key, p in model.named_parameters() if key in frozen)
    own: Any = model.up.adapters
    with adapters.using(route.alone(0)), torch.no_grad():
        y = nn.functional.linear(x, model.up.weight, model.up.bias)
        close(model.up(x), y + torch.sigmoid(x @ own.r.v_0)[..., None] * (x @ changes(model, "up")["a"][0].T))
    adapters.activate(route, train="gates")
    ways = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "e": 1.0}]
    close(output(model, x), plainly(model, ways, phatgoose(model, 2), x))
    with pytest.raises(ah.ConfigError, match="nothing that is active can be trained"):
        adapters.param_groups(lr=1e-3)
    adapters.activate(route)
    assert {key.split(".")[2] for key, p in model.named_parameters() if p.requires_grad} == {"a", "b", "e"}


def test_by_sample_is_the_mean_over_tokens() -> None:
    model, adapters = net()
    ways = [{"a": 1.0}, {"b": 1.0}]
    route = adapters.add_router("r", ah.router("arrow", top_k=1), ["a", "b"], per="sample")
    by_token = arrow(model, ways, 1, 1.0)
    adapters.activate(route)
    x = inputs()
    close(output(model, x), plainly(model, ways, lambda layer, h: by_token(layer, h).mean(1, keepdim=True), x))


def routed(name: str) -> tuple[Net, ah.Adapters, ah.Route]:
    model, adapters = net()
    route = adapters.add_router("r", ah.router(name, top_k=2), ["a", B - 0.5 * A, E])
    for i, (key, p) in enumerate(model.named_parameters()):
        if ".v_" in key and name == "phatgoose":
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double()
    adapters.activate(route)
    return model, adapters, route


@pytest.mark.parametrize("name", ["arrow", "phatgoose"])
def test_routers_are_saved_copied_and_in_rows_of_a_batch(name: str, tmp_path: Path) -> None:
    model, adapters, route = routed(name)
    x, want = inputs(), output(model, inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, x), want)
    adapters.save_composition(tmp_path / "out")
    other, _ = net()
    others = ah.adapt(other)
    for own in others.names:
        others.remove(own)
    assert others.load_composition(tmp_path / "out") == route == others.composition
    assert torch.equal(output(other, x), want)
    others.save_composition(tmp_path / "again")
    for file in ("composition.json", "gates.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    with adapters.using([route, None, "a"]):
        rows = output(model, x)
    close(rows[0], want[0])
    with adapters.using("a"):
        close(rows[2], output(model, x)[2])
    for tree in (route.alone(1), 0.5 * route) if name == "phatgoose" else (0.5 * route,):
        assert compose.from_plain(compose.plain(tree), lambda own: type(ah.router(own))) == tree


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, for any Function
def test_a_router_is_compiled_whole() -> None:
    model, adapters, _ = routed("arrow")
    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        close(compiled(inputs()), output(model, inputs()))
    assert adapters.gates == {"r": ah.Gate("r", "token", "input", 3, ah.router("arrow", top_k=2))}


def test_an_adapter_that_adds_nothing_is_no_direction() -> None:
    model = Net()
    want = output(model, inputs(torch.float32))
    adapters = ah.adapt(model)
    for name in "ab":
        adapters.add(name, ah.method("lora", rank=2), "up")  # B is zero
    adapters.activate(adapters.add_router("r", ah.router("arrow"), ["a", "b"]))
    assert not any(p.any() for key, p in model.named_parameters() if ".v_" in key)
    assert torch.equal(output(model, inputs(torch.float32)), want)


def test_top_of_as_many_as_there_are_is_a_softmax() -> None:
    scores = torch.randn(4, 3)
    for k in (0, 3, 9):
        close(top(scores, k, 2.0), (scores / 2).softmax(-1))
    assert ((top(scores, 1, 2.0) == 1).sum(-1) == 1).all()


def test_what_is_refused() -> None:
    model, adapters, route = routed("arrow")
    adapters.add("p", ah.method("dora", rank=2), "all-linear")
    arrow, goose = ah.router("arrow"), ah.router("phatgoose")
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: adapters.merge(), "up: the gate 'r' weighs by the input"),
        (lambda: adapters.add_router("r", arrow, ["a"]), "there is a gate 'r' already"),
        (lambda: adapters.add_router("s", arrow, ["a", "z"]), "there is no adapter 'z'"),
        (lambda: adapters.add_router("s", arrow, []), "a gate of 0 outputs weighs nothing"),
        (lambda: adapters.add_router("s", "arrow", ["a"]), "is not a router with its options"),  # type: ignore[arg-type]
        (lambda: adapters.add_router("s", arrow, ["a", "c"]), "up: router 'arrow' looks at ΔW, and that of 'c'"),
        (lambda: adapters.add_router("s", arrow, ["p"]), "looks at ΔW, and that of 'p' .method 'dora'"),
        (lambda: adapters.add_router("s", arrow, [route]), "the gate 'r' weighs by the input"),
        (lambda: ah.router("arow"), "there is no router 'arow'; did you mean 'arrow'"),
        (lambda: ah.router("arrow", top_k=-1), "top_k=-1 is not at least 0"),
        (lambda: ah.router("arrow", temperature=0.0), "temperature=0.0 is not above 0"),
        (lambda: route.alone(3), "has no way 3"),
        (lambda: ah.Route(compose.gates(route)[0], (A, B)), "has 3 outputs for 2 ways"),
        (lambda: adapters.activate("a", train="none"), "is neither 'all' nor 'gates'"),  # type: ignore[arg-type]
        (lambda: ah.Gate("g", "token", "output", 2, arrow), "reads the layer's input"),
        (lambda: ah.Gate("g", way=0), "no way 0 that could be on alone"),
    ]
    for call, what in refusals:
        with pytest.raises(ah.AdapterError, match=what):
            call()
    assert adapters.gates.keys() == {"r"}
    with (
        adapters.using(route.alone(0)),
        pytest.raises(ah.ConfigError, match="'arrow' is not trained one way at a time"),
    ):
        output(model, inputs())

    class Bare(type(goose)):  # type: ignore[misc]
        def init(self, delta: Any, width: int, rng: Any) -> dict[str, Tensor]:
            return {}

    with pytest.raises(ah.PluginError, match="of router 'phatgoose' gives a way no tensor"):
        adapters.add_router("s", Bare(), ["a"])
    adapters.add_router("s", goose, ["a", "c", "p"])  # which looks at no weight change
    blocks = llama()
    others = ah.adapt(blocks)
    others.add("prefix", ah.method("prefix_tuning", num_virtual_tokens=3), "self_attn")
    one = others.add_router("s", goose, ["prefix"], per="sample")
    for tree in (one, one.alone(0)):
        with pytest.raises(ah.ConfigError, match="'prefix' wraps the call of the layer"):
            others.activate(tree)


STRANGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown": (lambda router: router.update(name="os.system"), "there is no router 'os.system'"),
    "no name": (lambda router: router.update(name=3), "a router is called 3"),
    "no options": (lambda router: router.pop("options"), "is no router"),
    "more": (lambda router: router.update(code="x"), "a router has no entry 'code'"),
    "an option more": (lambda router: router["options"].update(code="x"), "unknown option 'code'"),
    "an option of text": (lambda router: router["options"].update(top_k="2"), "top_k='2' is not an integer"),
    "another": (lambda router: router.update(name="phatgoose", options={"top_k": 1e9}), "is not an integer"),
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_strange_routers_in_files(strange: tuple[Callable[[dict[str, Any]], Any], str], tmp_path: Path) -> None:
    _, adapters, _ = routed("arrow")
    adapters.save_composition(tmp_path / "out")
    path = tmp_path / "out" / "composition.json"
    manifest = json.loads(path.read_text())
    change, what = strange
    change(manifest["composition"]["gate"]["router"])
    path.write_text(json.dumps(manifest))
    others = ah.adapt(Net().double())
    with pytest.raises(ah.FileError, match=what):
        others.load_composition(tmp_path / "out", any_base=True)
    assert others.names == ()
