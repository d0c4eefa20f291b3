"""`adapter merge --recipe`: the file gives the bytes that the command line gives, and nothing wrong in it gets by."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peers import LLAMA, dense_delta, write_adapter

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade

    Command = Callable[..., Done]

LAYERS = {"net.layers.0.q": 2, "net.layers.0.k": 2, "net.layers.1.q": 2}
AB = '[[adapters]]\npath = "a"\n[[adapters]]\npath = "b"\n'


@pytest.fixture
def ab(handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters a and b in the working directory, which is returned."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        handmade(tmp_path / name, LAYERS, seed=seed)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weighted(a: float, b: float) -> str:
    return f'[[adapters]]\npath = "a"\nweight = {a}\n[[adapters]]\npath = "b"\nweight = {b}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (AB, ""),
        (weighted(0.7, 0.3), "--weights 0.7 0.3"),
        (
            'dtype = "bfloat16"\nrank = 1\nany_base = true\n' + weighted(1, -0.5),
            "--weights 1 -0.5 --rank 1 --dtype bf16 --any-base",
        ),
        ('budget = "0.5kB"\n' + AB, "--budget 500"),
        ("max_error = 0.5\n" + AB, "--max-error 0.5"),
        ('rule = "ties"\nrank = 3\n[options]\ndensity = 0.4\n' + AB, "--rule ties --density 0.4 --rank 3"),
        ('rule = "dare_linear"\nrank = 3\noptions = {seed = 5}\n' + AB, "--rule dare_linear --seed 5 --rank 3"),
    ],
)
def test_a_recipe_is_the_command_line(adapter: Command, ab: Path, text: str, words: str) -> None:
    (ab / "r.toml").write_text(text)
    for given in (["--recipe", "r.toml", "-o", "one"], ["a", "b", *words.split(), "-o", "two"]):
        done = adapter("merge", *given)
        assert done.code == 0, done
    assert files(ab / "one") == files(ab / "two")


def test_paths_are_relative_to_the_recipe(adapter: Command, ab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ab / "recipes").mkdir()
    (ab / "recipes/r.toml").write_text(AB.replace('"a"', '"../a"').replace('"b"', f'"{ab / "b"}"'))
    assert adapter("merge", "--recipe", "recipes/r.toml", "-o", "one").code == 0
    monkeypatch.chdir("/")
    assert adapter("merge", "--recipe", ab / "recipes/r.toml", "-o", ab / "two").code == 0
    assert files(ab / "one") == files(ab / "two")
    assert str(ab).encode() not in b"".join(files(ab / "one").values())


def test_weights_by_module_and_along_the_layers(adapter: Command, ab: Path) -> None:
    (ab / "r.toml").write_text(
        '[[adapters]]\npath = "a"\nweight = {"*.k" = 0.5, "*.q" = [1, 3]}\n'
        '[[adapters]]\npath = "b"\nweight = {"*" = 2}\n'
    )
    assert adapter("merge", "--recipe", "r.toml", "-o", "out", "-q").code == 0
    a, b, out = (dense_delta(ab / name) for name in ("a", "b", "out"))
    for site, w in {"net.layers.0.q": 1, "net.layers.0.k": 0.5, "net.layers.1.q": 3}.items():
        torch.testing.assert_close(out[site], w * a[site] + 2 * b[site], rtol=1e-6, atol=1e-5)


def test_options_by_module(adapter: Command, ab: Path) -> None:
    (ab / "r.toml").write_text('rule = "magnitude_prune"\nrank = 7\n[at."*.k"]\ndensity = 1.0\n' + weighted(1, 1))
    assert adapter("merge", "--recipe", "r.toml", "-o", "out").code == 0
    a, b, out = (dense_delta(ab / name) for name in ("a", "b", "out"))
    torch.testing.assert_close(out["net.layers.0.k"], a["net.layers.0.k"] + b["net.layers.0.k"], rtol=1e-5, atol=1e-5)
    whole = a["net.layers.0.q"] + b["net.layers.0.q"]
    assert (out["net.layers.0.q"] - whole).norm() > 0.1 * whole.norm()


def test_pins(adapter: Command, ab: Path) -> None:
    digest = {name: hashlib.sha256((ab / "a" / name).read_bytes()).hexdigest() for name in files(ab / "a")}
    config, tensors = digest["adapter_config.json"], digest["adapter_model.safetensors"]
    pinned = f'[[adapters]]\npath = "a"\nsha256 = {{"adapter_config.json" = "{config}"}}\n'
    for text in (f'[[adapters]]\npath = "a"\nsha256 = "{tensors.upper()}"\n', pinned):
        (ab / "r.toml").write_text(text)
        assert adapter("merge", "--recipe", "r.toml", "-o", "out", "--force").code == 0
    path = ab / "a/adapter_config.json"
    path.write_bytes(path.read_bytes().replace(b'"lora_alpha": 8', b'"lora_alpha": 9'))
    adapter("merge", "--recipe", "r.toml", "-o", "out", "--force").refused(
        "a/adapter_config.json", config, "adapters[0].sha256"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["no adapters"]),
        ("adapters = 3", ["no adapters"]),
        ("rule = ", ["not valid TOML"]),
        ("rnak = 3\n" + AB, ["'rnak'", "did you mean 'rank'?"]),
        ('file = "x"\n' + AB, ["'file'"]),
        ('[[adapters]]\npath = "a"\nweigth = 3\n', ["adapters[0]", "'weigth'", "'weight'"]),
        ("[[adapters]]\nweight = 3\n", ["adapters[0]", "no path"]),
        ('[[adapters]]\npath = "a"\nweight = "3"\n', ["adapters[0]", "weight='3'"]),
        ('[[adapters]]\npath = "a"\nweight = nan\n', ["adapters[0]", "weight=nan"]),
        ('[[adapters]]\npath = "a"\nweight = {"*" = []}\n', ["adapters[0]", "weight="]),
        ('[[adapters]]\npath = "a"\nweight = {"*.kk" = 1, "*" = 2}\n', ["adapters[0].weight", "'*.kk'"]),
        ('[[adapters]]\npath = "a"\nweight = {"*.k" = 1}\n', ["net.layers.0.q", "no pattern"]),
        ('[[adapters]]\npath = "a"\nsha256 = "12"\n', ["adapters[0].sha256", "64 hexadecimal digits"]),
        ('[[adapters]]\npath = "a"\nsha256 = {x = "' + "0" * 64 + '"}\n', ["adapters[0].sha256", "no file 'x'"]),
        ('[[adapters]]\npath = "a"\nweight = 1\n[[adapters]]\npath = "b"\n', ["adapters[1]", "no weight"]),
        ('[[adapters]]\npath = "aa"\n', ["no such adapter", "'a'"]),
        ("rank = 0\n" + AB, ["rank=0", "at least 1"]),
        ("rank = true\n" + AB, ["rank=True", "an integer"]),
        ("rank = 1\nmax_error = 0.1\n" + AB, ["max_error", "beside rank"]),
        ("max_error = 1.0\n" + AB, ["max_error=1.0", "below 1"]),
        ('budget = "1 furlong"\n' + AB, ["budget", "not a size"]),
        ('dtype = "int8"\n' + AB, ["dtype='int8'", "'bfloat16'"]),
        ('keep = "c"\n' + AB, ["keep", "'c'"]),
        ('rule = "tise"\n' + AB, ["'tise'", "'ties'"]),
        ('rule = "ties"\nrank = 1\noptions = {density = 2}\n' + AB, ["density=2", "at most 1"]),
        ('rule = "ties"\nrank = 1\noptions = {denisty = 1}\n' + AB, ["'denisty'", "'density'"]),
        ("options = {density = 1}\n" + AB, ["options", "none is named"]),
        ('rule = "mean"\nat = {"*" = 3}\n' + AB, ["at=", "a table"]),
        ('rule = "magnitude_prune"\nrank = 1\nat = {"*.x" = {density = 1.0}}\n' + AB, ["at", "'*.x'"]),
        ('rule = "mean"\n' + weighted(1, -2), ["shares of an average"]),
        ("rounding_seed = 3\n" + AB, ["rounding_seed", "into"]),
        ('into = "base"\ndtype = "float16"\n' + AB, ["dtype", "model"]),
    ],
)
def test_what_is_wrong_in_it_is_refused(adapter: Command, ab: Path, text: str, said: list[str]) -> None:
    (ab / "r.toml").write_text(text)
    line = adapter("merge", "--recipe", "r.toml", "-o", "out").refused(*said)
    assert "r.toml" in line or "no such adapter" in line or "rule" in line
    assert not (ab / "out").exists()


def test_a_file_that_is_not_there(adapter: Command, ab: Path) -> None:
    adapter("merge", "--recipe", "none.toml", "-o", "out").refused("none.toml", "no such file")


@pytest.mark.parametrize(
    "words", ["a b", "--rank 3", "--weights 1", "--any-base", "--rule ties", "--rule ties --density 0.4", "--into b"]
)
def test_words_that_contradict_it_are_wrong_usage(adapter: Command, ab: Path, words: str) -> None:
    (ab / "r.toml").write_text(AB)
    done = adapter("merge", "--recipe", "r.toml", "-o", "out", *words.split())
    assert done.code == 2
    assert "beside --recipe" in done.err
    assert not (ab / "out").exists()


def test_keep(adapter: Command, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, LLAMA, rank=2, alpha=3, seed=seed, modules_to_save=["lm_head"])
    (tmp_path / "r.toml").write_text(AB)
    adapter("merge", "--recipe", tmp_path / "r.toml", "-o", tmp_path / "out").refused("--keep a")
    (tmp_path / "r.toml").write_text('keep = "b"\n' + AB)
    assert adapter("merge", "--recipe", tmp_path / "r.toml", "-o", tmp_path / "out").code == 0
    kept, of_b = (ah.load(tmp_path / name).source.contents for name in ("out", "b"))
    (one,), (two,) = ([v.read_bytes() for c in x.values() for v in c.kept.values()] for x in (kept, of_b))
    assert one == two


def test_into_a_base(adapter: Command, tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, LLAMA, rank=2, alpha=3, seed=seed)
    (tmp_path / "r.toml").write_text('into = "base"\nrounding = "stochastic"\nrounding_seed = 4\n' + weighted(0.7, 0.3))
    assert adapter("merge", "--recipe", tmp_path / "r.toml", "-o", tmp_path / "one").code == 0
    given = [
        tmp_path / "a",
        tmp_path / "b",
        "--weights",
        "0.7,0.3",
        "--into",
        tmp_path / "base",
        "--rounding",
        "stochastic",
    ]
    given += ["--rounding", "stochastic", "--rounding-seed", 4]
    assert adapter("merge", *given, "-o", tmp_path / "two").code == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
