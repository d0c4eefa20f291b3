"""`adapter merge` as people and programs use it: spellings, reports, exit codes, and the real command end to end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peers import Peer, dense_delta, load_peft, minilm, native
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade

    Command = Callable[..., Done]

ADAPTER = Path(sys.executable).with_name("adapter")
LAYERS = {"net.layers.0.q": 2, "net.layers.0.k": 2, "net.conv": 2}


@pytest.fixture
def ab(handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters a, b and c in the working directory, which is returned."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        handmade(tmp_path / name, LAYERS, seed=seed)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def real(*args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command that is installed, in a process of its own."""
    command = [str(ADAPTER), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("a b --weights 0.7 0.3 -o out", [0.7, 0.3]),
        ("a b --weights 0.7,0.3 -o out", [0.7, 0.3]),
        ("a b --weights 0.7, 0.3 -o out", [0.7, 0.3]),
        ("a b --weights=0.7,0.3 -o out", [0.7, 0.3]),
        ("a b --weights=0.7 0.3 -o out", [0.7, 0.3]),
        ("a b -o out --weights 1 -0.5", [1, -0.5]),
        ("a b -o out --weights -0.5 1", [-0.5, 1]),
        ("a b -o out --weights -0.5,1", [-0.5, 1]),
        ("a b -o out --weights=-0.5,-1", [-0.5, -1]),
        ("a b -o out --weights=-0.5 -1", [-0.5, -1]),
        ("-o out --weights 1 -0.5 a b", [1, -0.5]),
        ("--json -o out --weights 1 -0.5 -- a b", [1, -0.5]),
        ("--weights -1 -0.5 a b -o out", [-1, -0.5]),
        ("a --weights 1 -0.5 b -o out", [1, -0.5]),
        ("a b -w 1 -0.5 --rank 2 -o out", [1, -0.5]),
        ("a b -w1,-0.5 -o out", [1, -0.5]),
        ("a b --rank 2 --weights +1 -.5 -o out", [1, -0.5]),
        ("a b --weights 1e-3 -2E+1 -o out", [1e-3, -20]),
        ("a b c --weights 1 -1 0.5 -o out", [1, -1, 0.5]),
        ("a b c --weights 1,-1 0.5 -o out", [1, -1, 0.5]),
        ("a --weights -2 -o out", [-2]),
        ("a a --weights 2 -1 -o out", [2, -1]),
        ("a b -o out", [0.5, 0.5]),
    ],
)
def test_spellings_of_weights(adapter: Command, ab: Path, words: str, weights: list[float]) -> None:
    done = adapter("merge", *words.split(), *([] if "--json" in words else ["--json"]))
    assert done.code == 0, done
    assert [term["weight"] for term in done.json["adapters"]] == weights
    if "--rank" not in words:
        out = dense_delta(ab / "out")
        for name, delta in out.items():
            exact = sum(
                w * dense_delta(ab / term["ref"])[name] for w, term in zip(weights, done.json["adapters"], strict=True)
            )
            torch.testing.assert_close(delta, exact, rtol=1e-5, atol=1e-6 * max(map(abs, weights)))


def test_weights_in_quotes(adapter: Command, ab: Path) -> None:
    for text in ("0.7 0.3", " 0.7,0.3 ", "0.7, 0.3"):
        done = adapter("merge", "a", "b", "--weights", text, "--dry-run", "--json")
        assert [term["weight"] for term in done.json["adapters"]] == [0.7, 0.3]


def test_default_weights_are_said_aloud(adapter: Command, ab: Path) -> None:
    for more in ([], ["--json"], ["--dry-run"]):
        done = adapter("merge", "a", "b", "c", "-o", "out", "--force", *more)
        assert "1/3 each" in done.err
        assert "--weights" in done.err
    for more in (["-q"], ["--weights", "1", "1", "1"]):
        assert adapter("merge", "a", "b", "c", "-o", "out", "--force", *more).err == ""
    assert adapter("merge", "a", "-o", "out", "--force").err == ""  # one adapter, weight 1
    assert load_file("out/adapter_model.safetensors").keys() == load_file("a/adapter_model.safetensors").keys()


