"""Bottleneck adapters against their formulas written out in float64, on blocks of all sorts and in real models."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub_lite_plugins.methods.bottleneck import Bottleneck
from peers import BERT, LLAMA
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel

import adapterhub_lite as ah
from adapterhub_lite.source import stored
from adapterhub_lite.testing import Check, parametrize_checks
from adapterhub_lite.testing.zoo import EXAMPLES, Block, Example, cells

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: (h + h.abs()) / 2,
    "gelu": lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2,
    "gelu_new": lambda h: h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2,
    "swish": lambda h: h / (1 + torch.exp(-h)),
    "tanh": lambda h: (torch.exp(h) - torch.exp(-h)) / (torch.exp(h) + torch.exp(-h)),
    "leakyrelu": lambda h: torch.where(h > 0, h, 0.01 * h),
}
VARIANTS: list[dict[str, Any]] = [
    *({"non_linearity": name} for name in ACTIVATIONS),
    {"placement": "parallel"},
    {"placement": "parallel", "scaling": 4.0, "bottleneck_size": 5, "ln_before": True},
    {"placement": "parallel", "scaling": "learned", "ln_after": True},
    {"scaling": "channel", "ln_before": True, "ln_after": True, "init_weights": "normal"},
    {"scaling": -0.5, "reduction_factor": 2.5, "init_weights": "truncated_normal", "std": 0.1},
]
in_words = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(f"{v}" for v in o.values()))


def norm(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def net(p: Any, h: Tensor, method: Bottleneck) -> Tensor:
    """What the adapter adds, for the hidden states that it reads."""
    if method.ln_before:
        h = norm(h, p["norm_before"], p["norm_before_bias"])
    h = ACTIVATIONS[method.non_linearity](h @ p["down"].T + p["down_bias"])
    u = (h @ p["up"].T + p["up_bias"]) * (p["scale"] if isinstance(method.scaling, str) else method.scaling)
    return norm(u, p["norm_after"], p["norm_after_bias"]) if method.ln_after else u


def fill(model: nn.Module, name: str = "a", seed: int = 0) -> None:
    """Trained values: no tensor is zero or one."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".adapters.{name}." in key:
                p.add_(0.3 * torch.randn(p.shape, generator=rng).to(p))


def params(model: nn.Module, site: str, name: str = "a") -> dict[str, Tensor]:
    """The adapter's tensors at a module."""
    return dict(model.get_submodule(f"{site}.adapters.{name}").named_parameters())


def adapted(model: nn.Module, method: ah.Method, targets: Any, **where: Any) -> ah.Adapters:
    adapters = ah.adapt(model)
    adapters.add("a", method, targets, **where)
    fill(model)
    return adapters


