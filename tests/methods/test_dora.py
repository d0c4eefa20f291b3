"""DoRA against its formula written out in float64, and against PEFT in both directions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub_lite_plugins.methods import dora as plugin
from peers import BERT, CONV, EMBEDDING, GPT2, LLAMA, PEERS, Peer, load_peft, output, write_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import adapterhub_lite as ah
from adapterhub_lite.cli import run as command
from adapterhub_lite.testing import Check, parametrize_checks
from adapterhub_lite.testing.zoo import EXAMPLES, Example

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANK, ALPHA = 3, 7
KINDS = [kind for kind in EXAMPLES if kind in ah.method("lora").site_kinds]  # DoRA's are LoRA's
every_kind = pytest.mark.parametrize("example", [EXAMPLES[kind] for kind in KINDS], ids=KINDS)
every_peer = pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)


def dora(**options: Any) -> ah.Method:
    return ah.method("dora", **{"rank": RANK, "alpha": ALPHA, **options})


@parametrize_checks(
    ah.method("dora"),
    dora(rslora=True, rank_pattern={"second": 2}, dropout=0.25),
    dora(rank=4, init_weights="pissa"),
)
def test_conforms(method: ah.Method, check: Check) -> None:
    check(method)


# The formula --------------------------------------------------------------------------------------------


def fill(model: nn.Module, name: str, seed: int = 0) -> None:
    """Trained values for adapter `name`: nothing is zero, and the magnitudes are not the lengths any more."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".adapters.{name}." in key:
                noise = torch.randn(p.shape, generator=rng).to(p)
                p.copy_(p * (1 + 0.2 * noise.tanh()) if key.endswith(".m") else noise / p.shape[0] ** 0.5)


def adapted(model: nn.Module, targets: list[str], **options: Any) -> ah.Adapters:
    adapters = ah.adapt(model)
    adapters.add("a", dora(**options), targets)
    fill(model, "a")
    return adapters


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]


def expected(module: nn.Module, A: Tensor, B: Tensor, m: Tensor, scaling: float) -> Tensor:
    """m V / ‖V‖ with V = W + s B A in the layer's own layout, the norm held constant."""
    W: Any = module.weight.detach()  # type: ignore[union-attr]
    product = scaling * B.flatten(1) @ A.flatten(1)  # (out, in)
    if isinstance(module, (nn.Embedding, Conv1D)):
        V = W + product.T
        return V * (m / V.detach().norm(dim=0))
    V = W + product.reshape(W.shape)
    rest = tuple(range(1, W.ndim))
    return V * (m.reshape(-1, *(1 for _ in rest)) / torch.linalg.vector_norm(V.detach(), dim=rest, keepdim=True))


def part(model: nn.Module, site: str, name: str = "a") -> Any:
    return model.get_submodule(f"{site}.adapters.{name}")


@every_kind
def test_forward_gradients_and_merge_are_the_formula_s(example: Example) -> None:
    model, plain, x = example.model(), example.model(), example.input()
    sites = layers(model)
    adapters = adapted(model, sites)
    leaves = {
        (site, key): getattr(part(model, site), key).detach().clone().requires_grad_()
        for site in sites
        for key in ("A", "B", "m")
    }
    weights = {
        f"{site}.weight": expected(
            plain.get_submodule(site), *(leaves[site, key] for key in ("A", "B", "m")), ALPHA / RANK
        )
        for site in sites
    }
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    want = functional_call(plain, weights, inputs[0])
    got = model(inputs[1])
    assert (want - plain(x)).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)

    for y in (want, got):
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    for (site, key), leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 1e-3
        torch.testing.assert_close(getattr(part(model, site), key).grad, leaf.grad, rtol=1e-10, atol=1e-11)
    if x.is_floating_point():
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-10, atol=1e-11)

    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".bias")}
    adapters.merge()
    for name, weight in weights.items():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-12, atol=1e-13, check_layout=False)
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in biases.items())