# Wrong usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a b --weights 1 -o out", "1 weights for 2 adapters"),
        ("a b --weights 1 2 3 -o out", "3 weights for 2 adapters"),
        ("a b --weights -o out", "weights"),
        ("a b --weights x -o out", "'x' is not numbers"),
        ("a b --weights 1;2 -o out", "'1;2' is not numbers"),
        ("a b --weights , -o out", "is not numbers"),
        ("a b", "-o OUT"),
        ("-o out", "REF"),
        ("a b -o out --rank 0", "0"),
        ("a b -o out --rank -3", "-3"),
        ("a b -o out --rank x", "x"),
        ("a b -o out --max-error 0", "0"),
        ("a b -o out --max-error 1", "1"),
        ("a b -o out --budget 0", "size"),
        ("a b -o out --budget -5MB", "size"),
        ("a b -o out --budget 5XB", "size"),
        ("a b -o out --budget nanMB", "size"),
        ("a b -o out --budget infGB", "size"),
        ("a b -o out --rank 2 --budget 5MB", "exclude"),
        ("a b -o out --rank 2 --max-error 0.1", "exclude"),
        ("a b -o out --dtype float8", "float16"),
        ("a b -o out --keep d", "'d' is none of the adapters"),
        ("a b -o out --wieghts 1 2", "--weights"),
        ("a b -o out --rule tis", "did you mean 'ties'"),
        ("a b -o out --rule", "--rule"),
        ("a b -o out --density 0.5", "without --rule; rules that have it: breadcrumbs"),
        ("a b -o out --rule slerp --density 0.5", "'slerp' has no option --density; rules that have it"),
        ("a b -o out --rule ties --densty 0.5", "'--density'"),
        ("a b -o out --rule ties --density 2", "0<x<=1"),
        ("a b -o out --rule ties --density x", "'x'"),
        ("a b -o out --rule ties --scale nan", "scale=nan is not a finite number"),
        ("a b -o out --rule ties --variant pfet", "'pfet' is not one of"),
        ("a b -o out --rule della --density 0.01 --window 0.5", "window"),
        ("a b c -o out --rule slerp", "merges 2 adapters, and was given 3"),
        ("a b -o out --rule mean --weights 1 -1", "shares of an average"),
        ("a b -o out --rule model_stock --weights 1 2", "finds its own weights"),
    ],
)
def test_wrong_usage(adapter: Command, ab: Path, words: str, said: str) -> None:
    done = adapter("merge", *words.split())
    assert done.code == 2, done
    assert done.out == ""
    assert said in done.err.splitlines()[-1]
    assert not (ab / "out").exists()


def test_budget_is_a_size(adapter: Command, ab: Path) -> None:
    whole = adapter("merge", "a", "b", "--dry-run", "--json").json["bytes"]
    for text in (f"{whole}", f"{whole}B", f"{whole / 1000}kB", f"{whole / 1024} KiB", f"{whole / 1e9:.9f}GB"):
        done = adapter("merge", "a", "b", "--budget", text, "-o", "out", "--force", "--json")
        assert done.json["bytes"] == whole, text


# Reports ------------------------------------------------------------------------------------------


def test_report_is_what_was_written(adapter: Command, ab: Path) -> None:
    done = adapter("merge", "a", "b", "--weights", "1 -0.3", "--rank", 3, "--dtype", "bf16", "-o", "out", "--json")
    assert done.err == ""
    report, config = done.json, json.loads(Path("out/adapter_config.json").read_text())
    assert report["out"] == "out"
    assert report["adapters"] == [{"ref": "a", "weight": 1.0}, {"ref": "b", "weight": -0.3}]
    assert (report["dtype"], report["method"], report["base_model"], report["kept"]) == ("BF16", "lora", None, [])
    tensors = load_file("out/adapter_model.safetensors")
    assert report["bytes"] == sum(t.nbytes for t in tensors.values())
    for name, module in report["modules"].items():
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == module["rank"] == config["r"] == 3
        assert module["shape"] == list(dense_delta(ab / "out")[name].shape)
        assert 0 < module["error"] < 1
    info = adapter("info", "out", "--json").json
    assert info["error"] == report["error"]
    assert {name: module["rank"] for name, module in info["modules"].items()} == dict.fromkeys(LAYERS, 3)
    assert info["recipe"]["terms"][0]["of"]["terms"][1]["weight"] == -0.3
    digest = hashlib.sha256(Path("b/adapter_model.safetensors").read_bytes()).hexdigest()
    assert info["recipe"]["terms"][0]["of"]["terms"][1]["sha256"]["adapter_model.safetensors"] == digest
    assert "1.0 * truncated(1.0 * a + -0.3 * b; rank 3)" in adapter("info", "out").out


def test_text_report(adapter: Command, ab: Path) -> None:
    done = adapter("merge", "a", "b", "--weights", "0.7 0.3", "-o", "out")
    assert "wrote out: lora, rank 4, 3 modules, F32" in done.out
    error = json.loads(adapter("info", "out", "--json").out)["error"]
    assert f"relative error {error:.3g}" in done.out
    assert all(name in done.out for name in LAYERS)
    assert adapter("merge", "a", "b", "--weights", "0.7 0.3", "-o", "out", "--force", "-q") == (0, "", "")


