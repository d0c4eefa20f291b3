"""Compositions: what a tree of adapters computes, against the formula written out, and merges to; what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy import fill, llama, logits, tokens

import adapterhub_lite as ah
from adapterhub_lite import compose
from adapterhub_lite.registry import registry

F = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """12 -> 20 -> 8, called by keyword once; a bias at the first layer only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(input=torch.tanh(self.up(x)))
        return y


def net(dtype: torch.dtype = torch.float64) -> tuple[Net, ah.Adapters]:
    """Five adapters of three methods and several ranks, off their start; "e" is at one layer only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().to(dtype)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("lora", rank=4, alpha=6), "all-linear")
    adapters.add("b", ah.method("lora", rank=3, alpha=5, lora_bias=True), "all-linear", seed=1)
    adapters.add("c", ah.method("ia3"), "all-linear")
    adapters.add("d", ah.method("ia3", feedforward=("down",)), "down")
    adapters.add("e", ah.method("vera", rank=6), "up")
    with torch.no_grad():
        for name in "abcde":
            for i, p in enumerate(p for key, p in model.named_parameters() if f".adapters.{name}." in key):
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(97 * ord(name) + i))
    adapters.activate(None)
    return model, adapters


def formulas(model: Net, layer: str) -> dict[str, F]:
    """What each adapter makes of an output v at that layer, as its paper writes it."""
    module: Any = model.get_submodule(layer)
    p = {name: dict(part.named_parameters()) for name, part in module.adapters.named_children()}
    W, bias = module.weight, module.bias
    found: dict[str, F] = {
        "a": lambda x, v: v + 6 / 4 * x @ p["a"]["A"].T @ p["a"]["B"].T,
        "b": lambda x, v: v + 5 / 3 * (x @ p["b"]["A"].T @ p["b"]["B"].T + p["b"]["bias"]),
        "c": lambda x, v: p["c"]["l"].flatten() * v,
        "d": lambda x, v: v + (p["d"]["l"].flatten() * x) @ W.T - x @ W.T,
        "e": lambda x, v: v + p["e"]["b"] * ((p["e"]["d"] * (x @ A.T)) @ B.T),
    }
    assert bias is None or layer == "up"
    if layer == "up":
        A, B = model.adapters.e.A[:, :12], model.adapters.e.B[:20]
    return {name: f for name, f in found.items() if name in p}


def expected(model: Net, tree: ah.Use | Any, x: Tensor) -> Tensor:
    """The whole model's output for a tree, by the definitions."""

    def run(node: Any, f: Mapping[str, F], x: Tensor, v: Tensor) -> Tensor:
        if isinstance(node, ah.Use):
            return f[node.name](x, v) if node.name in f else v
        if isinstance(node, ah.Base):
            return v
        if isinstance(node, ah.Sum):
            return v + sum(w * (run(own, f, x, v) - v) for w, own in node.terms)  # type: ignore[operator]
        if isinstance(node, ah.Mean):
            return v + sum(run(own, f, x, v) - v for own in node.of) / len(node.of)
        for own in node.of:
            v = run(own, f, x, v)
        return v

    with torch.no_grad():
        h = torch.tanh(run(tree, formulas(model, "up"), x, x @ model.up.weight.T + model.up.bias))
        return run(tree, formulas(model, "down"), h, h @ model.down.weight.T)