def close(got: Tensor, want: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# The formulas -------------------------------------------------------------------------------------------


@in_words
def test_forward_is_the_formula_for_tensors_and_tuples(options: dict[str, Any]) -> None:
    method = Bottleneck(**{"reduction_factor": 4, **options})
    made = cells(method, EXAMPLES["block"])
    widths = [(cell.x.shape[-1], cell.y.shape[-1]) for cell in made.values()]
    assert widths == [(12, 40), (40, 36), (36, 56)]
    for cell in made.values():
        seen = cell.x if method.placement == "parallel" else cell.y
        want = cell.y + net(cell.p, seen, method)
        assert (want - cell.y).abs().max() > 1e-2
        close(cell.forward(), want)
        width = seen.shape[-1]
        m = method.bottleneck_size or int(width / method.reduction_factor)
        assert cell.p["down"].shape == (m, width)
        assert sum(t.numel() for t in cell.own.values()) == (
            m * width + m + cell.y.shape[-1] * (m + 1)
            + {"learned": 1, "channel": cell.y.shape[-1]}.get(str(method.scaling), 0)
            + 2 * width * method.ln_before + 2 * cell.y.shape[-1] * method.ln_after
        )  # fmt: skip


@in_words
def test_a_block_that_gives_a_tuple_gives_the_rest_as_it_is(options: dict[str, Any]) -> None:
    block = Block(12, 7, 20, more=True).double()
    model = nn.ModuleDict({"block": block})
    x = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, inside = block(x)
    method = Bottleneck(**{"reduction_factor": 4, **options})
    adapted(model, method, "block")
    seen = x if method.placement == "parallel" else y
    want = y + net(params(model, "block"), seen, method)
    for got, rest in (block(x), block(hidden=x)):  # the input may come by keyword
        close(got, want)
        assert torch.equal(rest, inside)


def test_how_it_begins() -> None:
    site = EXAMPLES["block"].sites(EXAMPLES["block"].model())["third"]

    def start(**options: Any) -> dict[str, Tensor]:
        method = Bottleneck(bottleneck_size=400, **options)
        return {key: t.detach() for key, t in method.init(site, torch.Generator().manual_seed(0)).items()}

    lora = start(placement="parallel", scaling="learned", ln_before=True)
    bound = 1 / math.sqrt(36)  # what it reads
    assert lora["down"].shape == (400, 36)
    assert 0.99 * bound < lora["down"].abs().max() <= bound
    assert lora["down"].std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all((lora[name] == 0).all() for name in ("up", "down_bias", "up_bias", "norm_before_bias"))
    assert all((lora[name] == 1).all() for name in ("scale", "norm_before"))
    for cut, spread in (("normal", 1.0), ("truncated_normal", 0.8796)):
        own = start(init_weights=cut, std=0.05)
        for name in ("down", "up"):
            assert own[name].std() == pytest.approx(0.05 * spread, rel=0.02)
            assert (own[name].abs().max() <= 0.1) == (cut == "truncated_normal")
        assert not own["down_bias"].any()
        assert not own["up_bias"].any()
        assert not Bottleneck(init_weights=cut).identity_at_init


# In real models -------------------------------------------------------------------------------------------


def bert() -> Any:
    model: Any = BERT.build()
    return model.double()


def by_hand(model: Any, ids: Tensor, attention: Any, feedforward: Any) -> Tensor:
    """BERT from its weights: `attention` and `feedforward` give the norm's output, for a layer, h and the residual."""
    x = model.embeddings(ids)
    for i, layer in enumerate(model.encoder.layer):
        context = layer.attention.self(x)[0]
        h = F.linear(context, layer.attention.output.dense.weight, layer.attention.output.dense.bias)
        a = attention(i, h, x)
        inner = layer.intermediate(a)
        h = F.linear(inner, layer.output.dense.weight, layer.output.dense.bias)
        x = feedforward(i, h, a)
    return x  # type: ignore[no-any-return]


def ln(module: nn.LayerNorm, z: Tensor) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], module.weight, module.bias, module.eps)


IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))


def test_houlsby_on_bert() -> None:
    model = bert()
    method = Bottleneck.houlsby(reduction_factor=4)
    base = model(IDS).last_hidden_state
    adapted(model, method, "output.dense")

    def sublayer(path: str) -> Callable[[int, Tensor, Tensor], Tensor]:
        def after(i: int, h: Tensor, residual: Tensor) -> Tensor:
            where = f"encoder.layer.{i}.{path}"
            h = h + net(params(model, f"{where}.dense"), h, method)
            return ln(model.get_submodule(f"{where}.LayerNorm"), h + residual)

        return after

    got = model(IDS).last_hidden_state
    assert (got - base).abs().max() > 1e-2
    close(got, by_hand(model, IDS, sublayer("attention.output"), sublayer("output")))


def test_pfeiffer_on_bert() -> None:
    model = bert()
    method = Bottleneck.pfeiffer(reduction_factor=4)
    base = model(IDS).last_hidden_state
    adapters = adapted(model, method, "output.LayerNorm", exclude="attention")
    assert adapters.summary().layers == len(model.encoder.layer)

    def attention(i: int, h: Tensor, residual: Tensor) -> Tensor:
        return ln(model.encoder.layer[i].attention.output.LayerNorm, h + residual)

    def feedforward(i: int, f: Tensor, x: Tensor) -> Tensor:
        where = f"encoder.layer.{i}.output.LayerNorm"
        own = model.get_submodule(where)
        return ln(own, f + net(params(model, where), ln(own, f + x), method) + x)

    got = model(IDS).last_hidden_state
    assert (got - base).abs().max() > 1e-2
    close(got, by_hand(model, IDS, attention, feedforward))


