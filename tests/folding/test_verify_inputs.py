"""`adapter verify` with what a model or an adapter was made of: another input or another number is found and named."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import peers  # noqa: F401  # before transformers: no access to the Hub
import pytest
import torch
from fold_models import digests, draw, write_lora, write_model
from safetensors.torch import load_file, save_file

import adapterhub_lite as ah
from adapterhub_lite.folding import again, blocks, manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS = {"net.q": (9, 6), "net.k": (5, 8)}


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in two files, two adapters, and what they were folded to."""
    folder = tmp_path_factory.mktemp("folded")
    tensors = {"net.q.weight": draw(9, 6), "net.q.bias": draw(9, seed=1), "net.k.weight": draw(5, 8, seed=2)}
    tensors |= {"net.other.weight": draw(7, 3, seed=3), "net.norm.weight": draw(6, seed=4)}
    base = write_model(folder / "base", {key: t.bfloat16() for key, t in tensors.items()}, files=2)
    (base / "tokenizer").mkdir()
    (base / "tokenizer/vocab.txt").write_text("a\nb\n")
    write_lora(folder / "a", LAYERS, seed=1)
    write_lora(folder / "b", {"net.q": (9, 6)}, rank=2, seed=2)
    ah.fold(base, 0.7 * ah.load(folder / "a") - 0.5 * ah.load(folder / "b"), folder / "out")
    return folder