def trees(names: str) -> st.SearchStrategy[Any]:
    weights = st.floats(-1.5, 1.5).map(lambda w: round(w, 2))

    def more(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        several = st.lists(inner, min_size=1, max_size=3).map(tuple)
        sums = st.lists(st.tuples(weights, inner), min_size=1, max_size=3).map(lambda terms: ah.Sum(tuple(terms)))
        return st.one_of(sums, several.map(ah.Mean), several.map(ah.Chain))

    return st.recursive(st.sampled_from(names).map(ah.Use) | st.just(ah.Base()), more, max_leaves=7)


quickly = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
        return y


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# What is computed -------------------------------------------------------------------------------------------


@quickly
@given(trees("abcde"))
def test_any_tree_computes_its_definition(tree: Any) -> None:
    model, adapters = net()
    x = inputs()
    with adapters.using(tree):
        close(output(model, x), expected(model, tree, x))
        assert adapters.composition == tree
    assert adapters.active == {}


@quickly
@given(trees("abe"))
def test_what_is_linear_in_the_weights_merges_to_what_it_computes(tree: Any) -> None:
    model, adapters = net()
    x = inputs()
    adapters.activate(tree)
    want, before = output(model, x), copy.deepcopy(adapters.base_state_dict())
    if not adapters.active:
        return
    adapters.merge()
    close(output(model, x), want)
    adapters.unmerge()
    assert all(torch.equal(before[key], t) for key, t in adapters.base_state_dict().items())
    assert torch.equal(output(model, x), want)


@quickly
@given(trees("abcde"))
def test_a_merge_is_right_or_refused_by_name(tree: Any) -> None:
    model, adapters = net()
    adapters.activate(tree)
    x = inputs()
    want = output(model, x)
    if not adapters.active:
        return
    refused = ""
    try:
        adapters.merge()
    except ah.NotMergeable as error:
        refused = str(error)
    assert not refused or ("'ia3'" in refused and "in a chain it comes behind another" in refused)
    assert not refused or any(isinstance(node, ah.Chain) for node in compose.nodes(tree))
    close(output(model, x), want)


def test_the_order_of_a_sum_changes_nothing_and_copies_are_one() -> None:
    model, adapters = net()
    x, a, b, c = inputs(), ah.use("a"), ah.use("b"), ah.use("c")
    outputs = []
    for tree in (0.5 * a - b / 4 + 2 * c, 2 * c + 0.5 * a - 0.25 * b, {"c": 2, "b": -0.25, "a": 0.5}):
        with adapters.using(tree):
            outputs.append(output(model, x))
    close(outputs[0], outputs[1])
    close(outputs[0], outputs[2])
    for one in ("a", "c", ah.chain("a", "c")):
        with adapters.using(one):
            want = output(model, x)
        for same in (ah.mean(one, one, one), ah.chain(one), 1 * ah.mean(one), ah.chain(None, one, ah.Base())):
            with adapters.using(same):
                close(output(model, x), want)
    with adapters.using(ah.mean("a", None)), torch.no_grad():
        half = output(model, x)
    with adapters.using({"a": 0.5}):
        close(half, output(model, x))


def test_a_chain_is_no_sum_where_an_adapter_looks_at_what_it_is_given() -> None:
    model, adapters = net()
    x = inputs()
    found = {}
    for name, tree in {"ac": ah.chain("a", "c"), "ca": ah.chain("c", "a"), "sum": {"a": 1, "c": 1}}.items():
        with adapters.using(tree):
            found[name] = output(model, x)
    assert all((found[p] - found[q]).abs().max() > 1e-2 for p, q in (("ac", "ca"), ("ac", "sum")))
    close(found["ca"], found["sum"])  # a LoRA adds the same, whatever it is given


def test_methods_of_all_kinds_of_layer_mix_on_one_model() -> None:
    model = llama(torch.float64)
    adapters = ah.adapt(model)
    adapters.add("lora", ah.method("lora", rank=4), ["q_proj", "down_proj"])
    adapters.add("ia3", ah.method("ia3", feedforward=("down_proj",)), ["k_proj", "down_proj"])
    adapters.add("bottleneck", ah.method("bottleneck", bottleneck_size=6), "mlp")
    adapters.add("prefix", ah.method("prefix_tuning", num_virtual_tokens=3), "self_attn")
    adapters.add("ln", ah.method("ln_tuning"), "all")
    for seed, name in enumerate(adapters.names):
        fill(model, name, seed)
    adapters.activate(None)
    off = logits(model)
    mixed = ah.chain(0.7 * ah.use("lora") + 0.3 * ah.use("ia3"), "bottleneck") + ah.use("prefix") + 0.5 * ah.use("ln")
    adapters.activate(mixed)
    on = logits(model)
    assert adapters.active == dict.fromkeys(adapters.names, 1.0)
    for name in adapters.names:
        without = compose.reduced(mixed, [other for other in adapters.names if other != name])
        with adapters.using(without):
            assert (logits(model) - on).abs().max() > 1e-4
    loss = model(input_ids=tokens(2, 7), labels=tokens(2, 7)).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ah.NotMergeable):
        adapters.merge()
    adapters.activate(None)
    assert torch.equal(logits(model), off)
    for name in adapters.names:
        adapters.remove(name)
    assert torch.equal(logits(model), logits(llama(torch.float64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    tree = ah.chain(0.7 * ah.use("a") - 0.4 * ah.use("b"), ah.mean("c", "e"))
    model, adapters = net(dtype)
    adapters.activate(tree)
    x = inputs(dtype)
    got = output(model, x)
    assert got.dtype == dtype
    close(got.double(), expected(copy.deepcopy(model).double(), tree, x.double()), 2e-2)


def test_autocast_and_checkpointing() -> None:
    tree = ah.chain(0.7 * ah.use("a") - 0.4 * ah.use("b"), "c")
    model, adapters = net(torch.float32)
    adapters.activate(tree)
    x = inputs(torch.float32)
    want = output(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        close(output(model, x).float(), want, 5e-2)
    model(x).square().sum().backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    again: Any = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)  # type: ignore[attr-defined]
    again.square().sum().backward()
    assert plain.keys() == {key for key, p in model.named_parameters() if p.requires_grad} != set()
    assert all(torch.equal(plain[key], p.grad) for key, p in model.named_parameters() if p.grad is not None)


def test_gradients_are_the_derivatives_and_go_to_what_is_on() -> None:
    model, adapters = net()
    adapters.activate(ah.chain(0.7 * ah.use("a") + ah.mean("b", "c"), "d"))
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key.split(".adapters.")[1][0] for key in trained} == set("abcd")
    x = inputs()

    def loss(*tensors: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, dict(zip(trained, tensors, strict=True)), (x,))
        return y.square().mean()

    torch.autograd.gradcheck(loss, tuple(trained.values()), fast_mode=True)
    ids = sorted(id(p) for group in adapters.param_groups(1e-3) for p in group["params"])
    assert ids == sorted(id(p) for p in trained.values())


def test_copies_and_pickles_keep_the_tree() -> None:
    model, adapters = net()
    tree = ah.chain(0.7 * ah.use("a") - ah.use("b"), "c")
    adapters.activate(tree)
    want = output(model, inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, inputs()), want)
        assert ah.adapt(twin).composition == tree
        ah.adapt(twin).activate("e")
    assert torch.equal(output(model, inputs()), want)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, for any Function
def test_switching_among_compositions_compiles_nothing_anew() -> None:
    model, adapters = net(torch.float32)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    x = inputs(torch.float32)
    known = ["a", None, {"a": 0.5, "b": 0.5}, ah.chain("a", "c"), ah.chain("c", 0.3 * ah.use("a") + ah.use("b")), "d"]
    with torch.no_grad():
        for turn in range(2):
            for tree in known:
                adapters.activate(tree)
                close(compiled(x), model(x), 1e-5)
            if turn == 0:
                first = count.frame_count
    assert count.frame_count == first
    assert first <= len(known)


# What is refused --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Anew(ah.Method):
    """Computes the layer anew with another bias (https://arxiv.org/abs/2106.10199)."""

    name = "anew"
    paper = "https://arxiv.org/abs/2106.10199"
    site_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    takes_any_output = False

    def init(self, site: ah.Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {"b": nn.Parameter(torch.ones(site.shape[0]))}

    def forward(self, p: ah.Params, x: Tensor, y: Tensor, site: ah.Site) -> Tensor:
        return site.call((x,), {}) + p["b"]


def test_what_cannot_be_composed_is_refused_when_it_is_activated() -> None:
    model, adapters = net()
    adapters.add("anew", Anew(), "up")
    adapters.activate(ah.chain("anew", "a"))
    before = output(model, inputs())
    for tree, what in (
        (ah.use("z") + ah.use("a"), "there is no adapter 'z' on the model; known"),
        (ah.chain("a", 0.5 * ah.use("anew")), "up: 'anew' computes the layer anew .* in a chain nothing of those"),
        (ah.Gate("g") * ah.use("a"), "there is no gate 'g' on the model"),
        (0.5, "is no composition"),
        ({"a": float("nan")}, "the weight nan of 'a' is not a finite number"),
    ):
        with pytest.raises(ah.AdapterError, match=what):
            adapters.activate(tree)  # type: ignore[arg-type]
        assert torch.equal(output(model, inputs()), before)
    deep: Any = ah.use("a")
    for _ in range(120):
        deep = ah.chain(deep)
    with pytest.raises(ah.ConfigError, match="levels deep"):
        adapters.activate(deep)


def test_an_adapter_that_wraps_the_call_is_alone_wherever_it_is() -> None:
    model = llama()
    adapters = ah.adapt(model)
    adapters.add("prefix", ah.method("prefix_tuning", num_virtual_tokens=3), "self_attn")
    adapters.add("other", ah.method("prefix_tuning", num_virtual_tokens=2), "self_attn")
    adapters.add("lora", ah.method("lora"), "q_proj")
    alone = ah.chain("prefix", "lora"), 1 * ah.use("prefix") + 0.5 * ah.use("lora"), ah.mean(ah.chain("lora"), "lora")
    for tree in alone:
        adapters.activate(tree)
    for tree, what in (
        (ah.chain("prefix", "other"), "on beside 'other'"),
        (0.5 * ah.use("prefix") + ah.use("lora"), "have the weight 0.5"),
        (ah.mean("prefix", "lora"), "have the weight 0.5"),
    ):
        with pytest.raises(ah.ConfigError, match=f"layers.0.self_attn: 'prefix' wraps the call .* {what}"):
            adapters.activate(tree)


def test_removing_an_adapter_takes_it_out_of_what_is_on() -> None:
    model, adapters = net()
    adapters.activate(ah.chain("a", ah.mean("b", "c")))
    adapters.remove("b")
    close(output(model, inputs()), expected(model, ah.chain("a", 0.5 * ah.use("c")), inputs()))
    with adapters.using("d"):
        adapters.remove("c")
    assert adapters.active == {"a": 1.0}


# The tree itself --------------------------------------------------------------------------------------------


@quickly
@given(trees("abcde"))
def test_a_tree_survives_json_and_means_the_same_reduced(tree: Any) -> None:
    assert compose.from_plain(json.loads(json.dumps(compose.plain(tree))), registry().router) == tree
    here = [name for name in compose.names(tree) if name in "ace"]
    smaller = compose.reduced(tree, here)
    assert set(compose.names(smaller)) <= set(here)
    sums, small = compose.weights(tree), compose.weights(smaller)
    if sums is not None and small is not None:
        left = {name: w for name, w in sums.items() if name in here and w}
        assert small == pytest.approx({name: left[name] for name in small})


def test_routes_and_gates_survive_json() -> None:
    gate = ah.Gate("g", per="token", outputs=2)
    tree = ah.route(gate, "a", ah.Gate("h", reads="output") * (ah.use("b") - ah.use("c")))
    assert compose.from_plain(json.loads(json.dumps(compose.plain(tree))), registry().router) == tree
    assert compose.gates(tree) == (gate, ah.Gate("h", reads="output"))
    assert compose.names(tree) == ("a", "b", "c")


def test_operators() -> None:
    a, b = ah.use("a"), ah.use("b")
    assert 0.7 * a + b * 0.3 == ah.Sum(((0.7, a), (0.3, b)))
    assert 2 * (a - b) == ah.Sum(((2, a), (-2, b)))
    assert sum([a, b]) == a + b
    assert -a / 2 == ah.Sum(((-0.5, a),))
    g = ah.Gate("g")
    assert 0.5 * (g * a) == ah.Sum(((0.5, ah.Sum(((g, a),))),))
    assert ah.mean("a", {"b": 2}) == ah.Mean((a, 2 * b))
    for wrong in (lambda: a + 1, lambda: a * "x", lambda: True * a, lambda: 1 + a, lambda: a * b):
        with pytest.raises(TypeError):
            wrong()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: ah.Sum(()), "a Sum of nothing"),
        (lambda: ah.mean(), "a Mean of nothing"),
        (lambda: ah.chain(), "a Chain of nothing"),
        (lambda: ah.Sum((("a", 1),)), "is no composition"),
        (lambda: ah.Sum((0.5, ah.use("a"))), "pairs of a weight and a node"),
        (lambda: float("inf") * ah.use("a"), "not a finite number"),
        (lambda: ah.use("a") / 0, "divided by zero"),
        (lambda: ah.use(3), "name=3 is not a string"),
        (lambda: ah.Gate("g", outputs=2) * ah.use("a"), "has 2 outputs, and a term has one weight"),
        (lambda: ah.route(ah.Gate("g"), "a", "b"), "has 1 outputs for 2 ways"),
        (lambda: ah.Gate("g", outputs=0), "weighs nothing"),
        (lambda: ah.Gate("g", per="word"), "per='word' is not one of"),
        (lambda: ah.Gate("g") * "a", "is no composition"),
    ],
)
def test_a_tree_that_means_nothing_cannot_be_built(make: Callable[[], object], what: str) -> None:
    with pytest.raises(ah.ConfigError, match=what):
        make()


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "a",
        {},
        {"kind": "use"},
        {"kind": "use", "name": 3},
        {"kind": "use", "name": "a", "more": 1},
        {"kind": ["use"], "name": "a"},
        {"kind": "import", "name": "os"},
        {"kind": "sum", "terms": {}},
        {"kind": "sum", "terms": []},
        {"kind": "sum", "terms": [[0.5, {"kind": "use", "name": "a"}]]},
        {"kind": "sum", "terms": [{"weight": "1", "of": {"kind": "base"}}]},
        {"kind": "sum", "terms": [{"weight": True, "of": {"kind": "base"}}]},
        {"kind": "sum", "terms": [{"weight": float("nan"), "of": {"kind": "base"}}]},
        {"kind": "sum", "terms": [{"weight": 10**400, "of": {"kind": "base"}}]},
        {"kind": "sum", "terms": [{"weight": {"name": "g"}, "of": {"kind": "base"}}]},
        {"kind": "mean", "of": 3},
        {"kind": "chain", "of": [None]},
        {"kind": "route", "gate": None, "of": [{"kind": "base"}]},
        {"kind": "route", "gate": {"name": "g", "per": "sample", "reads": "input", "outputs": 1.0}, "of": [{}]},
    ],
)
def test_json_that_is_no_tree_is_refused(value: Any) -> None:
    with pytest.raises(ah.ConfigError):
        compose.from_plain(value, registry().router)


def test_json_without_end_is_refused() -> None:
    value: dict[str, Any] = {"kind": "base"}
    for _ in range(500):
        value = {"kind": "chain", "of": [value]}
    with pytest.raises(ah.ConfigError, match="levels deep"):
        compose.from_plain(value, registry().router)
