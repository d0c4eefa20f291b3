"""What goes wrong between here and the Hub: each a typed error with a remedy, and nothing half-written."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants

from adapterhub_lite.errors import FileError, HubError
from adapterhub_lite.hub.listing import digests, digests_of
from adapterhub_lite.hub.pull import fetch, snapshot
from adapterhub_lite.hub.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade
    from hub_server import HubServer

    Command = Callable[..., Done]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def sql(hub: HubServer, handmade: Handmade, tmp_path: Path) -> Path:
    folder = handmade(tmp_path / "sql", {"net.layers.0.q": 2}, seed=1)
    hub.add("me/sql", folder)
    return folder


def left(tmp_path: Path) -> list[str]:
    """What lies in the cache and beside the output that is no listing."""
    cache = Path(constants.HF_HUB_CACHE)
    found = [p for p in tmp_path.iterdir() if p.name.startswith(".") or p.name == "out"]
    found += [p for p in cache.rglob("*") if p.is_file() and (p.name == WEIGHTS or "incomplete" in p.name)]
    return [str(path) for path in found]


RATE = {"status": 429, "headers": {"Retry-After": "7"}}
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "missing": ("/revision/", {"status": 404, "code": "RepoNotFound"}, "missing", "login' if it is private"),
    "private": ("/revision/", {"status": 401, "code": "RepoNotFound"}, "missing", "login' if it is private"),
    "revision": ("/revision/", {"status": 404, "code": "RevisionNotFound"}, "missing", "has no such revision"),
    "gated": ("/resolve/", {"status": 403, "code": "GatedRepo"}, "gated", "ask for access"),
    "entry": ("/resolve/", {"status": 404, "code": "EntryNotFound"}, "missing", "has no such file"),
    "token": ("/tree/", {"status": 401, "message": "Invalid credentials in Authorization header"}, "denied", "hf auth"),
    "forbidden": ("/tree/", {"status": 403, "message": "no"}, "denied", "use a token that may do this"),
    "rate": ("/revision/", RATE, "rate limit", "try again in 7 seconds; with a token more are allowed"),
    "rate of a file": ("/resolve/", RATE, "rate limit", "too many requests"),
    "server": ("/tree/", {"status": 500}, "server", "it has an error itself (500); try again later"),
    "server, a file": ("/resolve/", {"status": 503}, "server", "it has an error itself (503)"),
    "gateway": ("/revision/", {"status": 504}, "timeout", "took too long"),
    "conflict": ("/tree/", {"status": 409}, "conflict", "somebody else changed it"),
    "teapot": ("/tree/", {"status": 418}, "server", "could not be fetched from the Hub"),
    "time-out": ("/revision/", {"hang": True}, "timeout", "it did not answer in time"),
    "time-out of a file": ("/resolve/", {"hang": True}, "timeout", "it did not answer in time"),
    "dropped": ("/tree/", {"drop": True}, "connection", "the connection broke off"),
    "truncated": ("/resolve/.*safetensors", {"truncate": 9}, "connection", "the connection broke off"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["pull", "info"])
def test_each_fault_is_an_error_with_a_remedy(
    hub: HubServer,
    sql: Path,
    adapter: Command,
    tmp_path: Path,
    case: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, how, reason, words = CASES[case]
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.05)
    hub.fault("*", path, times=None, **how)
    done = adapter("pull", "me/sql", "-o", tmp_path / "out") if command == "pull" else adapter("info", "me/sql")
    done.refused("me/sql", words)
    assert left(tmp_path) == []
    if command == "pull":
        with pytest.raises(HubError) as refused:
            fetch(Reference("me/sql"))
        assert refused.value.reason == reason
    hub.faults.all.clear()
    assert adapter("pull", "me/sql", "-o", tmp_path / "out").code == 0


def test_who_may_not(hub: HubServer, sql: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.storage.repos["me/sql"]
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    repo.gated = "auto"
    adapter("pull", "me/sql").refused("is gated")
    repo.private = True
    adapter("pull", "me/sql").refused("you may see", "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    adapter("info", "me/sql").refused("you may see", "hf auth login")


def test_one_fault_is_gone_over(hub: HubServer, sql: Path, adapter: Command) -> None:
    for path in ("/revision/", "/tree/"):
        hub.fault("GET", path, status=503)
    hub.fault("GET", f"resolve/.*{WEIGHTS}", change=lambda body: body[:-1] + b"\xff")
    assert adapter("pull", "me/sql").code == 0
    assert hub.count("GET", WEIGHTS) == 2


def test_no_connection(hub: HubServer, sql: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = f"me/sql@{hub.storage.repos['me/sql'].head.sha}"
    assert adapter("pull", ref).code == 0
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    adapter("pull", "me/sql").refused("there is no connection to it", "HF_HUB_OFFLINE=1")
    assert adapter("pull", ref).code == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_cannot_be_written(
    hub: HubServer, sql: Path, adapter: Command, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    def full(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_download, "http_get", full)
    words = {errno.ENOSPC: "no space left on device; free some space", errno.EACCES: "check the permissions"}[number]
    adapter("pull", "me/sql", "-o", tmp_path / "out").refused(words)
    assert left(tmp_path) == []
    with pytest.raises(FileError):
        fetch(Reference("me/sql"))


def test_headers_are_read_strictly(hub: HubServer, sql: Path, adapter: Command) -> None:
    fault = hub.fault("GET", f"resolve/.*{CONFIG}", times=None, change=lambda body: body[:-1] + b" ")
    adapter("info", "me/sql").refused(f"'{CONFIG}' is not what the Hub announced", "git-sha1")
    fault.path, fault.change = WEIGHTS, lambda body: b"\xff" * 8 + body[8:]
    adapter("info", "me/sql").refused(f"/{WEIGHTS}: the header says it has", "the limit is")
    fault.change = lambda body: b"PK\x03\x04" + body
    adapter("info", "me/sql").refused(f"/{WEIGHTS}: this is a pickle")
    fault.change = lambda body: body.replace(b'"F32"', b'"F64"')
    adapter("info", "me/sql").refused(f"/{WEIGHTS}: tensor", "bytes")
    assert hub.count("GET", WEIGHTS) == 3
    assert left(Path(constants.HF_HUB_CACHE).parents[1]) == []


# 1,000 flips and truncations ------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """With one byte changed, or one or more missing at the end."""
    at = rng.randrange(len(data))
    if rng.random() < 0.5:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return data[:at]


def test_a_thousand_damages_are_detected(hub: HubServer, sql: Path, tmp_path: Path) -> None:
    pulled = fetch(Reference("me/sql"))
    rng, missed = random.Random(0), 0
    file = tmp_path / "damaged"
    for n in range(1000):
        name = sorted(pulled.files)[n % len(pulled.files)]
        own = pulled.files[name]
        data = damaged((sql / name).read_bytes(), rng)
        if n % 4:
            found = digests(iter([data]), own.size)
        else:
            file.write_bytes(data)
            found = digests_of(file)
        missed += found.match(own)
    assert missed == 0
    assert all(digests_of(sql / name).match(own) for name, own in pulled.files.items())


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_damages_on_the_wire_are_detected(hub: HubServer, sql: Path, name: str) -> None:
    rng = random.Random(1)
    for n in range(20):
        hub.faults.all.clear()
        hub.fault("GET", f"resolve/.*{name}", times=None, change=lambda body: damaged(body, rng))
        with pytest.raises(HubError) as refused:
            snapshot("me/sql")
        assert refused.value.reason in ("corrupt", "connection"), n
        assert not list(Path(constants.HF_HUB_CACHE).glob(f"**/snapshots/*/{name}"))


@pytest.mark.parametrize("way", ["bytes", "another file"])
def test_damages_in_xet_are_detected(hub: HubServer, sql: Path, tmp_path: Path, way: str) -> None:
    from dataclasses import replace

    from huggingface_hub import CommitOperationAdd, HfApi

    HfApi().create_repo("me/xet")
    data = (sql / WEIGHTS).read_bytes()
    added = [CommitOperationAdd(CONFIG, (sql / CONFIG).read_bytes()), CommitOperationAdd(WEIGHTS, data)]
    HfApi().create_commit("me/xet", [*added, CommitOperationAdd("other.bin", data[::-1])], commit_message="add")
    repo = hub.storage.repos["me/xet"]
    if way == "another file":  # of the same size, which the server says is this one
        files = dict(repo.head.files)
        files[WEIGHTS] = replace(files[WEIGHTS], xet=files["other.bin"].xet)
        repo.commits[repo.head.sha] = replace(repo.head, files=files)
    else:
        for xorb in (tmp_path / "xet_store").glob("xet/xorbs/xorbs/default.*"):
            content = bytearray(xorb.read_bytes())
            content = bytearray(byte ^ (0xFF if at % 50 == 20 else 0) for at, byte in enumerate(content))
            xorb.chmod(0o600)
            xorb.write_bytes(content)
    with pytest.raises(HubError) as refused:
        snapshot("me/xet")
    assert refused.value.reason in ("corrupt", "connection", "server")
    assert not list(Path(constants.HF_HUB_CACHE).glob(f"models--me--xet/snapshots/*/{WEIGHTS}"))