class Beside(nn.Module):
    """A block with a bottleneck, built by hand."""

    def __init__(self, block: nn.Module, p: dict[str, Tensor], method: Bottleneck) -> None:
        super().__init__()
        self.block, self.p, self.method = block, p, method

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        y: Tensor = self.block(x, **more)
        return y + net(self.p, x if self.method.placement == "parallel" else y, self.method)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        (Bottleneck.parallel(bottleneck_size=6), "mlp"),
        (Bottleneck(reduction_factor=4, non_linearity="swish"), "layers.*"),
    ],
    ids=["parallel", "sequential"],
)
def test_llama(method: Bottleneck, target: str) -> None:
    model: Any = LLAMA.build().double()
    by_hand = copy.deepcopy(model)
    base = model(IDS).logits
    targets = [f"layers.{i}" for i in range(len(model.model.layers))] if target == "layers.*" else target
    adapted(model, method, targets)
    for i, layer in enumerate(by_hand.model.layers):
        if target == "mlp":
            layer.mlp = Beside(layer.mlp, params(model, f"model.layers.{i}.mlp"), method)
        else:
            by_hand.model.layers[i] = Beside(layer, params(model, f"model.layers.{i}"), method)
    got = model(IDS).logits
    assert (got - base).abs().max() > 1e-2
    close(got, by_hand(IDS).logits)


PLACES: list[Any] = [
    pytest.param(BERT, Bottleneck.houlsby(reduction_factor=4), "output.dense", id="houlsby"),
    pytest.param(BERT, Bottleneck.pfeiffer(reduction_factor=4), "output.LayerNorm", id="pfeiffer"),
    pytest.param(LLAMA, Bottleneck.parallel(bottleneck_size=6), "mlp", id="parallel"),
    pytest.param(LLAMA, Bottleneck(placement="parallel", scaling="learned"), ["self_attn", "mlp"], id="attention"),
    pytest.param(LLAMA, Bottleneck(reduction_factor=4, ln_before=True), ["layers.0", "layers.1"], id="layers"),
]
everywhere = pytest.mark.parametrize(("peer", "method", "targets"), PLACES)


def out(model: nn.Module, **options: Any) -> Tensor:
    made = model(IDS, **options)
    y: Tensor = made.last_hidden_state if isinstance(model, BertModel) else made.logits
    return y


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in model.state_dict().items() if "adapters" not in key.split(".")}


def untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = bits(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(t, before[key]) for key, t in now.items())


@everywhere
def test_it_trains_and_the_base_does_not(peer: Any, method: Bottleneck, targets: Any) -> None:
    model: Any = peer.build()
    before, base = bits(model), out(model).detach()
    teacher: Any = peer.build()
    adapted(teacher, method, targets)
    goal = out(teacher).detach()
    adapters = ah.adapt(model)
    adapters.add("a", method, targets)
    if method.identity_at_init:
        assert torch.equal(out(model), base)
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=3e-3))
    losses = []
    for _ in range(8):
        loss = (out(model) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0], losses
    untouched(model, before)
    adapters.activate(None)
    assert torch.equal(out(model), base)
    adapters.remove("a")
    assert torch.equal(out(model), base)
    assert model.state_dict().keys() == before.keys()


@everywhere
def test_two_are_weighed_at_each_block(peer: Any, method: Bottleneck, targets: Any) -> None:
    """With weights w a block gives y + Σ wᵢ (yᵢ − y)."""
    model: Any = peer.build().double()
    adapters = adapted(model, method, targets)
    adapters.add("b", method, targets, seed=1)
    fill(model, "b", seed=1)
    site = next(name for name, module in model.named_modules() if hasattr(module, "adapters"))
    block = model.get_submodule(site)
    calls: list[Any] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    out(model)
    handle.remove()
    args, kwargs = calls[0]

    def hidden(active: Any) -> Tensor:
        with adapters.using(active):
            y = block(*args, **kwargs)
            return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]

    y, a, b = hidden(None), hidden("a"), hidden("b")
    assert (a - b).abs().max() > 1e-3
    close(hidden({"a": 0.7, "b": -0.3}), y + 0.7 * (a - y) - 0.3 * (b - y))