@every_kind
def test_two_weighted_adapters_live_and_merged(example: Example) -> None:
    model, plain, x = example.model(), example.model(), example.input()
    sites = layers(model)
    adapters = adapted(model, sites)
    adapters.add("b", dora(rank=2, alpha=3), sites, seed=1)
    fill(model, "b", seed=1)
    adapters.activate({"a": 0.7, "b": -0.3})
    weights = {}
    for site in sites:
        layer: Any = plain.get_submodule(site)
        weights[f"{site}.weight"] = layer.weight.detach() + sum(
            w * (expected(layer, p.A, p.B, p.m.flatten(), scaling) - layer.weight).detach()
            for w, p, scaling in (
                (0.7, part(model, site, "a"), ALPHA / RANK),
                (-0.3, part(model, site, "b"), 3 / 2),
            )
        )
    want = functional_call(plain, weights, x)
    torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-12)
    adapters.merge()
    torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-12)


@every_kind
def test_magnitudes_start_as_the_lengths_and_the_output_as_the_base_s_bits(example: Example) -> None:
    for dtype in (torch.float64, torch.float32):
        model, x = example.model(dtype), example.input(dtype)
        base = model(x)
        ah.adapt(model).add("a", dora(), layers(model))
        assert torch.equal(model(x), base)
        for site in layers(model):
            layer: Any = model.get_submodule(site)
            W, m = layer.weight.detach().double(), part(model, site).m
            W = W.T if isinstance(layer, (nn.Embedding, Conv1D)) else W.flatten(1)  # (out, in)
            assert m.dtype == dtype
            torch.testing.assert_close(m.flatten().double(), W.norm(dim=1), rtol=1e-6, atol=0)
            trained = sum(p.numel() for p in part(model, site).parameters() if p.requires_grad)
            inner = part(model, site).A[0].numel() + len(part(model, site).B)
            assert trained == RANK * inner + len(W)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_costs_no_accuracy_beside_its_own_rounding(dtype: torch.dtype) -> None:
    model: Any = EXAMPLES["linear"].model(dtype)
    layer, x = model.first, EXAMPLES["linear"].input(dtype)
    y = layer(x).double()  # rounded by the layer itself
    adapters = adapted(model, ["first"])
    p = part(model, "first")
    W, A, B, m, b = (t.detach().double() for t in (layer.weight, p.A, p.B, p.m, layer.bias))
    V = W + ALPHA / RANK * B @ A
    want = (m / V.norm(dim=1)) * (y - b + ALPHA / RANK * x.double() @ A.T @ B.T) + b
    assert p.A.dtype == p.m.dtype == torch.float32
    live = p.adapted(x, layer.forward(x))
    assert live.dtype == torch.float32
    torch.testing.assert_close(live.double(), want, rtol=2e-6, atol=2e-6)
    adapters.merge()
    exact = (m / V.norm(dim=1))[:, None] * V
    assert ((layer.weight.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.501 + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_without_a_length_give_no_nan(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    layer: Any = model[0]
    with torch.no_grad():
        layer.weight[1] = 0
    adapters = ah.adapt(model)
    adapters.add("a", dora(rank=5, alpha=5), "0")
    x = torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    base = layer.forward(x)
    p = part(model, "0")
    for start in (True, False):
        if not start:
            with torch.no_grad():  # s B A = −W, up to rounding: every V is zero
                p.B.copy_(-(layer.weight.double() @ torch.linalg.pinv(p.A.double())))
                p.A.copy_(torch.linalg.lstsq(p.B.double()[[0, 2, 3, 4]], -layer.weight.double()[[0, 2, 3, 4]])[0])
        got = model(x)
        got.square().sum().backward()
        assert got.isfinite().all()
        assert all(bool(t.grad.isfinite().all()) for t in (p.A, p.B, p.m))
        assert torch.equal(got, base) if start else bool((got - layer.bias).abs().max() < 0.1)
        adapters.merge()
        assert bool((layer.weight[1] == 0).all())
        if start or dtype == torch.float64:  # merging resolves in float64 what float32 does not
            torch.testing.assert_close(model(x), got, atol=0.1, rtol=1e-5)
        assert model(x).isfinite().all()
        adapters.unmerge()


def test_rows_of_a_transpose_are_measured_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "CHUNK", 100)
    W = torch.randn(50, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mT  # (13, 50)
    want = (W * W).sum(1)
    for given in (W, W.contiguous()):
        torch.testing.assert_close(plugin._row_squares(given, torch.float64), want, rtol=1e-14, atol=0)
    model = nn.Sequential(nn.Embedding(50, 13))
    ah.adapt(model).add("a", dora(), "0")
    with _Large(50 * 13) as large:
        model(torch.tensor([[1, 4]]))
    assert large.made == []


class _Large(TorchDispatchMode):
    """Counts the results with at least `numel` numbers that are not views."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        large = isinstance(result, Tensor) and result.numel() >= self.numel
        if large and result.untyped_storage().data_ptr() not in inputs:
            self.made.append(str(func))
        return result


def test_nothing_of_the_weight_s_size_is_made_or_saved() -> None:
    model = nn.Sequential(nn.Linear(160, 144))
    adapted(model, ["0"])
    x = torch.randn(4, 160, requires_grad=True)
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with _Large(160 * 144) as large, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    assert large.made == []
    weight: Any = model[0].weight
    saved.pop(weight.untyped_storage().data_ptr())
    # For each token in + out + r; A, B and a few vectors over the outputs.
    assert sum(saved.values()) <= 4 * (160 + 144 + RANK) + RANK * (160 + 144) + 4 * 144


# With dropout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dropout_is_that_of_the_paper_s_code(kind: str) -> None:
    make: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(12, 7),
        "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1),
    }
    shape = {"linear": (5, 12), "conv2d": (2, 4, 6, 5)}[kind]
    torch.manual_seed(0)
    base = nn.Sequential(make[kind]()).double()
    x = torch.randn(shape, dtype=torch.float64)
    theirs = get_peft_model(
        nn.Sequential(make[kind]()),
        LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.4, use_dora=True, target_modules=["0"]),
    ).double()
    ours = nn.Sequential(make[kind]()).double()
    ours.load_state_dict(base.state_dict())
    inner: Any = theirs.base_model.model[0]
    inner.base_layer.load_state_dict(base[0].state_dict())
    adapted(ours, ["0"], dropout=0.4)
    p = part(ours, "0")
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(p.A)
        inner.lora_B["default"].weight.copy_(p.B)
        inner.lora_magnitude_vector["default"].weight.copy_(p.m)
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    for mine, peft in ((p.A, inner.lora_A), (p.B, inner.lora_B), (p.m, inner.lora_magnitude_vector)):
        torch.testing.assert_close(mine.grad, peft["default"].weight.grad, rtol=1e-11, atol=1e-11)
    ours.eval(), theirs.eval()
    assert (ours(x) - outputs[0]).abs().max() > 1e-2
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_dropout_on_a_half_precision_base() -> None:
    model: Any = EXAMPLES["linear"].model(torch.bfloat16)
    layer, x = model.first, EXAMPLES["linear"].input(torch.bfloat16)
    adapted(model, ["first"], dropout=0.4)
    p = part(model, "first")
    W, A, B, m = (t.detach().double() for t in (layer.weight, p.A, p.B, p.m))
    scale = m / (W + ALPHA / RANK * B @ A).norm(dim=1)
    base = layer.forward(x).double()
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        got = layer(x)
        torch.manual_seed(1)
        dropped = torch.nn.functional.dropout(x.float(), 0.4).double()
    want = base + (scale - 1) * (dropped @ W.T) + scale * ALPHA / RANK * (dropped @ A.T @ B.T)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=2e-2)


# PEFT ---------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": (3, 7), "alpha_pattern": (5, 2)},
    "bfloat16": {"dtype": torch.bfloat16},
}


def write(folder: Path, peer: Peer, **options: Any) -> Path:
    patterns = {k: dict(zip(peer.patterned, v, strict=True)) for k, v in options.items() if "_pattern" in k}
    return write_adapter(folder, peer, **{"rank": 6, "alpha": 9, "seed": 3, "use_dora": True, **options, **patterns})


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@every_peer
def test_what_peft_wrote_computes_here_what_it_does_there_and_is_saved_as_it_was(
    tmp_path: Path, peer: Peer, variant: str
) -> None:
    folder = write(tmp_path / "x", peer, **VARIANTS[variant])
    model = peer.build().double()
    base = output(model, peer)
    adapters = ah.adapt(model)
    adapters.load(folder, "a")
    theirs = load_peft(folder, peer).double()
    want = output(theirs, peer)
    assert (want - base).abs().max() > 1e-2
    torch.testing.assert_close(output(model, peer), want, rtol=1e-10, atol=1e-11)

    adapters.save("a", tmp_path / "out", dtype=None)
    before, after = (load_file(f / WEIGHTS) for f in (folder, tmp_path / "out"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], t.double()) for key, t in before.items())
    assert all(after[key].shape == t.shape for key, t in before.items())
    was, now = config(folder), config(tmp_path / "out")
    assert now["use_dora"] is True
    assert {key: now[key] for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")} == {
        key: was[key] for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    }


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"init_weights": "pissa"}, {"patterned": True}], ids=str)
@every_peer
def test_what_is_saved_here_computes_in_peft_what_it_does_here(
    tmp_path: Path, peer: Peer, options: dict[str, Any]
) -> None:
    if "patterned" in options:
        options = {"rank_pattern": {peer.patterned[0]: 2}, "alpha_pattern": {peer.patterned[0]: 11}}
    model = peer.build()
    adapters = adapted(model, peer.targets, **options)
    assert float(adapters.save("a", tmp_path / "out")) == 0
    theirs = load_peft(tmp_path / "out", peer)
    torch.testing.assert_close(output(theirs, peer), output(model, peer), rtol=1e-4, atol=2e-6)

    with torch.random.fork_rng(devices=[]):
        theirs.save_pretrained(str(tmp_path / "peft"))
    ours, peft = (load_file(tmp_path / n / WEIGHTS) for n in ("out", "peft"))
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in peft.items()}

    again = peer.build()
    held = ah.adapt(again)
    held.load(tmp_path / "out", "a")
    assert torch.equal(output(again, peer), output(model, peer))
    held.save("a", tmp_path / "again")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.mark.parametrize("peer", [LLAMA, GPT2, CONV, EMBEDDING], ids=lambda p: p.name)
def test_gradients_are_peft_s(tmp_path: Path, peer: Peer) -> None:
    folder = write(tmp_path, peer)
    ours: Any = peer.build().double()
    ah.adapt(ours).load(folder, "a")
    theirs: Any = load_peft(folder, peer).double()
    theirs.requires_grad_(True)
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in peer.inputs().items()}
    for model in (ours, theirs):
        y = model(**inputs)
        (y if isinstance(y, Tensor) else y[0]).square().sum().backward()
    found: dict[str, Tensor] = {}
    for key, p in theirs.named_parameters():
        if "lora_" in key:
            site, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
            found[
                f"{site}.adapters.a.{'m' if rest.startswith('magnitude') else rest.removeprefix('embedding_')[0]}"
            ] = p
    mine = {key: p for key, p in ours.named_parameters() if ".adapters." in key}
    assert mine.keys() == found.keys()
    for key, p in mine.items():
        want = found[key].grad
        assert want is not None
        assert want.abs().max() > 0
        torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-9 * float(want.abs().max()))


# What is refused ----------------------------------------------------------------------------------------


def test_a_bias_behind_B_is_refused() -> None:
    with pytest.raises(ah.ConfigError, match="lora_bias"):
        dora(lora_bias=True)


@pytest.mark.parametrize(
    ("peer", "site", "change", "said"),
    [
        (BERT, "pooler.dense", lambda m: m[:-1], r"lora_magnitude_vector \[47\] does not fit lora_B \[48, 6\]"),
        (BERT, "pooler.dense", lambda m: m[None], r"lora_magnitude_vector \[1, 48\] does not fit"),
        (CONV, "conv2d", lambda m: m.flatten(), r"lora_magnitude_vector \[14\] does not fit .* of a conv2d layer"),
        (EMBEDDING, "tokens", lambda m: torch.ones(53), r"lora_magnitude_vector \[53\] does not fit"),
        (EMBEDDING, "tokens", lambda m: None, "tokens.lora_magnitude_vector' is missing"),
        (EMBEDDING, "tokens", lambda m: m * torch.nan, "lora_magnitude_vector"),
    ],
    ids=["short", "extra dimension", "flat for a convolution", "per token", "missing", "not finite"],
)
def test_magnitudes_that_fit_no_layer(tmp_path: Path, peer: Peer, site: str, change: Any, said: str) -> None:
    folder = write(tmp_path, peer)
    tensors = load_file(folder / WEIGHTS)
    key = f"base_model.model.{site}.lora_magnitude_vector"
    changed = change(tensors.pop(key))
    save_file({**tensors, **({} if changed is None else {key: changed.contiguous()})}, folder / WEIGHTS)
    with pytest.raises(ah.FileError, match=said):
        ah.adapt(peer.build()).load(folder, "a")


def test_a_flag_that_is_lost_or_wrong(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", BERT)
    for value, said in ((False, "lora_magnitude_vector"), ("yes", "use_dora"), (1, "use_dora")):
        changed = shutil.copytree(folder, tmp_path / str(value))
        (changed / CONFIG).write_text(json.dumps({**config(folder), "use_dora": value}))
        with pytest.raises(ah.FileError, match=said):
            ah.load(changed)
    lora = write(tmp_path / "lora", BERT, use_dora=False)
    (lora / CONFIG).write_text(json.dumps({**config(lora), "use_dora": True}))
    with pytest.raises(ah.FileError, match="lora_magnitude_vector' is missing"):
        ah.load(lora)


def test_arithmetic_on_files_names_the_adapter_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, lora = write(tmp_path / "one", BERT), write(tmp_path / "lora", BERT, use_dora=False)
    a, b = ah.load(one), ah.load(lora)
    for call in (lambda: (0.5 * a + 0.5 * b).save(tmp_path / "x"), lambda: a.truncate(2).save(tmp_path / "x")):
        with pytest.raises(ah.NotMergeable, match=r"one.*'dora'.*base weights"):
            call()
    out = str(tmp_path / "out")
    for arguments in ([str(one), str(lora)], [str(lora), str(one), "--dry-run"], [str(one), "--rank", "2"]):
        assert command(["merge", *arguments, "-o", out]) == 1
        said = capsys.readouterr().err
        assert all(word in said for word in (str(one), "'dora'", "base weights")), said
    assert not (tmp_path / "out").exists()

    assert command(["merge", str(one), "-o", out, "-q"]) == 0  # one as it is
    assert all(
        torch.equal(t, load_file(one / WEIGHTS)[key]) for key, t in load_file(tmp_path / "out" / WEIGHTS).items()
    )
    capsys.readouterr()
    assert command(["info", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["config"]["rank"]) == ("dora", 6)


def test_torch_is_not_imported_to_read_one(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder = write(tmp_path, BERT)
    code = f"import sys, adapterhub_lite as ah; ah.load({str(folder)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
