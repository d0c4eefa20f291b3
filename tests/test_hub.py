"""Models on the Hub, with the real client, offline, on a cache made by hand; and what its errors become."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from adapterhub_lite.errors import FileError
from adapterhub_lite.hub import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade

    Command = Callable[..., Done]

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, `my-org/base`, as the client lays it out."""
    assert constants.HF_HUB_OFFLINE
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--my-org--base"
    for name in ("blobs", "refs", f"snapshots/{SHA}"):
        (repo / name).mkdir(parents=True)
    for ref in ("main", "v1"):
        (repo / "refs" / ref).write_text(SHA)
    weight = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    save_file({"net.layers.0.q.weight": weight}, repo / "blobs" / "b0", {"format": "pt"})
    (repo / "blobs" / "b1").write_text("{}")
    for name, blob in (("model.safetensors", "b0"), ("config.json", "b1")):
        (repo / "snapshots" / SHA / name).symlink_to(Path("../..") / "blobs" / blob)
    return cache


@pytest.mark.parametrize("ref", ["my-org/base", "my-org/base@main", "my-org/base@v1", f"my-org/base@{SHA}"])
def test_what_is_in_the_cache_is_found(cache: Path, ref: str) -> None:
    assert snapshot(ref).resolve() == (cache / "models--my-org--base" / "snapshots" / SHA).resolve()
    assert snapshot(Path(ref)) == snapshot(ref)


def test_a_folder_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-org/base").mkdir(parents=True)
    assert snapshot("my-org/base") == Path("my-org/base")


@pytest.mark.parametrize("text", ["base", "/a/b", "./a/b", "../b", "a/b/c", "a/b@", "-a/b", "a/b c", "a/.b", ""])
def test_what_is_no_reference_is_a_path(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert snapshot(text) == Path(text)


def test_a_fold_into_a_model_of_the_cache(cache: Path, handmade: Handmade, adapter: Command, tmp_path: Path) -> None:
    own = handmade(tmp_path / "a", {"net.layers.0.q": 2})
    done = adapter("merge", own, "--into", "my-org/base@v1", "-o", tmp_path / "out")
    assert done.code == 0, done
    factors = load_file(own / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.net.layers.0.q.lora_{x}.weight"].double() for x in "AB")
    old = load_file(cache / "models--my-org--base" / "snapshots" / SHA / "model.safetensors")
    expected = (old["net.layers.0.q.weight"].double() + 4 * B @ A).float()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["net.layers.0.q.weight"], expected)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert adapter("merge", own, "--into", "my-org/base", "--dry-run").code == 0
    done = adapter("verify", tmp_path / "out", "--base", "my-org/base@v1", "--adapters", own)
    assert "91 of 91 changed numbers" in done.out


@pytest.mark.parametrize("ref", ["my-org/other", "my-org/base@v2"])
def test_offline_without_it(cache: Path, handmade: Handmade, adapter: Command, tmp_path: Path, ref: str) -> None:
    own = handmade(tmp_path / "a", {"net.layers.0.q": 2})
    done = adapter("merge", own, "--into", ref, "-o", tmp_path / "out")
    done.refused(f"{ref}: is no folder, is not in the Hub's cache, and could not be fetched", "HF_HUB_OFFLINE")
    assert not (tmp_path / "out").exists()


class Answer:
    """As much of an HTTP response as the client's errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, "is gated"),
        (errors.RepositoryNotFoundError, "if it is private"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.HfHubHTTPError, "could not be fetched from the Hub: the first line; try again later"),
    ],
)
def test_errors_are_typed(kind: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **options: object) -> str:
        raise kind("the first line\nand more", response=Answer())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileError, match=words) as refused:
        snapshot("some/model")
    assert refused.value.where == "some/model"


def test_no_pickle_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.update(options) or os.curdir
    )
    assert snapshot("some/model@v3") == Path()
    assert asked["revision"] == "v3"
    for name, wanted in {
        "model.safetensors": 1,
        "config.json": 1,
        "tokenizer.model": 1,
        "pytorch_model.bin": 0,
    }.items():
        assert any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) == wanted
