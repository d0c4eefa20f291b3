"""What comes along with the weights, what stays behind, and what the command says; memory and imports."""

from __future__ import annotations

import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fold_models import digests, draw, lora_delta, real, rounded, same_bits, tensors_of, write_lora, write_model
from safetensors.torch import save_file

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done

    Command = Callable[..., Done]

LAYERS = {"net.0.q": (9, 6), "net.0.up": (14, 6), "net.1.q": (9, 6)}
ALONG = {
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer.model": "\x00\x01",
    "chat_template.jinja": "{{ messages }}",
    "README.md": "# A model",
    "1_Pooling/config.json": "{}",
    "deep/er/notes.txt": "",
}
LEFT = ["deep/w.pth", "flax_model.msgpack", "model.gguf", "onnx/model.onnx", "pytorch_model.bin", "tf_model.h5", "x.pt"]
HIDDEN = [".gitattributes", ".cache/huggingface/x.json", "deep/.secret"]


def base(folder: Path, files: int = 1) -> Path:
    own = {f"{name}.weight": draw(*shape, seed=i) for i, (name, shape) in enumerate(LAYERS.items())}
    return write_model(folder, {**own, "net.norm.weight": draw(6, seed=9)}, files=files)


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("files", [1, 4])
def test_what_comes_along_and_what_does_not(adapter: Command, tmp_path: Path, files: int) -> None:
    folder, part = base(tmp_path / "base", files), write_lora(tmp_path / "a", LAYERS)
    put(folder, {**ALONG, **dict.fromkeys([*LEFT, *HIDDEN, "pytorch_model.bin.index.json"], "?")})
    before = digests(folder)
    done = adapter("merge", part, "--into", folder, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done
    new = digests(tmp_path / "out")
    weights = {path.name for path in folder.glob("*.safetensors")} | {p.name for p in folder.glob("*.safetensors.*")}
    assert new.keys() == {*ALONG, *weights, "config.json", "adapterhub_lite.json"}
    assert {name: new[name] for name in (*ALONG, "config.json")} == {n: before[n] for n in (*ALONG, "config.json")}
    assert sorted(done.json["left"]) == sorted([*LEFT, "pytorch_model.bin.index.json"])
    assert done.json["files"] == {name: digest for name, digest in new.items() if name != "adapterhub_lite.json"}
    assert digests(folder) == before
    said = adapter("merge", part, "--into", folder, "-o", tmp_path / "out2").out
    assert "left behind" in said
    assert "and 3 more" in said


def test_links_as_in_the_hubs_cache_are_copied_by_content(tmp_path: Path) -> None:
    blobs, snapshot = base(tmp_path / "blobs", 2), tmp_path / "snapshot"
    snapshot.mkdir()
    for i, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../blobs/blob{i}")
    part = write_lora(tmp_path / "a", {"net.0.up": (14, 6)})
    for link in (False, True):
        out = tmp_path / f"out{link}"
        ah.fold(snapshot, ah.load(part), out, link=link)
        assert not [path for path in out.iterdir() if path.is_symlink()]
        assert (out / "config.json").read_bytes() == (snapshot / "config.json").read_bytes()
    assert digests(tmp_path / "outFalse") == digests(tmp_path / "outTrue")
    shutil.rmtree(blobs)
    assert len(tensors_of(tmp_path / "outFalse")) == 4


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(2)], ids=["here", "executor"])
def test_linked_files_are_the_same_file(tmp_path: Path, executor: ThreadPoolExecutor | None) -> None:
    folder, part = base(tmp_path / "base", 4), write_lora(tmp_path / "a", {"net.0.q": (9, 6)})
    before = digests(folder)
    ah.fold(folder, ah.load(part), tmp_path / "out", link=True, executor=executor)
    for file in folder.glob("*.safetensors"):
        touched = file.name == "model-00001-of-00004.safetensors"
        assert (tmp_path / "out" / file.name).samefile(file) != touched
    assert not (tmp_path / "out" / "config.json").samefile(folder / "config.json")
    ah.fold(folder, ah.load(part), tmp_path / "plain")
    assert digests(tmp_path / "plain") == digests(tmp_path / "out")
    assert digests(folder) == before