def test_dry_run(adapter: Command, ab: Path) -> None:
    before = {path.name for path in ab.iterdir()}
    plan = adapter("merge", "a", "b", "--weights", "1 1", "--rank", 3, "--dry-run", "-o", "new/out", "--json")
    text = adapter("merge", "a", "b", "--weights", "1 1", "--rank", 3, "--dry-run", "-o", "new/out")
    told = plan.json
    assert told.pop("predicted_error") is None
    assert 0 < told["estimate"]["seconds"] < 60
    assert 10**8 < told.pop("estimate")["memory"] < 10**9
    assert all(f"{name}  " in text.out for name in told["modules"])
    assert "error: measured when it is written" in text.out
    assert "would write new/out" in text.out
    assert {path.name for path in ab.iterdir()} == before
    done = adapter("merge", "a", "b", "--weights", "1 1", "--rank", 3, "-o", "new/out", "--json").json
    for module in done["modules"].values():
        del module["error"]
    assert {**done, "dry_run": True} == {
        **told,
        "out": "new/out",
        "error": done["error"],
        "error_of": "delta",
    }
    assert "--force" in adapter("merge", "a", "b", "--dry-run", "-o", "new/out", "--weights", "1 1").err
    assert adapter("merge", "a", "b", "--dry-run", "-o", "new/out", "--force", "--weights", "1 1").err == ""


def test_dry_run_of_a_copy_has_no_error(adapter: Command, ab: Path) -> None:
    assert adapter("merge", "a", "--dry-run", "--json").json["predicted_error"] == 0
    assert adapter("merge", "a", "-o", "out", "--json").json["error"] == 0


