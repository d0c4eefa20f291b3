"""What folding computes with: numbers as files store them, threads that compute alone, and torch only if needed."""

from __future__ import annotations

import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from adapterhub_lite_plugins.methods.lora import LoRA
from fold_models import (
    draw,
    lora_delta,
    off_by,
    real,
    rounded,
    same_bits,
    tensors_of,
    weighted,
    write_lora,
    write_model,
)
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_info, threadpool_limits

import adapterhub_lite as ah
from adapterhub_lite import LowRank, Outline, Params
from adapterhub_lite.checkpoint import Checkpoint
from adapterhub_lite.folding import numbers, task, threads
from adapterhub_lite.source import factors_told

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterhub_lite import Site

NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Array = np.ndarray[Any, Any]


# Numbers ------------------------------------------------------------------------------------------


def as_tensor(values: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1)).view(dtype).reshape(values.shape)


def at(x: Array, name: str, plus: Array | None = None) -> tuple[torch.Tensor, bool]:
    out = np.empty(x.shape, numbers.stored_type(name))
    finite = numbers.nearest(out, name, x, plus)
    return as_tensor(out, NAMES[name]), finite


@pytest.mark.parametrize("name", NAMES)
def test_to_the_nearest(name: str) -> None:
    """Everywhere between the smallest and the largest, on a half, and a hair beside it."""
    rng, top = np.random.default_rng(0), torch.finfo(NAMES[name])
    size = np.geomspace(top.tiny * 1.0001, top.max * 0.99, 4001)
    halves = 1 + top.eps * (np.arange(64) + 0.5)
    x = np.concatenate([size, -size, [0.0, -0.0, top.max, -top.max], rng.standard_normal(100_000), halves, -halves])
    x = np.concatenate([x, halves * (1 + 2**-45), halves * (1 - 2**-45)])
    got, finite = at(x, name)
    assert finite
    assert same_bits(got, rounded(x, NAMES[name]))


@pytest.mark.parametrize("name", NAMES)
def test_a_sum_to_the_nearest(name: str) -> None:
    """Of two, the first in any type: that of the sum in float64, and not of one that was rounded on the way."""
    rng = np.random.default_rng(1)
    plus = rng.standard_normal((300, 70))
    for kind in (np.float64, np.float32, np.float16):
        x = rng.standard_normal((300, 70)).astype(kind)
        got, finite = at(x, name, plus)
        assert finite
        assert same_bits(got, rounded(x.astype(np.float64) + plus, NAMES[name]))
    step = torch.finfo(NAMES[name]).eps
    x, hair = (1 + step * np.arange(64.0)).astype(np.float32 if name != "F64" else np.float64), step * 2.0**-20
    for plus in (np.full(64, step / 2), np.full(64, step / 2 + hair), np.full(64, step / 2 - hair)):
        got, _ = at(x, name, plus)
        assert same_bits(got, rounded(x.astype(np.float64) + plus, NAMES[name]))


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_below_the_smallest_that_is_normal(name: str) -> None:
    """There numbers are equally far apart, halves and a hair beside them included."""
    step = torch.finfo(NAMES[name]).smallest_normal * torch.finfo(NAMES[name]).eps
    n = np.random.default_rng(0).uniform(-100, 100, (5000, 3))
    n = np.concatenate([n, np.round(n) + 0.5, np.round(n) + 0.5 + 2**-40, np.round(n) + 0.5 - 2**-40])
    got, finite = at(n * step, name)
    assert finite
    assert torch.equal(got.double(), torch.from_numpy(np.rint(n) * step))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e308, -1e308])
def test_what_is_not_finite_is_told(name: str, bad: float) -> None:
    x = np.ones((40, 50))
    x[17, 3] = bad
    plus = x.copy()  # twice 1e308 is more than a float64 holds
    assert not at(x, name, plus)[1]
    assert at(np.ones(9), name)[1]
    assert at(np.ones((0, 4)), name)[1]
    if not np.isfinite(bad):
        assert not numbers.is_finite(x, "F64")
    payload = np.full(3, 0x7FFFFFFF, np.uint32).view(np.float32)  # to whose bits nothing can be added
    assert not at(payload, name)[1]


def test_a_sum_in_its_own_place() -> None:
    x = np.random.default_rng(2).standard_normal((33, 5)).astype(np.float32)
    want = rounded(x.astype(np.float64) + 0.3, torch.float32)
    assert numbers.nearest(x, "F32", x, np.full(x.shape, 0.3))
    assert same_bits(torch.from_numpy(x), want)


