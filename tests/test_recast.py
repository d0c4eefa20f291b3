"""One adapter whose ΔW needs the base, saved in another dtype: its tensors are rounded, and the error says of what.

The oracles are torch's own rounding, and the adapted layers' formulas written out in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterhub_lite as ah
from adapterhub_lite import NotMergeable

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done

    Command = Callable[..., Done]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
SPELLED = {"F16": "fp16", "BF16": "bfloat16"}
OPTIONS: dict[str, dict[str, Any]] = {"dora": {"rank": 3, "alpha": 7}, "ia3": {"feedforward": ("2",)}}
TARGETS = ["0", "2", "3"]
every_method = pytest.mark.parametrize("name", list(OPTIONS))
every_dtype = pytest.mark.parametrize("dtype", list(DTYPES))


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Layer 3 takes what 2 gives, an image's columns: all kinds of biases, no square layer.
        return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 11, bias=False), nn.Linear(11, 6)).to(dtype)


def trained(name: str, **options: Any) -> ah.Adapters:
    adapters = ah.adapt(network())
    adapters.add("a", ah.method(name, **{**OPTIONS[name], **options}), TARGETS)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=rng)
    return adapters


def columns(W: Tensor, b: Tensor | None) -> Tensor:
    """Weight and bias side by side, (out, in + 1), in float64."""
    return torch.cat([W, torch.zeros(len(W), 1) if b is None else b[:, None]], 1).detach().double()


def merged(name: str, site: str, t: dict[str, Tensor], layer: nn.Linear) -> Tensor:
    """Weight of the merged layer and its bias as one more column, (out, in + 1), from the formula in float64."""
    W, b = columns(layer.weight, layer.bias).split([layer.in_features, 1], 1)
    b = b.flatten()
    t = {key.removeprefix(f"{PREFIX}{site}."): value.double() for key, value in t.items() if f".{site}." in key}
    if name == "ia3":
        l = t["ia3_l"].flatten()  # noqa: E741
        W, b = (W * l, b) if site in OPTIONS["ia3"]["feedforward"] else (l[:, None] * W, l * b)
    else:
        V = W + 7 / 3 * t["lora_B.weight"] @ t["lora_A.weight"]
        W = (t["lora_magnitude_vector"] / V.norm(dim=1))[:, None] * V
    return columns(W, b)


def error_of(out: Path) -> dict[str, Any]:
    with safe_open(out / WEIGHTS, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["adapterhub_lite"])["error"]
    return found


def rounded(before: dict[str, Tensor], after: dict[str, Tensor], dtype: torch.dtype) -> float:
    """Assert that `after` is `before` in that dtype; the relative error of all the numbers."""
    assert after.keys() == before.keys()
    for key, t in before.items():
        assert after[key].dtype == dtype
        assert torch.equal(after[key], t.to(dtype))
    lost = sum(float((after[key].double() - t.double()).square().sum()) for key, t in before.items())
    return float((lost / sum(float(t.double().square().sum()) for t in before.values())) ** 0.5)


@every_dtype
@every_method
def test_from_a_live_model_the_error_is_that_of_the_weights(tmp_path: Path, name: str, dtype: str) -> None:
    adapters = trained(name)
    assert float(adapters.save("a", tmp_path / "exact")) == 0
    error = adapters.save("a", tmp_path / "out", dtype=DTYPES[dtype])
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("exact", "out"))
    of_tensors = rounded(before, after, DTYPES[dtype])
    assert error.of == "delta"
    lost = size = 0.0
    for site in TARGETS:
        layer: Any = network().get_submodule(site)
        base = columns(layer.weight, layer.bias)
        exact, stored = (merged(name, site, t, layer) for t in (before, after))
        off, whole = float((stored - exact).norm()), float((exact - base).norm())
        assert error.modules[site] == pytest.approx(off / whole, rel=1e-5)
        lost, size = lost + off**2, size + whole**2
    assert error.overall == pytest.approx((lost / size) ** 0.5, rel=1e-5)
    assert error.overall > 2 * of_tensors  # so one must not be told for the other
    assert error_of(tmp_path / "out") == {"overall": error.overall, "modules": dict(error.modules)}


@every_dtype
@every_method
def test_from_a_folder_the_error_is_that_of_the_tensors_and_says_so(
    adapter: Command, tmp_path: Path, name: str, dtype: str
) -> None:
    trained(name).save("a", tmp_path / "exact")
    error = ah.load(tmp_path / "exact").save(tmp_path / "out", dtype=DTYPES[dtype])
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("exact", "out"))
    assert error.of == "tensors"
    assert error.overall == pytest.approx(rounded(before, after, DTYPES[dtype]), rel=1e-5)
    for site in TARGETS:
        own = [{k: t for k, t in tensors.items() if f".{site}." in k} for tensors in (before, after)]
        assert error.modules[site] == pytest.approx(rounded(own[0], own[1], DTYPES[dtype]), rel=1e-5)
    assert error_of(tmp_path / "out") == {"overall": error.overall, "modules": dict(error.modules), "of": "tensors"}

    words = ["merge", tmp_path / "exact", "--dtype", SPELLED[dtype]]
    done = adapter(*words, "-o", tmp_path / "same")
    assert "of the stored tensors" in done.out
    assert "rank" not in done.out.splitlines()[0]
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    report = adapter(*words, "-o", tmp_path / "same", "--force", "--json").json
    assert (report["error"], report["error_of"], report["dtype"]) == (error.overall, "tensors", dtype)
    plan = adapter(*words, "--dry-run", "--json").json
    assert plan["bytes"] == report["bytes"] == sum(2 * t.numel() for t in before.values())
    assert "of the stored tensors" in adapter("info", tmp_path / "out").out
    info = adapter("info", tmp_path / "out", "--json").json
    assert (info["error"], info["error_of"], info["dtypes"]) == (error.overall, "tensors", [dtype])


@every_dtype
@every_method
def test_it_loads_back_and_computes_with_the_rounded_numbers(tmp_path: Path, name: str, dtype: str) -> None:
    trained(name).save("a", tmp_path / "a", dtype=DTYPES[dtype])
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    adapters = ah.adapt(network(torch.float64))
    adapters.load(tmp_path / "a", "a")
    (found,) = ah.load(tmp_path / "a").source.contents.values()
    assert found.method == ah.method(name, **OPTIONS[name])
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(2)).double()
    want, plain = x, x
    for i, layer in enumerate(network(torch.float64)):
        plain = layer(plain)
        if isinstance(layer, nn.Linear):
            both = merged(name, str(i), tensors, layer)
            want = want @ both[:, :-1].T + both[:, -1]
        else:
            want = layer(want)
    torch.testing.assert_close(adapters.model(x), want, rtol=1e-6, atol=1e-7)
    assert (want - plain).abs().max() > 1e-2


@every_method
def test_a_wider_dtype_loses_nothing(adapter: Command, tmp_path: Path, name: str) -> None:
    adapters = trained(name)
    adapters.save("a", tmp_path / "half", dtype=torch.bfloat16)
    error = ah.load(tmp_path / "half").save(tmp_path / "wide", dtype=torch.float32)
    assert (error.overall, error.of, set(error.modules.values())) == (0.0, "delta", {0.0})
    half, wide = (load_file(tmp_path / folder / WEIGHTS) for folder in ("half", "wide"))
    assert all(t.dtype == torch.float32 and torch.equal(t, half[key].float()) for key, t in wide.items())
    assert float(adapters.save("a", tmp_path / "live", dtype=torch.float64)) == 0
    done = adapter("merge", tmp_path / "half", "--dtype", "fp32", "-o", tmp_path / "again")
    assert done.out.splitlines()[1:] == ["exact: every stored number is the input's"]


@every_method
def test_what_does_not_fit_the_dtype_is_refused(adapter: Command, tmp_path: Path, name: str) -> None:
    adapters = trained(name)
    with torch.no_grad():
        p = next(p for key, p in adapters.model.named_parameters() if p.requires_grad and key.startswith("2."))
        p.view(-1)[1] = 1e5  # float16 ends at 65504
    with pytest.raises(NotMergeable, match=r"at '2' .* is not finite in F16"):
        adapters.save("a", tmp_path / "out", dtype=torch.float16)
    adapters.save("a", tmp_path / "a")
    adapter("merge", tmp_path / "a", "--dtype", "fp16", "-o", tmp_path / "out").refused("'2'", "wider --dtype")
    assert not (tmp_path / "out").exists()
    adapters.save("a", tmp_path / "out", dtype=torch.bfloat16)


@every_method
def test_a_weight_or_a_cut_still_needs_the_base(tmp_path: Path, name: str) -> None:
    trained(name).save("a", tmp_path / "a")
    a = ah.load(tmp_path / "a")
    for other in (0.5 * a, a + ah.load(tmp_path / "a"), a.truncate(1, dtype=torch.bfloat16)):
        with pytest.raises(NotMergeable, match="depends on the base weights"):
            other.save(tmp_path / "out", dtype=torch.bfloat16)


def test_a_fresh_adapter_is_exact_where_its_numbers_are(tmp_path: Path) -> None:
    adapters = ah.adapt(network())
    adapters.add("a", ah.method("ia3"), TARGETS)
    error = adapters.save("a", tmp_path / "ones", dtype=torch.float16)
    assert (error.overall, error.of, error.plain()["overall"]) == (0.0, "delta", 0.0)


def test_what_cannot_be_merged_has_no_delta_to_measure(tmp_path: Path) -> None:
    adapters = ah.adapt(network())
    adapters.add("a", ah.method("bottleneck", reduction_factor=2), ["0", "3"])
    adapters.save("a", tmp_path / "exact")
    error = adapters.save("a", tmp_path / "out", dtype=torch.bfloat16)
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("exact", "out"))
    assert error.of == "tensors"
    assert error.overall == pytest.approx(rounded(before, after, torch.bfloat16), rel=1e-5)
