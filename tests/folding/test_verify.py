"""`adapter verify`: whatever was changed in a folded model's folder is found, and named."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from small_fold import tree, write_all

import adapterhub_lite as ah
from adapterhub_lite.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done

    Command = Callable[..., Done]

NAME = "adapterhub_lite.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_all(tmp_path_factory.mktemp("verify"))
    ah.fold(home / "base", 0.5 * ah.load(home / "a"), home / "out")
    return home / "out"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def test_a_whole_one(out: Path, adapter: Command) -> None:
    files = tree(out)
    assert files is not None
    nbytes = sum(len(data) for name, data in files.items() if name != NAME)
    found = ah.verify(out)
    assert (found.files, found.nbytes, found.tensors) == (len(files) - 1, nbytes, 8)
    assert adapter("verify", out).out.startswith(f"{out} is what was written: {len(files) - 1} files, 8 tensors")
    assert adapter("verify", out, "--json").json == {"out": str(out), **found.plain()}
    assert adapter("verify", out, "-q") == (0, "", "")


def test_200_flipped_bits(out: Path) -> None:
    rng = random.Random(5)
    paths = sorted(path for path in out.rglob("*") if path.is_file() and path.name != NAME)
    for _ in range(200):
        path = rng.choice(paths)
        data = bytearray(path.read_bytes())
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        path.write_bytes(data)
        with pytest.raises(FileError, match="its SHA-256 differs") as refused:
            ah.verify(out)
        assert refused.value.where == str(path)
        data[at] ^= bit
        path.write_bytes(data)
    ah.verify(out)


def cut(out: Path) -> str:
    path = out / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path}: is not what"


def swap(out: Path) -> str:
    one, other = out / "model-0.safetensors", out / "model-1.safetensors"
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    return f"{one}: is not what"


def edit(out: Path) -> str:
    (out / "config.json").write_text('{"model_type": "toy", "auto_map": {}}')
    return f"{out / 'config.json'}: is not what"


def lose(out: Path) -> str:
    (out / "more" / "tokenizer.json").unlink()
    return f"{out / 'more' / 'tokenizer.json'}: is missing"


def add(out: Path) -> str:
    shutil.copy(out / "model-0.safetensors", out / "model.safetensors")
    return f"{out / 'model.safetensors'}: is not in the manifest"


def link_a_folder(out: Path) -> str:
    (out / "linked").symlink_to(out / "more")
    return f"{out / 'linked'}: is not in the manifest"


def a_pipe(out: Path) -> str:
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")
    return f"{out / 'config.json'}: this is not a file"


def break_a_header(out: Path) -> str:
    """With a manifest that says so: the header is read strictly all the same."""
    import hashlib

    path = out / "model-0.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    found = json.loads((out / NAME).read_text())
    found["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / NAME).write_text(json.dumps(found))
    return f"{path}: 1 bytes at the end belong to no tensor"


CHANGES = [cut, swap, edit, lose, add, link_a_folder, a_pipe, break_a_header]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_was_changed_is_named(out: Path, adapter: Command, change: Callable[[Path], str]) -> None:
    words = change(out)
    adapter("verify", out).refused(words)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", ".", "", "a//b", "./config.json", "c:\\x", "a\0b", "more"]
)
def test_hostile_names(out: Path, adapter: Command, name: str) -> None:
    (out.parent / "secret").write_text("")
    found = json.loads((out / NAME).read_text())
    found["files"][name] = "0" * 64
    (out / NAME).write_text(json.dumps(found))
    adapter("verify", out).refused("which is no file" if name != "more" else "is missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": {}}', '{"files": [], "recipe": {}}', "[" * 99999])
def test_manifests_that_are_none(out: Path, adapter: Command, text: str) -> None:
    (out / NAME).write_text(text)
    adapter("verify", out).refused(NAME, "is not a manifest of ours")


def test_a_huge_manifest(out: Path, adapter: Command) -> None:
    os.truncate(out / NAME, 1 << 33)
    adapter("verify", out).refused(NAME, "is not a manifest of ours")


def test_other_folders(whole: Path, adapter: Command) -> None:
    adapter("verify", whole.parent / "base").refused("has no adapterhub_lite.json")
    adapter("verify", whole.parent / "nothing").refused("there is no such folder")


def test_hidden_files_are_not_looked_at(out: Path) -> None:
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("")
    (out / ".gitattributes").write_text("")
    ah.verify(out)
