"""Models on the Hub, with the real client, offline, on a cache as it lays it out; and what is a reference."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
import torch
from hub_server.storage import git_sha1
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from adapterhub_lite.errors import HubError
from adapterhub_lite.hub.pull import snapshot
from adapterhub_lite.hub.reference import Reference, in_cache, parse

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
    save_file({"net.layers.0.q.weight": weight}, tmp_path / "w", {"format": "pt"})
    data = (tmp_path / "w").read_bytes()
    for name, blob, content in (
        ("model.safetensors", hashlib.sha256(data).hexdigest(), data),
        ("config.json", git_sha1(b"{}"), b"{}"),
    ):
        (repo / "blobs" / blob).write_bytes(content)
        (repo / "snapshots" / SHA / name).symlink_to(Path("../..") / "blobs" / blob)
    return cache


@pytest.mark.parametrize("ref", ["my-org/base", "my-org/base@main", "my-org/base@v1", f"my-org/base@{SHA}"])
def test_what_is_in_the_cache_is_found(cache: Path, ref: str) -> None:
    assert snapshot(ref).resolve() == (cache / "models--my-org--base" / "snapshots" / SHA).resolve()
    assert snapshot(Path(ref)) == snapshot(ref)


def test_what_was_changed_in_the_cache_is_refused(cache: Path) -> None:
    snapshot("my-org/base")
    (weights,) = (cache / "models--my-org--base" / "blobs").glob("?" * 64)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(HubError, match=r"has the sha256 .* the Hub announced .* without HF_HUB_OFFLINE") as found:
        snapshot("my-org/base")
    assert found.value.reason == "corrupt"


def test_a_folder_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-org/base").mkdir(parents=True)
    assert snapshot("my-org/base") == Path("my-org/base")


@pytest.mark.parametrize("text", ["base", "/a/b", "./a/b", "../b", "a/b/c", "a/b@", "-a/b", "a/b c", "a/.b", ""])
def test_what_is_no_reference_is_a_path(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert snapshot(text) == Path(text)
    assert parse(text) is None


@pytest.mark.parametrize(
    "text",
    ["a/b@..", "a/b@x..y", "a/b@/x", "a/b@x//y", "a/b:", "a/b:../c", "a/b:c/../d", "a/b:/c", "a/b:.git", "a/b:c\\d"],
)
def test_what_would_lead_elsewhere_is_no_reference(text: str) -> None:
    assert parse(text) is None


def test_references() -> None:
    assert parse("a/b@refs/pr/1:x y/z") == Reference("a/b", "refs/pr/1", "x y/z")
    assert str(parse("a/b.c@v1.0:d")) == "a/b.c@v1.0:d"
    pinned = parse(f"a/b@{SHA}")
    assert pinned is not None
    assert pinned.pinned
    assert not Reference("a/b", "main").pinned
    assert in_cache(Path("/x/models--a--b.c/snapshots") / SHA / "d/e") == Reference("a/b.c", SHA, "d/e")
    assert in_cache(Path("/x/snapshots/y")) is None


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
    done.refused(f"{ref}: is no folder, is not in the Hub's cache, and offline mode is on", "HF_HUB_OFFLINE")
    assert not (tmp_path / "out").exists()
