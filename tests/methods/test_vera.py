"""VeRA: the shared matrices, the formula, and what is kept for the backward pass."""

from __future__ import annotations

import copy
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapterhub_lite_plugins.methods import vera
from peers import BERT, LLAMA, output, write_peft
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite.site.linear import LinearSite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = "base_model.vera_A", "base_model.vera_B"


def made(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Sequential, ah.Adapters]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 7, bias=False)).to(dtype)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("vera", **{"rank": 5, **options}), ["0", "2"])
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=rng)
    return model, adapters


X = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def dense(model: Any, i: int, name: str = "a") -> Tensor:
    """ΔW of equation 2, at layer i."""
    shared, own = model.adapters.get_submodule(name), model[i].adapters.get_submodule(name)
    out, into = model[i].weight.shape
    change: Tensor = own.b.diag() @ shared.B[:out] @ own.d.diag() @ shared.A[:, :into]
    return change


def plain(model: Any, x: Tensor) -> Tensor:
    """Equation 2, layer by layer."""
    for i in (0, 2):
        y = x @ (model[i].weight + dense(model, i)).mT
        x = torch.tanh(y + model[i].bias) if i == 0 else y
    return x


def test_it_is_the_formula_with_its_gradients() -> None:
    model, _ = made()
    twin = copy.deepcopy(model)
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.testing.assert_close(model(x), plain(twin, z), rtol=0, atol=1e-12)
    model(x).square().sum().backward()
    plain(twin, z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=0, atol=1e-11)
    theirs = dict(twin.named_parameters())
    found = 0
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, theirs[key].grad, rtol=0, atol=1e-11)
            found += 1
    assert found == 4


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("x", [X, X[0], X[0, 0]], ids=lambda x: f"{x.ndim}d")
def test_gradients_are_the_derivatives_for_any_number_of_dimensions(x: Tensor, needs: bool) -> None:
    model, _ = made()
    own = [p for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x.clone().requires_grad_(needs), *own))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("peer", [LLAMA, BERT], ids=lambda p: p.name)