def test_modules_behind_the_model_come_along(tmp_path: Path) -> None:
    """As sentence-transformers lays them out: a dense layer in a folder of its own."""
    folder, part = base(tmp_path / "base"), write_lora(tmp_path / "a", LAYERS)
    modules = [{"idx": i, "name": str(i), "path": path} for i, path in enumerate(["", "1_Pooling", "2_Dense"])]
    put(folder, {"modules.json": json.dumps(modules), "1_Pooling/config.json": "{}", "2_Dense/pytorch_model.bin": "?"})
    (folder / "fp16").mkdir()
    for name in ("2_Dense", "fp16"):
        save_file({"linear.weight": draw(3, 4)}, folder / name / "model.safetensors")
    result = ah.fold(folder, ah.load(part), tmp_path / "out")
    assert sorted(result.left) == ["2_Dense/pytorch_model.bin", "fp16/model.safetensors"]
    dense = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / dense).read_bytes() == (folder / dense).read_bytes()
    assert result.files[dense] == digests(folder)[dense]


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"path": ["x"]}]', "[" * 100_000])
def test_a_modules_json_of_something_else(tmp_path: Path, text: str) -> None:
    folder, part = base(tmp_path / "base"), write_lora(tmp_path / "a", LAYERS)
    put(folder, {"modules.json": text})
    (folder / "x").mkdir()
    save_file({"linear.weight": draw(3, 4)}, folder / "x" / "model.safetensors")
    assert ah.fold(folder, ah.load(part), tmp_path / "out").left == ("x/model.safetensors",)


def test_a_variant_beside_the_weights_stays_behind(tmp_path: Path) -> None:
    folder, part = base(tmp_path / "base"), write_lora(tmp_path / "a", LAYERS)
    save_file({"x": draw(1)}, folder / "model.fp16.safetensors")
    assert ah.fold(folder, ah.load(part), tmp_path / "out").left == ("model.fp16.safetensors",)
    assert list((tmp_path / "out").glob("*.safetensors")) == [tmp_path / "out" / "model.safetensors"]


def test_a_file_of_another_name(tmp_path: Path) -> None:
    folder, part = base(tmp_path / "base"), write_lora(tmp_path / "a", LAYERS)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    ah.fold(folder, ah.load(part), tmp_path / "out")
    assert len(tensors_of(tmp_path / "out")) == 4


def test_a_folded_models_own_facts_are_not_the_bases(tmp_path: Path) -> None:
    folder, part = base(tmp_path / "base"), write_lora(tmp_path / "a", LAYERS)
    first = ah.fold(folder, ah.load(part), tmp_path / "one")
    second = ah.fold(tmp_path / "one", 2 * ah.load(part), tmp_path / "two")
    told = json.loads((tmp_path / "two" / "adapterhub_lite.json").read_text())
    assert told["recipe"] == second.recipe != first.recipe
    assert "adapterhub_lite.json" not in told["files"]