@everywhere
def test_saved_and_loaded_bit_by_bit(tmp_path: Path, peer: Any, method: Bottleneck, targets: Any) -> None:
    model: Any = peer.build()
    adapters = adapted(model, method, targets)
    want = out(model)
    adapters.save("a", tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["peft_type"] == "BOTTLENECK"
    again: Any = peer.build()
    other = ah.adapt(again)
    other.load(tmp_path / "a", "a")
    assert torch.equal(out(again), want)
    other.save("a", tmp_path / "b")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert stored(tmp_path / "a").own.method == method
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    site = next(name for name, module in model.named_modules() if hasattr(module, "adapters"))
    assert torch.equal(tensors[f"base_model.model.{site}.adapter_down.weight"], params(model, site)["down"])


@everywhere
def test_compiled_whole(peer: Any, method: Bottleneck, targets: Any) -> None:
    model: Any = peer.build()
    adapted(model, method, targets)
    want = out(model)
    torch.compiler.reset()
    close(torch.compile(model, backend="eager", fullgraph=True)(IDS, return_dict=False)[0], want, 1e-6)


@everywhere
def test_gradient_checkpointing_changes_nothing(peer: Any, method: Bottleneck, targets: Any) -> None:
    grads = []
    for checkpointed in (False, True):
        model: Any = peer.build()
        adapted(model, method, targets)
        if checkpointed:
            model.activation_checkpointing_enable()
            model.train()
        model.config.use_cache = False
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        out(model).square().mean().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() != set()
    for key, grad in grads[0].items():
        close(grads[1][key], grad, 1e-6)


@everywhere
def test_copies_and_pickles(peer: Any, method: Bottleneck, targets: Any) -> None:
    model: Any = peer.build()
    adapted(model, method, targets)
    want = out(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(twin), want)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert torch.equal(out(model), want)


def test_around_a_norm_in_bfloat16() -> None:
    """The adapter computes in float32, and the norm is called in the dtype of its own weight."""
    model: Any = BERT.build()
    adapted(model, Bottleneck.pfeiffer(reduction_factor=4), "output.LayerNorm")
    want = out(model)
    got = out(model.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.1 * want.abs().max()


def test_dropout_is_on_what_is_added_and_in_training_only() -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    adapted(model, Bottleneck(reduction_factor=4, dropout=0.5), "0")
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    y = F.linear(x, model[0].weight, model[0].bias)  # type: ignore[arg-type]
    added = model.eval()(x) - y
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = model.train()(x) - y
    kept = dropped.abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    close(dropped[kept], 2 * added[kept], 1e-4)


# Conformance around norms -----------------------------------------------------------------------------------


class Norms(nn.Module):
    """Three norms in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.LayerNorm(20, bias=i != 1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y


@parametrize_checks(
    Bottleneck(around_norm=True, reduction_factor=2),
    Bottleneck.pfeiffer(reduction_factor=4, scaling="learned", non_linearity="tanh"),
)
def test_conforms_around_norms(monkeypatch: pytest.MonkeyPatch, method: ah.Method, check: Check) -> None:
    norms = Example("block", Norms, lambda rng: torch.randn(3, 5, 20, generator=rng))
    monkeypatch.setitem(EXAMPLES, "block", norms)
    check(method)


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size 0"),
        ({"reduction_factor": 0}, "reduction_factor 0"),
        ({"reduction_factor": 1e-300}, "reduction_factor 1e-300"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"std": 0.0}, "std=0.0"),
        ({"scaling": 1e300}, "scaling 1e\\+300"),
        ({"scaling": "trained"}, "scaling='trained'"),
        ({"non_linearity": "sin"}, "non_linearity='sin'"),
        ({"around_norm": True, "placement": "parallel"}, "leave out around_norm or placement"),
    ],
)
def test_options_out_of_bounds(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ah.ConfigError, match=said):
        Bottleneck(**options)


class Pooled(nn.Module):
    """Gives one token of many; its width is not that of its last layer if `wide`."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.fc, self.wide = nn.Linear(12, 20), wide

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return torch.cat([y, y], dim=-1) if self.wide else y[:, 0]


def test_blocks_of_another_width_or_length_are_refused_by_name() -> None:
    x = torch.randn(3, 5, 12)
    for wide, method, said in (
        (True, Bottleneck(), r"inner: gives a tensor \[3, 5, 40\] of torch.float32, and .* the width 20"),
        (False, Bottleneck(placement="parallel"), r"inner: makes a tensor \[3, 20\] of \[3, 5, 12\]"),
    ):
        model = nn.ModuleDict({"inner": Pooled(wide)})
        adapted(model, method, "inner")
        with pytest.raises(ah.AdapterError, match=said):
            model["inner"](x)
    model = nn.ModuleDict({"inner": Pooled(False)})
    adapted(model, Bottleneck(), "inner")  # behind the block, its length is nobody's business
    assert model["inner"](x).shape == (3, 20)
    tokens = nn.ModuleDict({"inner": nn.Embedding(20, 12)})
    adapted(tokens, Bottleneck(placement="parallel"), "inner")
    with pytest.raises(ah.AdapterError, match=r"inner: takes a tensor \[2, 9\] of torch.int64"):
        tokens["inner"](IDS % 20)


def test_what_is_no_norm_has_nothing_around_it() -> None:
    model: Any = BERT.build()
    with pytest.raises(ah.ConfigError, match="around_norm is for LayerNorms, and this is a Linear"):
        ah.adapt(model).add("a", Bottleneck.pfeiffer(), "output.dense")
    assert not any(hasattr(module, "adapters") for module in model.modules())


def test_norms_without_values_tell_no_dtype() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20, elementwise_affine=False))
    with pytest.raises(ah.ConfigError, match="1: has no floating point values"):
        ah.adapt(model).add("a", Bottleneck(), "1")