def test_the_matrices_are_those_that_peft_draws(peer: Any) -> None:
    config = VeraConfig(r=6, target_modules=peer.targets, projection_prng_key=11)
    with torch.random.fork_rng(devices=[]):
        theirs: Any = get_peft_model(peer.build(), config).base_model
    model: Any = peer.build()
    ah.adapt(model).add("a", ah.method("vera", rank=6, projection_prng_key=11), peer.targets)
    assert torch.equal(model.adapters.a.A, theirs.vera_A["default"])
    assert torch.equal(model.adapters.a.B, theirs.vera_B["default"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_r_numbers_a_token_is_kept(dtype: torch.dtype) -> None:
    model, _ = made(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.append(tuple(t.shape))
        return t

    x = X.to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model[0](x * 1.0)
    assert kept == [(3, 4, 5)]


def test_parameters_are_those_of_two_vectors_a_layer() -> None:
    _, adapters = made()
    summary = adapters.summary()
    assert summary.trained == (14 + 5) + (7 + 5)
    assert summary.frozen == 5 * 14 + 14 * 5  # once for all layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype: torch.dtype) -> None:
    model, _ = made(torch.float32)
    x = X.float()
    model(x).square().sum().backward()
    want = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(x).float().square().sum()
    loss.backward()
    for key, grad in want.items():
        got = model.get_parameter(key).grad
        assert got is not None
        torch.testing.assert_close(got, grad, rtol=0.1, atol=0.05 * float(grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_bases_train_in_full_precision(dtype: torch.dtype) -> None:
    model, _ = made(dtype)
    wide = copy.deepcopy(model).float()
    for m, x in ((model, X.to(dtype)), (wide, X.to(dtype).float())):
        m(x).float().square().sum().backward()
    for key, p in wide.named_parameters():
        if p.grad is not None:
            got = model.get_parameter(key).grad
            assert got is not None
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, p.grad, rtol=0.05, atol=0.03 * float(p.grad.abs().max()))


def test_two_with_matrices_of_their_own_add_up() -> None:
    model, adapters = made()
    adapters.add("b", ah.method("vera", rank=3, projection_prng_key=9), ["2"])
    layer: Any = model[2]
    layer.adapters.b.b.data += 0.4
    adapters.activate({"a": 0.5, "b": -0.3})
    x = torch.randn(4, 14, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = x @ (layer.weight + 0.5 * dense(model, 2) - 0.3 * dense(model, 2, "b")).mT
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)


def test_two_of_them_share_nothing_and_leave_nothing() -> None:
    model, adapters = made()
    before = set(dict(model.named_modules()))
    adapters.add("b", ah.method("vera", rank=3, projection_prng_key=9), ["2"])
    root: Any = model.adapters
    assert root.a.A.shape == (5, 14)
    assert root.b.A.shape == (3, 14)
    twin: Any = copy.deepcopy(model)
    assert twin[2].adapters.b.common is twin.adapters.b
    adapters.remove("b")
    assert set(dict(model.named_modules())) == before
    adapters.remove("a")
    assert not [key for key in model.state_dict() if "adapters" in key]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, for any Function
def test_compiles_in_one_graph() -> None:
    model, _ = made()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, model(z), rtol=0, atol=1e-12)
    y.sum().backward()
    model(z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_when_it_was_unpickled_where_no_other_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made()
    blob = pickle.dumps(model)
    monkeypatch.setattr(vera, "_PRODUCT", None)  # as in a new process
    compiled = torch.compile(pickle.loads(blob), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), model(X), rtol=0, atol=1e-12)


def test_the_matrices_follow_to_the_device_of_the_layer() -> None:
    own = {"b": torch.empty(7, device="meta"), "d": torch.empty(5, device="meta")}
    p = ah.Params({"A": torch.ones(5, 20), "B": torch.ones(9, 5), **own})
    low: Any = ah.method("vera", rank=5).delta(p, LinearSite("x", (7, 14)))
    assert (low.A.device.type, low.B.device.type) == ("meta", "meta")


# Files ------------------------------------------------------------------------------------------------


def peft_folder(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda _: None, **entries: Any) -> Path:
    """An adapter that PEFT wrote, with its tensors and entries changed."""
    config = {"r": 5, "target_modules": LLAMA.targets, "projection_prng_key": 7}
    write_peft(folder, LLAMA, lambda: VeraConfig(**config), seed=3)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / WEIGHTS)
    there = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**there, **entries}))
    return folder


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (A, lambda t: t[:1], r"vera_A is \[1, 172\]"),  # these two would broadcast
        (B, lambda t: t[:1], r"vera_B is \[1, 5\]"),
        (A, lambda t: t[:4], r"vera_A is \[4, 172\]"),
        (A, lambda t: t.flatten(), r"vera_A is \[860\]"),
        (B, lambda t: t[:, :4], r"vera_B is \[172, 4\]"),
        (B, lambda t: t[:171], r"vera_B is \[171, 5\]"),
        (A, lambda t: t[:, :, None], r"vera_A is \[5, 172, 1\]"),
        (B, lambda t: t[:, :, None], r"vera_B is \[172, 5, 1\]"),
        (A, lambda t: t.int(), "holds I32"),
        (A, lambda t: t * float("nan"), "860 values NaN"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(tmp_path: Path, key: str, change: Any, message: str) -> None:
    folder = peft_folder(tmp_path / "x", lambda tensors: tensors.update({key: change(tensors[key])}))
    adapters = ah.adapt(LLAMA.build())
    with pytest.raises(ah.FileError, match=message):
        adapters.load(folder, "a")
    assert adapters.names == ()


def test_a_layer_that_is_wider_than_the_matrix_is_named(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "x", lambda tensors: tensors.update({A: tensors[A][:, :171]}))
    model: Any = LLAMA.build()
    ah.adapt(model).load(folder, "a")
    with pytest.raises(ah.ConfigError, match=r"down_proj.* 171 inputs at most, and this one has 172"):
        output(model, LLAMA)


def test_saved_matrices_hold_that_are_larger_than_the_layers_need(tmp_path: Path) -> None:
    few = ("q_proj", "k_proj")  # 64 wide; drawn for these alone, other matrices would come out

    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key not in (A, B) and not any(name in key for name in few)]:
            del tensors[key]

    folder = peft_folder(tmp_path / "x", change, target_modules=list(few))
    saved = load_file(folder / WEIGHTS)
    model, other = LLAMA.build(), LLAMA.build()
    adapters = ah.adapt(model)
    adapters.load(folder, "a")
    found = 0
    for name, module in other.named_modules():
        if name.endswith(few):
            b, d = (saved[f"base_model.model.{name}.vera_lambda_{which}"] for which in "bd")
            module.weight.data += b.diag() @ saved[B][: len(b)] @ d.diag() @ saved[A][:, : module.weight.shape[1]]
            found += 1
    assert found == len(saved) // 2 - 1
    torch.testing.assert_close(output(model, LLAMA), output(other, LLAMA), rtol=1e-4, atol=1e-5)
    adapters.save("a", tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], t) for key, t in saved.items())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": 0}, "r=0 is not positive"),
        ({"r": 6}, r"vera_lambda_d is \[5\], and the rank 6"),
        ({"vera_dropout": 1.0}, "vera_dropout=1.0 is not in"),
        ({"projection_prng_key": 1 << 64}, "projection_prng_key=18446744073709551616 is no seed"),
        ({"projection_prng_key": -(1 << 63) - 1}, "projection_prng_key=-9223372036854775809 is no seed"),
        ({"d_initial": -1e39}, r"d_initial=-1e\+39 is larger"),
    ],
    ids=str,
)
def test_options_out_of_bounds_are_refused_by_their_names_in_the_file(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    folder = peft_folder(tmp_path / "x", **entries)
    with pytest.raises(ah.FileError, match=message):
        ah.load(folder)


def test_the_outermost_options_are_taken() -> None:
    for key in (-(1 << 63), (1 << 64) - 1):
        made(projection_prng_key=key)
    made(torch.float32, d_initial=-3e38)