def test_nothing_in_the_result_tells_where_it_was_made(tmp_path: Path) -> None:
    folder, part = base(tmp_path / "base"), write_lora(tmp_path / "a", LAYERS)
    ah.fold(folder, ah.load(part), tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    folder, part = base(tmp_path / "base", 3), write_lora(tmp_path / "a", {"net.0.q": (9, 6)})
    steps: list[tuple[int, int]] = []
    ah.fold(folder, ah.load(part), tmp_path / "out", progress=lambda done, total: steps.append((done, total)))
    assert {total for _, total in steps} == {sum(path.stat().st_size for path in folder.iterdir())}
    done = [done for done, _ in steps]
    assert done == sorted(done)
    assert steps[-1][0] == steps[-1][1]


# The command ------------------------------------------------------------------------------------------


def test_default_weights_are_said_aloud(adapter: Command, tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    parts = [write_lora(tmp_path / key, LAYERS, seed=i) for i, key in enumerate("ab")]
    done = adapter("merge", *parts, "--into", folder, "-o", tmp_path / "out")
    assert "1/2 each" in done.err
    a, b = map(ah.load, parts)
    ah.fold(folder, 0.5 * a + 0.5 * b, tmp_path / "want")
    assert digests(tmp_path / "out") == digests(tmp_path / "want")
    assert adapter("merge", *parts, "--into", folder, "-o", tmp_path / "quiet", "-q") == (0, "", "")


def test_weights_by_module(adapter: Command, tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    parts = [write_lora(tmp_path / key, LAYERS, seed=i) for i, key in enumerate("ab")]
    words = ["-w", "0.7", "-0.3", "--at", "*.up=0.5,-1", "--at", "net.1.*=0,2"]
    words += ["--rounding", "stochastic", "--rounding-seed", "4"]
    done = adapter("merge", *parts, "--into", folder, "-o", tmp_path / "out", *words, "--json")
    assert done.code == 0, done
    a, b = map(ah.load, parts)
    own = [{"*.up": 0.5, "net.1.*": 0.0, "*": 0.7}, {"*.up": -1.0, "net.1.*": 2.0, "*": -0.3}]
    ah.fold(folder, a + b, tmp_path / "want", weights=own, rounding="stochastic", seed=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "want")
    pairs = [[[*pair] for pair in weights.items()] for weights in own]  # the order counts
    assert [term["weight"] for term in done.json["recipe"]["of"]["terms"]] == pairs


def test_a_truncated_sum_is_folded(adapter: Command, tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    parts = [write_lora(tmp_path / key, LAYERS, seed=i) for i, key in enumerate("ab")]
    done = adapter("merge", *parts, "--into", folder, "-o", tmp_path / "out", "-w", "1", "1", "--rank", "2")
    assert done.code == 0, done
    a, b = map(ah.load, parts)
    delta: Any = (a + b).truncate(rank=2).delta("net.0.up")
    want = tensors_of(folder)["net.0.up.weight"].double() + delta.dense().double()
    got = tensors_of(tmp_path / "out")["net.0.up.weight"]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


def test_a_plan_needs_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    folder, part = base(tmp_path / "base", 4), write_lora(tmp_path / "a", {"net.0.q": (9, 6), "net.1.q": (9, 6)})
    (folder / "old.bin").write_text("?")
    before = digests(tmp_path)
    code = (
        "import sys; from adapterhub_lite.cli import run; code = run(sys.argv[1:]);"
        "assert not {'torch', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    words = ["merge", part, "--into", folder, "-o", tmp_path / "out", "--dry-run"]
    done = real("-c", code, *words, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    guess = told.pop("estimate")
    assert 0 < guess["seconds"] < 60
    assert 5 * 10**7 < guess["memory"] < 3 * 10**8
    assert told == {
        "dry_run": True,
        "base": str(folder),
        "adapters": [{"ref": str(part), "weight": 1.0}],
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.name != "old.bin"),
        "bytes_computed": 2 * 9 * 6 * 4,
        "layers": {"net.0.q": [9, 6], "net.1.q": [9, 6]},
        "replaced": [],
        "left": ["old.bin"],
    }
    said = real("-c", code, *words)
    assert "would write" in said.stdout
    assert "2 layers changed, in 2 of 4 files" in said.stdout
    assert "estimate, within a factor of a few: " in said.stdout
    assert re.search(r"net\.0\.q +9×6 +\d+ +216", said.stdout)
    assert digests(tmp_path) == before
    refused = real("-c", code, "merge", write_lora(tmp_path / "z", {"no": (2, 2)}), *words[2:])
    assert refused.returncode == 1
    assert "'no', which the base does not have" in refused.stderr


# Memory -----------------------------------------------------------------------------------------------


def sparse_model(folder: Path, megabytes: int) -> dict[str, tuple[int, int]]:
    """A bfloat16 model of zeros in one file with holes: it takes no room on the disk, and reads like any."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shape, size = (4096, 2560), 4096 * 2560 * 2
    names = [f"l.{i}.up" for i in range(megabytes * 10**6 // size)]
    header = {
        f"{name}.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + len(names) * size)
    return dict.fromkeys(names[::3], shape)


def peak(tmp_path: Path, megabytes: int) -> int:
    """The whole process's peak memory in bytes, for folding into a model of that size."""
    here = tmp_path / str(megabytes)
    here.mkdir()
    layers = sparse_model(here / "base", megabytes)
    part = write_lora(here / "a", layers, rank=16, std=0.01)
    code = (  # what getrusage gives would be that of the process which started this one, if it is larger
        "import sys; from adapterhub_lite.cli import run; code = run(sys.argv[1:]);"
        "print(code, *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = real("-c", code, "merge", part, "--into", here / "base", "-o", here / "out", "-q", OMP_NUM_THREADS="2")
    status, most = done.stdout.split()
    assert status == "0", done.stderr
    shutil.rmtree(here)
    return int(most) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small, large = peak(tmp_path, 100), peak(tmp_path, 400)
    assert large < 150e6
    assert large - small < 20e6  # though the model has 300 MB more


def test_a_sparse_model_is_folded_right(tmp_path: Path) -> None:
    layers = sparse_model(tmp_path / "base", 50)
    part = write_lora(tmp_path / "a", layers, rank=4, std=0.01)
    ah.fold(tmp_path / "base", ah.load(part), tmp_path / "out")
    got = tensors_of(tmp_path / "out")
    for name in layers:
        assert same_bits(got[f"{name}.weight"], rounded(lora_delta(part, name), torch.bfloat16))
    assert not bool(got["l.1.up.weight"].any())