def test_all_linear_names_no_block() -> None:
    with pytest.raises(ah.UnknownName, match="bottleneck adapts: block"):
        ah.adapt(nn.Sequential(nn.Linear(12, 20))).add("a", Bottleneck(), "all-linear")


def test_it_is_never_merged(tmp_path: Path, adapter: Any) -> None:
    model: Any = BERT.build()
    adapters = adapted(model, Bottleneck(reduction_factor=4), "output.dense")
    before, want = bits(model), out(model)
    with pytest.raises(ah.NotMergeable, match="leave the adapter unmerged"):
        adapters.merge()
    untouched(model, before)
    assert torch.equal(out(model), want)
    for name in ("a", "b"):
        adapters.save("a", tmp_path / name)
    merged = adapter("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out")
    merged.refused("'bottleneck'", "no change of weights", "activate")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ah.NotMergeable, match="no change of weights"):
        (0.5 * ah.load(tmp_path / "a")).save(tmp_path / "out")
    shown = adapter("info", tmp_path / "a")
    assert "bottleneck" in shown.out
    assert "scaling     -" in shown.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config, tensors: config.update(reduction_factor=8), "do not fit"),
        (lambda config, tensors: config.update(scaling="learned"), "adapter_scale' is missing"),
        (lambda config, tensors: config.update(non_linearity="os.system"), "non_linearity='os.system'"),
        (lambda config, tensors: config.update(non_linearity=3), "non_linearity=3"),
        (lambda config, tensors: config.update(use_gating=True), "use_gating=True"),
        (lambda config, tensors: tensors.update({key: t[:, :-1] for key, t in tensors.items() if t.ndim == 2}), "fit"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    model: Any = BERT.build()
    adapted(model, Bottleneck(reduction_factor=4), "output.dense").save("a", tmp_path / "a")
    config, tensors = json.loads((tmp_path / "a" / CONFIG).read_text()), load_file(tmp_path / "a" / WEIGHTS)
    change(config, tensors)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ah.FileError, match=said):
        ah.load(tmp_path / "a")


def test_another_base_is_noticed_at_norms_too(tmp_path: Path) -> None:
    model: Any = BERT.build()
    adapted(model, Bottleneck.pfeiffer(reduction_factor=4), "output.LayerNorm").save("a", tmp_path / "a")
    other: Any = BERT.build()
    for layer in other.encoder.layer:
        nn.init.normal_(layer.output.LayerNorm.weight, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ah.FileError, match="other weights"):
        ah.adapt(other).load(tmp_path / "a", "a")
    ah.adapt(other).load(tmp_path / "a", "a", any_base=True)