@pytest.mark.parametrize("dtype", [*NAMES.values(), torch.float8_e4m3fn, torch.int16], ids=str)
def test_read_and_written_as_they_are_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = draw(7, 5, std=3.0).to(dtype)
    save_file({"x": tensor, "none": torch.empty(0, 3, dtype=dtype)}, tmp_path / "x.safetensors")
    found = Checkpoint.open(tmp_path / "x.safetensors").tensors
    values = numbers.read(found["x"])
    assert numbers.bytes_of(values).tobytes() == numbers.bytes_of(numbers.of_tensor(tensor)).tobytes()
    assert np.array_equal(numbers.float64(values, found["x"].dtype), tensor.double().numpy())
    assert numbers.read(found["none"]).shape == (0, 3)
    if dtype == torch.float8_e4m3fn:  # torch's own, of which numpy has nothing
        out = np.empty(values.shape, numbers.stored_type("F8_E4M3"))
        assert numbers.nearest(out, "F8_E4M3", numbers.float64(values, "F8_E4M3") * 1.01)
        assert same_bits(as_tensor(out, dtype), (tensor.double() * 1.01).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_with_a_nan_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.tensor([1.0, float("nan")]).to(dtype)}, tmp_path / "x.safetensors")
    info = Checkpoint.open(tmp_path / "x.safetensors").tensors["x"]
    with pytest.raises(ah.FileError, match=r"'x' has 1 of 2 values NaN or infinite, the first at \[1\]"):
        numbers.read(info)
    assert len(numbers.stored(info)) == 2


# Threads ------------------------------------------------------------------------------------------


def blas() -> set[int]:
    """The threads that numpy's library has for a product."""
    found = [pool for pool in threadpool_info() if pool["user_api"] == "blas" and "numpy" in pool["filepath"]]
    return {pool["num_threads"] for pool in found}


def test_products_take_one_thread_within_and_as_many_as_before_afterwards() -> None:
    seen = []

    def other() -> None:
        threads.one_each()
        seen.append(blas())
        with threads.one_each():
            seen.append(blas())
        seen.append(blas())

    with threadpool_limits(2, user_api="blas"):
        assert blas() == {2}
        with threads.one_each():
            for _ in range(2):
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            assert blas() == {1}
        assert blas() == {2}
    assert seen == 6 * [{1}]


@pytest.mark.parametrize("asked", ["1", "2,4", "3", "", "many"])
def test_as_many_threads_as_torch_would_use(asked: str) -> None:
    told = "from adapterhub_lite.folding import threads; print(threads.available());"
    done = in_process(told + "import torch; print(torch.get_num_threads(), threads.available())", OMP_NUM_THREADS=asked)
    assert len(set(done.stdout.split())) == 1


