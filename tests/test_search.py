"""Adapters on a Hub by their base: method and size from headers, and no more fetched than those."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from adapterhub_lite.errors import ConfigError, HubError, UnknownName
from adapterhub_lite.hub.search import search

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Done, Handmade
    from hub_server import HubServer

    Command = Callable[..., Done]

BASE = "my-org/base-7b"
CARD = f"---\nbase_model: {BASE}\nbase_model_relation: adapter\n---\n".encode()


def config(**entries: object) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q"], **entries}).encode()


@pytest.fixture
def filled(hub: HubServer, handmade: Handmade, tmp_path: Path) -> HubServer:
    """Four adapters of the base, one of another, one that is a pickle, one that is gated."""
    for n, rank in enumerate((2, 3, 4)):
        hub.add(f"some/lora-{n}", handmade(tmp_path / f"a{n}", {"net.layers.0.q": rank}), downloads=10 * n)
    ranks = {"net.layers.0.q": 2000, "net.layers.1.q": 1000}
    hub.add("some/large", handmade(tmp_path / "large", ranks, use_rslora=True), downloads=5)
    hub.add("some/pickle", {"adapter_config.json": config(), "adapter_model.bin": b"x"}, downloads=7)
    hub.add("some/gated", tmp_path / "a0", downloads=3, gated="manual")
    for name in hub.storage.repos:
        hub.add(name, {"README.md": CARD})
    hub.add("some/other", tmp_path / "a1", downloads=99)
    return hub


def test_the_most_fetched_comes_first(filled: HubServer, adapter: Command) -> None:
    done = adapter("search", "--base", BASE, "--json")
    assert (done.code, done.err) == (0, "")
    found = {hit["repo"]: hit for hit in done.json["adapters"]}
    names = ["some/lora-2", "some/lora-1", "some/pickle", "some/large", "some/gated", "some/lora-0"]
    assert list(found) == names
    two = found["some/lora-2"]
    assert (two["method"], two["ranks"], two["parameters"], two["nbytes"]) == ("lora", [4], 80, 320)
    assert (two["downloads"], two["commit"]) == (20, filled.storage.repos["some/lora-2"].head.sha)
    assert found["some/large"]["ranks"] == [1000, 2000]
    assert found["some/pickle"]["method"] is None
    assert "pickle" in found["some/pickle"]["problem"]
    assert "gated" in found["some/gated"]["problem"]
    large = len(filled.storage.repos["some/large"].head.files["adapter_model.safetensors"].data)
    assert done.json["transferred"] < large / 2
    assert sum(seen.sent for seen in filled.matching("GET", "/resolve/.*safetensors")) < large / 2


def test_a_table(filled: HubServer, adapter: Command) -> None:
    lines = adapter("search", "--base", BASE, "--limit", "2").out.splitlines()
    assert lines[0].split() == ["adapter", "downloads", "method", "rank", "size", "modified"]
    assert lines[1].split()[:6] == ["some/lora-2", "20", "lora", "4", "320", "bytes"]
    assert len(lines) == 4
    assert lines[-1].startswith("read: the headers of 2 models, ")
    assert adapter("search", "--base", BASE, "--limit", "1", "-q").out == "some/lora-2\n"


def test_one_method_only(filled: HubServer, adapter: Command) -> None:
    assert [hit.repo for hit in search(BASE, method="lora", limit=3).hits] == [
        "some/lora-2",
        "some/lora-1",
        "some/large",
    ]
    assert "no vera for my-org/base-7b on the Hub, of 6" in adapter("search", "--base", BASE, "--method", "vera").out
    assert "no adapter for x/y on the Hub, of 0" in adapter("search", "--base", "x/y").out
    with pytest.raises(UnknownName, match="lora"):
        search(BASE, method="lroa")
    for base, limit in (("a b", 1), ("a/b/c", 1), (BASE, 0)):
        with pytest.raises(ConfigError):
            search(base, limit=limit)


def test_a_hub_that_does_not_answer(filled: HubServer, adapter: Command) -> None:
    filled.fault("GET", "/api/models$", status=500, times=None)
    adapter("search", "--base", BASE).refused("my-org/base-7b: could not be searched for on the Hub")
    with pytest.raises(HubError):
        search(BASE)


def test_offline(hub: HubServer, adapter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter("search", "--base", BASE).refused(BASE)
    assert hub.seen == []