def test_dry_run_tells_all_conflicts(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    for name in "ab":
        keep = {"base_model.model.net.head.weight": torch.full((2, 3), float(ord(name)))}
        handmade(
            tmp_path / name, LAYERS, tensors=lambda t, keep=keep: {**t, **keep}, modules_to_save=["head"],
            base_model_name_or_path=f"org/{name}",
        )  # fmt: skip
    adapter("merge", tmp_path / "a", tmp_path / "b", "--dry-run").refused(
        "2 conflicts", "org/a", "org/b", "head.weight", "--any-base", "--keep"
    )


@pytest.mark.parametrize(
    "words",
    [
        "merge a b --rank 3 --dry-run",
        "merge a b --dry-run --json",
        "merge a b --rule tsv --dry-run",
        "merge a b --rule ties --rank 3 --density 0.1 --dry-run --json",
        "merge --recipe r.toml --dry-run",
        "merge --rule ties --help",
        "rules",
        "rules ties",
        "info a",
        "info a --json -v",
        "methods",
        "-h",
    ],
)
def test_headers_need_no_torch(ab: Path, words: str) -> None:
    (ab / "r.toml").write_text('rule = "ties"\nrank = 2\n[[adapters]]\npath = "a"\n[[adapters]]\npath = "b"\n')
    code = "import sys; from adapterhub_lite.cli import run; sys.exit(run(sys.argv[1:]) or 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], cwd=ab, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done


# The real command ---------------------------------------------------------------------------------


def test_real_command(ab: Path) -> None:
    assert real("merge", "a", "b", "--weights", "1", "-0.5", "-o", "both", cwd=ab).returncode == 0
    exact = {name: delta - 0.5 * dense_delta(ab / "b")[name] for name, delta in dense_delta(ab / "a").items()}
    for name, delta in dense_delta(ab / "both").items():
        torch.testing.assert_close(delta, exact[name], rtol=1e-6, atol=1e-7)
    again = real("merge", "a", "b", "-o", "both", cwd=ab)
    assert (again.returncode, again.stdout) == (1, "")
    assert "both: the output exists; choose another -o or pass --force" in again.stderr
    assert again.stderr.count("\n") == 1
    assert real("merge", "a", "b", "--weights", "1", "-o", "x", cwd=ab).returncode == 2


def test_output_is_the_same_bytes(adapter: Command, ab: Path) -> None:
    """Whatever the hash seed, the threads, the spelling of the paths; and no path of this machine is in it."""
    for name in "ab":
        config = json.loads((ab / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "/home/somebody/models/base-7b"
        (ab / name / "adapter_config.json").write_text(json.dumps(config))
    how = ("--weights", "0.7", "0.3", "--budget", "700", "--force", "-q")
    assert real("merge", "a", "b", *how, "-o", "one", cwd=ab, PYTHONHASHSEED="1", OMP_NUM_THREADS="1").returncode == 0
    assert (
        real(
            "merge", ab / "a", ab / "b/", *how, "-o", ab / "two", cwd=ab.parent, PYTHONHASHSEED="2", OMP_NUM_THREADS="3"
        ).returncode
        == 0
    )
    assert adapter("merge", "a", "b", *how, "-o", "three").code == 0
    one = files(ab / "one")
    assert sorted(one) == ["adapter_config.json", "adapter_model.safetensors"]
    assert one == files(ab / "two") == files(ab / "three")
    for content in one.values():
        assert b"/home" not in content
        assert os.fsencode(ab) not in content
        assert b"/tmp" not in content
    assert json.loads(one["adapter_config.json"])["base_model_name_or_path"] == "base-7b"
    mode = (ab / "one" / "adapter_model.safetensors").stat().st_mode & 0o777
    assert mode == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_windows_paths_of_a_base_are_paths_too(adapter: Command, handmade: Handmade, tmp_path: Path) -> None:
    a = handmade(tmp_path / "a", LAYERS, base_model_name_or_path="C:\\Users\\me\\models\\base-7b")
    assert adapter("merge", a, "-o", tmp_path / "out", "-q").code == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base-7b"


def test_reader_that_goes_away(ab: Path) -> None:
    """`adapter merge … | head -0`: the adapter is there, and no traceback is."""
    with subprocess.Popen(
        [ADAPTER, "merge", "a", "b", "--weights", "1", "1", "-o", "out"],
        cwd=ab,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert err == b""
    assert (ab / "out" / "adapter_config.json").is_file()


MANY = """
import resource, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
import torch
from adapterhub_lite.cli import run
assert run(["merge", "first", "-o", "warm-up", "-q", "--weights", "0.5"]) == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
names = [f"many/{i}" for i in range(int(sys.argv[1]))]
assert run(["merge", *names, "-o", "out", "-q"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_many_adapters(handmade: Handmade, tmp_path: Path) -> None:
    """400 of 1 MB each, with 256 open files at most and much less memory than they take together."""
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.net.{i}.{key}.weight": torch.randn(shape, generator=rng)
        for i in range(16)
        for key, shape in (("lora_A", (64, 128)), ("lora_B", (128, 64)))
    }
    (tmp_path / "first").mkdir()
    save_file(tensors, tmp_path / "first" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": r"net\.\d+"}
    (tmp_path / "first" / "adapter_config.json").write_text(json.dumps(config))
    for i in range(400):
        shutil.copytree(tmp_path / "first", tmp_path / "many" / str(i), copy_function=os.link)
    done = subprocess.run(
        [sys.executable, "-c", MANY, "400"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done
    assert int(done.stdout) < 100_000  # kB, of 400,000 read
    exact = dense_delta(tmp_path / "first")
    for name, delta in dense_delta(tmp_path / "out").items():  # the mean of equal ones
        torch.testing.assert_close(delta, exact[name], rtol=1e-6, atol=1e-5)


# A real pretrained model ---------------------------------------------------------------------------


def test_minilm(written: Callable[..., Path], tmp_path: Path) -> None:
    """Two adapters on all-MiniLM-L6-v2, merged by the command; PEFT then embeds as the folded model does."""
    model, tokenizer = minilm()
    batch: dict[str, Any] = dict(
        tokenizer(["A man eats.", "Someone has lunch.", "Stocks fell."], padding=True, return_tensors="pt")
    )
    peer = Peer("minilm", lambda: minilm()[0], ["query", "value"], lambda: batch)
    shutil.copytree(written(peer, rank=8, alpha=16, seed=1), tmp_path / "a")
    shutil.copytree(
        written(peer, rank=4, alpha=2, seed=2, target_modules=["query", "dense"], use_rslora=True), tmp_path / "b"
    )
    done = real("merge", "a", "b", "--weights", "0.7", "0.3", "-o", "merged", "--json", cwd=tmp_path)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["error"] < 1e-7

    def embed(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**batch)[0]  # (sentences, tokens, width)
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    before = embed(model.double())
    with torch.no_grad():
        for folder, w in (("a", 0.7), ("b", 0.3)):
            for name, delta in dense_delta(tmp_path / folder).items():
                module = model.get_submodule(name)
                module.get_parameter("weight").add_(native(w * delta, module))
    expected = embed(model)
    assert (expected - before).abs().max() > 0.01
    found = embed(load_peft(tmp_path / "merged", peer))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