@pytest.fixture
def here(folded: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    shutil.copytree(folded, tmp_path / "here")
    return tmp_path / "here"


def verify(here: Path, **options: Any) -> Any:
    return ah.verify(here / "out", here / "base", [here / "b", here / "a"], **options)


def test_what_is_whole_is_said_to_be(folded: Path) -> None:
    before = digests(folded)
    found = ah.verify(folded / "out")
    assert (found.kind, found.files, found.tensors, found.numbers) == ("model", 5, 5, 0)
    assert "--base" in found.unchecked[0]
    found = verify(folded)
    assert found.numbers == found.of == 9 * 6 + 5 * 8
    assert found.unchecked == ()
    assert digests(folded) == before


def test_bytes_of_the_manifest(here: Path) -> None:
    """Each digest, and the recipe: a byte that is another is refused, or names what it says of."""
    path = here / "out" / manifest.NAME
    whole, rng = path.read_bytes(), random.Random(1)
    start, stop = whole.index(b'"recipe"'), whole.index(b'"files"')
    for _ in range(60):
        at = rng.randrange(start, stop)
        if whole[at : at + 1] in b' \n"':
            continue
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        told = json.loads(path.read_bytes()) if _is_json(path) else None
        if told is not None and _meaning(told) == _meaning(json.loads(whole)):
            continue
        with pytest.raises(ah.AdapterError):
            verify(here)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _meaning(told: Any) -> Any:
    """The manifest without names that decide nothing: of the base and of the adapters."""
    recipe = {key: value for key, value in told.get("recipe", {}).items() if key != "base"}
    return json.loads(json.dumps({**told, "recipe": recipe}), object_hook=_unnamed)


def _unnamed(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "adapter"}


def test_hidden_files_are_said_to_be_unchecked(here: Path) -> None:
    (here / "out/.gitattributes").write_text("*.safetensors filter=lfs")
    (here / "out/.cache").mkdir()
    assert ah.verify(here / "out").unchecked[0] == "hidden files: .cache, .gitattributes"


def test_a_link_that_leads_nowhere(here: Path, adapter: Callable[..., Any]) -> None:
    (here / "out/config.json").unlink()
    (here / "out/config.json").symlink_to(here / "nowhere")
    adapter("verify", here / "out").refused("config.json")
    with pytest.raises(ah.FileError):
        ah.verify(here / "out")


# A manifest that was corrected ------------------------------------------------------------------------


def change(here: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Another tensor, and the digest of its file in the manifest."""
    for file in (here / "out").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            start, length = file.read_bytes(), int.from_bytes(file.read_bytes()[:8], "little")
            info = json.loads(start[8 : 8 + length])[name]["data_offsets"]
            new = change(tensors[name].clone()).view(torch.uint8).numpy().tobytes()
            at = 8 + length + info[0]
            file.write_bytes(start[:at] + new + start[at + len(new) :])
            _correct(here / "out", file.name)
            return file.name
    raise AssertionError(name)


def _correct(out: Path, name: str) -> None:
    path = out / manifest.NAME
    told = json.loads(path.read_text())
    told["files"][name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(told))


def one_off(tensor: torch.Tensor) -> torch.Tensor:
    """The last number, one unit in the last place off."""
    tensor.view(torch.int16).view(-1)[-1] += 1
    return tensor


@pytest.mark.parametrize("name", ["net.q.weight", "net.k.weight", "net.q.bias", "net.other.weight", "net.norm.weight"])
def test_a_wrong_tensor(name: str, here: Path, adapter: Callable[..., Any]) -> None:
    file = change(here, name, one_off)
    assert adapter("verify", here / "out").code == 0  # the digests are right
    done = adapter("verify", here / "out", "--base", here / "base", "--adapters", here / "a", here / "b")
    done.refused(file, repr(name))


def test_all_blocks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 6)  # a row of net.q each
    monkeypatch.setattr(blocks, "STRIP", 6)
    change(here, "net.q.weight", one_off)
    some = [s for s in range(20) if _passes(here, blocks=2, seed=s)]
    assert 0 < len(some) < 20  # 2 of 9 rows are seen
    with pytest.raises(ah.FileError, match=r"net\.q\.weight"):
        verify(here, blocks=None)


def _passes(here: Path, **options: Any) -> bool:
    try:
        found = verify(here, **options)
    except ah.FileError:
        return False
    assert found.numbers < found.of
    assert any("--all" in line for line in found.unchecked)
    return True


def test_windows_of_untouched_tensors(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "WINDOW", 4)
    assert "samples of the 3 other tensors are the base's" in verify(here).checked
    assert "--all" in verify(here).unchecked[0]
    assert verify(here, blocks=None).unchecked == ()
    change(here, "net.other.weight", one_off)
    assert {_found(here, seed) for seed in range(30)} == {True, False}
    with pytest.raises(ah.FileError, match=r"net\.other\.weight"):
        verify(here, blocks=None)


def _found(here: Path, seed: int) -> bool:
    try:
        verify(here, seed=seed)
    except ah.FileError:
        return True
    return False


def test_a_config_that_is_not_the_bases(here: Path) -> None:
    (here / "out/config.json").write_text('{"model_type": "boy"}')
    _correct(here / "out", "config.json")
    ah.verify(here / "out")
    with pytest.raises(ah.FileError, match="another one beside"):
        ah.verify(here / "out", here / "base")


def test_other_inputs(here: Path, adapter: Callable[..., Any]) -> None:
    out, base, a, b = (here / name for name in ("out", "base", "a", "b"))
    adapter("verify", out, "--adapters", a).refused("'b' of the recipe")
    c = write_lora(here / "c", LAYERS, seed=3)
    adapter("verify", out, "--adapters", a, b, c).refused(str(c), "no adapter of the recipe")
    write_lora(here / "elsewhere/a", LAYERS, seed=4)
    adapter("verify", out, "--adapters", here / "elsewhere/a", b).refused("elsewhere/a/adapter_model", "SHA-256")
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))
    adapter("verify", out, "--adapters", a, b).refused("b/adapter_config.json")
    other = write_model(here / "other", {"net.q.weight": draw(9, 7)})
    adapter("verify", out, "--base", other).refused("other/model", "is missing")
    adapter("verify", out, "--base", here / "nowhere").refused("nowhere")
    shutil.rmtree(base)
    adapter("verify", out, "--base", base).refused("base")


def test_other_weights_under_the_same_headers(here: Path) -> None:
    for file in (here / "base").glob("*.safetensors"):
        save_file({key: 2 * t for key, t in load_file(file).items()}, file, {"format": "pt"})
    ah.verify(here / "out", here / "base")
    with pytest.raises(ah.FileError, match="not what the recipe gives"):
        verify(here)


# What else can have been folded -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stochastic", "at", "truncated", "ties", "dare", "chain"])
def test_recipes(how: str, folded: Path, tmp_path: Path) -> None:
    a, b = ah.load(folded / "a"), ah.load(folded / "b")
    options: dict[str, Any] = {}
    value = 0.3 * a + b
    if how == "stochastic":
        options = {"rounding": "stochastic", "seed": 5}
    elif how == "at":
        options = {"weights": [{"net.q": [0.1, 2], "*": 3}, 1]}  # the first that matches: sorted, it would be *
    elif how == "truncated":
        value = (a + b).truncate(rank=2) + 0.5 * b.truncate(max_error=0.5)
    elif how == "ties":
        value = ah.merge([a, b], "ties", weights=[1, {"*.k": 0.5, "*": 2}], scope="site", at={"*.k": {"density": 0.9}})
    elif how == "dare":
        value = ah.merge([a, b], "dare_linear", density=0.5, seed=3)
    else:
        value = 0.5 * ah.merge([ah.merge([a, b]), b], "slerp", weights=[0.7, 0.3])
    ah.fold(folded / "base", value, tmp_path / "out", **options)
    found = ah.verify(tmp_path / "out", folded / "base", [folded / "a", folded / "b"])
    assert found.numbers == found.of


def test_methods_that_merge_themselves_and_change_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(blocks, "STRIP", 16)
    model = nn.Sequential()
    model.add_module("net", nn.Sequential())
    model.net.add_module("q", nn.Linear(6, 9))
    adapters = ah.adapt(model)
    for name, method in (
        ("dora", ah.method("dora", rank=2)),
        ("ia3", ah.method("ia3")),
        ("bitfit", ah.method("bitfit")),
    ):
        adapters.add(name, method, "all-linear")
        adapters.activate(name)
        with torch.no_grad():
            for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
                p.add_(draw(*p.shape, seed=i, std=0.3))
        adapters.save(name, tmp_path / name)
    base = write_model(tmp_path / "base", {"net.q.weight": draw(9, 6), "net.q.bias": draw(9, seed=1)})
    parts = [tmp_path / name for name in ("dora", "ia3", "bitfit")]
    ah.fold(base, sum(map(ah.load, parts)), tmp_path / "out", any_base=True)  # type: ignore[arg-type]
    found = ah.verify(tmp_path / "out", base, parts, blocks=1)
    assert found.numbers == found.of  # the bias depends on all rows
    change(tmp_path, "net.q.bias", lambda t: t.nextafter(t + 1))
    with pytest.raises(ah.FileError, match=r"net\.q\.bias"):
        ah.verify(tmp_path / "out", base, parts, blocks=1)


PREFIX = "base_model.model."


@pytest.mark.parametrize("keep", ["a", "b", "none"])
def test_trained_heads(keep: str, tmp_path: Path) -> None:
    """The recipe says whose, by the digest of its file."""
    base = write_model(tmp_path / "base", {"net.q.weight": draw(9, 6), "head.weight": draw(7, 9, seed=2).bfloat16()})
    for seed, name in enumerate("ab"):
        more = {f"{PREFIX}head.weight": draw(7, 9, seed=5 + seed)}
        write_lora(tmp_path / name, {"net.q": (9, 6)}, seed=seed, more=more, modules_to_save=["head"])
    parts = [tmp_path / "a", tmp_path / "b"]
    a, b = map(ah.load, parts)
    ah.fold(base, a + b, tmp_path / "out", keep=keep if keep == "none" else str(tmp_path / keep))
    ah.verify(tmp_path / "out", base, parts)
    change(tmp_path, "head.weight", one_off)
    with pytest.raises(ah.FileError, match=r"head\.weight"):
        ah.verify(tmp_path / "out", base, parts)


def test_token_rows(tmp_path: Path) -> None:
    base = write_model(
        tmp_path / "base", {"net.q.weight": draw(9, 6), "net.emb.weight": draw(20, 6, seed=4).bfloat16()}
    )
    more = {f"{PREFIX}net.emb.token_adapter.trainable_tokens_delta": draw(2, 6, seed=9)}
    part = write_lora(tmp_path / "a", {"net.q": (9, 6)}, more=more, trainable_token_indices={"net.emb": [3, 11]})
    ah.fold(base, ah.load(part), tmp_path / "out")
    found = ah.verify(tmp_path / "out", base, [part])
    assert (found.numbers, found.of) == (9 * 6 + 6 * 6, 9 * 6 + 20 * 6)  # 2 rows, and 4 of the others
    assert "--all" in found.unchecked[0]
    found = ah.verify(tmp_path / "out", base, [part], blocks=None)
    assert found.numbers == found.of
    assert found.unchecked == ()
    for row in (11, 12):
        shutil.copytree(tmp_path / "out", tmp_path / f"{row}/out")

        def spoil(tensor: torch.Tensor, row: int = row) -> torch.Tensor:
            tensor[row, 0] += 1
            return tensor

        change(tmp_path / str(row), "net.emb.weight", spoil)
        with pytest.raises(ah.FileError, match=r"net\.emb\.weight"):
            ah.verify(tmp_path / f"{row}/out", base, [part], blocks=None)


# Strangers' manifests ---------------------------------------------------------------------------------


def hostile() -> dict[str, Any]:
    """Changes of a manifest, each by what is wrong with it."""
    digest = "0" * 64

    def files(**entries: Any) -> Callable[[Any], Any]:
        return lambda told: {**told, "files": {**told["files"], **entries}}

    def recipe(**entries: Any) -> Callable[[Any], Any]:
        return lambda told: {**told, "recipe": {**told["recipe"], **entries}}

    deep: Any = {"adapter": "a", "sha256": {"x": "y"}}
    for _ in range(100):
        deep = {"rule": "sum", "terms": [{"weight": 1, **deep}]}
    return {
        "a list": lambda told: [told],
        "no files": lambda told: {key: value for key, value in told.items() if key != "files"},
        "files a list": lambda told: {**told, "files": list(told["files"])},
        "a number": files(**{"config.json": 5}),
        "a short digest": files(**{"config.json": "0" * 63}),
        "capitals": files(**{"config.json": "A" * 64}),
        "above": files(**{"../a/adapter_config.json": digest}),
        "in between": files(**{"tokenizer/../config.json": digest}),
        "absolute": files(**{"/etc/passwd": digest}),
        "a backslash": files(**{"..\\config.json": digest}),
        "twice": files(**{"./config.json": digest}),
        "no name": files(**{"": digest}),
        "itself": files(**{manifest.NAME: digest}),
        "a NUL": files(**{"a\0b": digest}),
        "a newline": files(**{"a\nb": digest}),
        "replaced": lambda told: {**told, "replaced": [5]},
        "replaced a number": lambda told: {**told, "replaced": 5},
        "recipe a list": lambda told: {**told, "recipe": []},
        "another rule": recipe(rule="sum"),
        "no headers": recipe(headers=None),
        "headers": recipe(headers={"model-00001-of-00002.safetensors": 5}),
        "a seed": recipe(rounding="stochastic", seed="5"),
        "rounding": recipe(rounding="up"),
        "of": recipe(of=5),
        "no terms": recipe(of={"rule": "sum", "terms": []}),
        "deep": recipe(of=deep),
        "weights": lambda told: json.loads(json.dumps(told).replace('"weight": -0.5', '"weight": {"*": "x"}')),
        "a weight": lambda told: json.loads(json.dumps(told).replace('"weight": -0.5', '"weight": "-0.5"')),
        "NaN": lambda told: {**told, "retained": float("nan")},
    }  # fmt: skip


@pytest.mark.parametrize("name", list(hostile()))
def test_hostile_manifests(name: str, here: Path, adapter: Callable[..., Any]) -> None:
    path = here / "out" / manifest.NAME
    path.write_text(json.dumps(hostile()[name](json.loads(path.read_text()))))
    adapter("verify", here / "out", "--base", here / "base", "--adapters", here / "a", here / "b").refused(path.name)


def test_a_name_that_stands_twice(here: Path, adapter: Callable[..., Any]) -> None:
    path = here / "out" / manifest.NAME
    path.write_bytes(path.read_bytes().replace(b'"files"', b'"files": {}, "files"', 1))
    adapter("verify", here / "out").refused(path.name, "not a manifest of ours")


@pytest.mark.parametrize(
    "terms",
    [
        {"rule": "nobody's", "options": {}},
        {"rule": "ties", "options": {"nothing": 1}},
        {"rule": "ties", "options": {"density": "much"}},
        {"rule": "ties", "options": {}, "at": 5},
        {"rule": "ties", "version": "another", "options": {}},
    ],
)
def test_rules_that_are_not_here(terms: dict[str, Any], here: Path, adapter: Callable[..., Any]) -> None:
    path = here / "out" / manifest.NAME
    told = json.loads(path.read_text())
    told["recipe"]["of"]["terms"] = [{"weight": 1, **terms, "terms": told["recipe"]["of"]["terms"]}]
    path.write_text(json.dumps(told))
    line = adapter("verify", here / "out", "--adapters", here / "a", here / "b").refused()
    assert "rule" in line or "recipe" in line


# Adapters ---------------------------------------------------------------------------------------------


def test_a_merged_adapter(here: Path, adapter: Callable[..., Any]) -> None:
    (0.7 * ah.load(here / "a") + 0.3 * ah.load(here / "b")).save(here / "both")
    done = adapter("verify", here / "both", "--json")
    assert done.json["kind"] == "adapter"
    assert done.json["tensors"] == 4
    assert any("no digest" in line for line in done.json["unchecked"])
    done = adapter("verify", here / "both", "--adapters", here / "b", here / "a")
    assert "checked: the adapters have the digests of the recipe" in done.out
    adapter("verify", here / "both", "--adapters", here / "a").refused("'b' of the recipe")
    adapter("verify", here / "both", "--base", here / "base").refused("leave out --base")
    adapter("verify", here / "a", "--adapters", here / "b").refused("has no recipe")
    file = here / "both/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    adapter("verify", here / "both").refused("NaN")
    file.write_bytes(file.read_bytes()[:-4])
    adapter("verify", here / "both").refused("adapter_model.safetensors")


def test_usage(folded: Path, adapter: Callable[..., Any]) -> None:
    assert adapter("verify", folded / "out", "-q").out == ""
    assert adapter("verify").code == 2
    assert adapter("verify", folded / "out", "--adapters").code == 2
    done = adapter(
        "verify", folded / "out", "--adapters", folded / "a", folded / "b", "--base", folded / "base", "--all"
    )
    assert "94 of 94 changed numbers" in done.out