def in_process(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    done = real("-c", code, *args, **env)
    assert done.returncode == 0, done.stderr
    return done


# Without torch ------------------------------------------------------------------------------------

LAYERS = {"lin": (13, 7), "conv1d": (9, 6), "pet": (5, 11)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_torch_for_plain_factors(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two LoRAs of linear layers, of which one is stored by inputs, of an embedding and a convolution."""
    W = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(LAYERS.items())}
    W |= {"conv": draw(8, 3, 2, 5, seed=7), "emb": draw(17, 4, seed=8)}
    tensors = {f"{name}.weight": (t.mT if name == "conv1d" else t).contiguous().to(dtype) for name, t in W.items()}
    folder = write_model(tmp_path / "base", tensors, files=2)
    parts, weights = [], [0.7, -0.3]
    for i in range(2):
        more = {
            "base_model.model.conv.lora_A.weight": draw(3, 3, 2, 5, seed=20 + i, std=0.3),
            "base_model.model.conv.lora_B.weight": draw(8, 3, 1, 1, seed=30 + i, std=0.3),
            "base_model.model.emb.lora_embedding_A": draw(3, 17, seed=40 + i, std=0.3),
            "base_model.model.emb.lora_embedding_B": draw(4, 3, seed=50 + i, std=0.3),
        }
        parts.append(write_lora(tmp_path / f"{i}", LAYERS, seed=i + 1, more=more, target_modules=[*W]))
    code = (
        "import sys; from adapterhub_lite.cli import run; code = run(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    in_process(code, "merge", *parts, "--weights", *weights, "--into", folder, "-o", tmp_path / "out", "-q")
    in_process(code, "verify", tmp_path / "out", "--base", folder, "--adapters", *parts, "--all", "-q")
    got = tensors_of(tmp_path / "out")
    for name in W:
        stored = tensors[f"{name}.weight"].double()
        want = stored.numpy() + weighted([_laid_out(part, name, stored.shape) for part in parts], weights)
        assert off_by(got[f"{name}.weight"], rounded(want, dtype)) == (0, 0), name


def _laid_out(part: Path, name: str, shape: torch.Size) -> Array:
    """The delta as the layer stores its weight."""
    if name == "emb":
        of = load_file(part / "adapter_model.safetensors")
        A, B = (of[f"base_model.model.emb.lora_embedding_{which}"].double() for which in "AB")
        return 2.0 * (B @ A).T.numpy()
    if name == "conv":
        of = load_file(part / "adapter_model.safetensors")
        A, B = (of[f"base_model.model.conv.lora_{which}.weight"].double().flatten(1) for which in "AB")
        return 2.0 * (B @ A).reshape(shape).numpy()
    delta = lora_delta(part, name)
    return delta.T if name == "conv1d" else delta


def test_torch_where_a_method_computes(tmp_path: Path) -> None:
    """A bias is scaled by the method itself: of such a LoRA the factors are not all."""
    folder = write_model(tmp_path / "base", {"x.weight": draw(5, 3), "x.bias": draw(5, seed=1)})
    more = {"base_model.model.x.lora_B.bias": draw(5, seed=9)}
    part = write_lora(tmp_path / "a", {"x": (5, 3)}, more=more, lora_bias=True)
    code = (
        "import sys; from adapterhub_lite.cli import run; code = run(sys.argv[1:]);"
        "assert 'torch' in sys.modules; sys.exit(code)"
    )
    in_process(code, "merge", part, "--into", folder, "-o", tmp_path / "out", "-q")
    got = tensors_of(tmp_path / "out")
    want = draw(5, 3).double().numpy() + lora_delta(part, "x")
    assert off_by(got["x.weight"], rounded(want, torch.float32)) == (0, 0)
    bias = draw(5, seed=1).double() + 2.0 * draw(5, seed=9).double()
    assert off_by(got["x.bias"], rounded(bias.numpy(), torch.float32)) == (0, 0)


@pytest.mark.parametrize("asked", ["1", "2", ""])
def test_torch_has_as_many_threads_as_without_us(tmp_path: Path, asked: str) -> None:
    """Where nobody imported it before, and a method needed it."""
    folder = write_model(tmp_path / "base", {f"{i}.weight": draw(5, 3, seed=i) for i in range(4)}, files=4)
    more = {f"base_model.model.{i}.lora_magnitude_vector": draw(5, seed=9) for i in range(4)}
    layers = {str(i): (5, 3) for i in range(4)}
    part = write_lora(tmp_path / "a", layers, more=more, use_dora=True)
    told = "import sys, torch, threading; seen = [torch.get_num_threads()];"
    told += (
        "t = threading.Thread(target=lambda: seen.append(torch.get_num_threads())); t.start(); t.join(); print(seen)"
    )
    fold = f"import adapterhub_lite as ah; ah.fold({str(folder)!r}, ah.load({str(part)!r}), {str(tmp_path / 'out')!r});"
    without, within = in_process(told, MKL_NUM_THREADS=asked), in_process(fold + told, MKL_NUM_THREADS=asked)
    assert within.stdout == without.stdout


def test_a_run_that_fails_leaves_torch_alone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file fails while another's layer is about to be computed."""
    folder = write_model(tmp_path / "base", {f"{i}.weight": draw(5, 3, seed=i) for i in range(2)}, files=2)
    more = {f"base_model.model.{i}.lora_magnitude_vector": draw(5, seed=9) for i in range(2)}
    part = write_lora(tmp_path / "a", {str(i): (5, 3) for i in range(2)}, more=more, use_dora=True)
    real_fold, real_one, begun = task.fold_shard, threads.one, threading.Event()

    def fold_shard(job: task.Job) -> task.Done:
        if job.shard.name != "model-00001-of-00002.safetensors":
            return real_fold(job)
        assert begun.wait(30)
        raise ah.NotMergeable("no")

    def one() -> None:
        begun.set()
        time.sleep(0.3)
        real_one()

    monkeypatch.setattr(task, "fold_shard", fold_shard)
    monkeypatch.setattr(threads, "one", one)
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        with pytest.raises(ah.NotMergeable, match=r"^no$"):
            ah.fold(folder, ah.load(part), tmp_path / "out")
        time.sleep(0.5)  # what was still under way is over
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [2]


class Twice(LoRA):
    """Another delta, and the outline of LoRA, which knows nothing of it."""

    def delta(self, p: Params, site: Site) -> LowRank:
        return super().delta(p, site).scaled(2.0)


class Upside(LoRA):
    """Saves A in another order."""

    def unpack(self, saved: Params, site: Site) -> Mapping[str, torch.Tensor]:
        return {**saved, "A": saved["A"].flip(0)}


class Said(Twice):
    """The same, and says so."""

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> Outline:
        outline = super().outline(shapes)
        return outline._replace(scale=2 * outline.scale)


@pytest.mark.parametrize(("cls", "want"), [(LoRA, ("B", "A")), (Twice, None), (Upside, None), (Said, ("B", "A"))])
def test_an_outline_speaks_of_the_delta_that_its_author_knew(cls: type, want: tuple[str, str] | None) -> None:
    method = cls(rank=2)
    assert factors_told(method, method.outline({"A": (2, 3), "B": (5, 2)})) == want


def test_what_needs_the_weight_has_no_factors() -> None:
    dora = ah.method("dora", rank=2)
    assert factors_told(dora, Outline(2, factors=("B", "A"))) is None
