"""A pull from olah, a mirror of the Hub that others wrote, started offline on a git repository."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done, Handmade
    from hub_server import HubServer

OLAH = "olah==0.5.4"
CONFIG = """
[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{folder}/repos"
hf-scheme = "http"
hf-netloc = "127.0.0.1:9"
hf-lfs-netloc = "127.0.0.1:9"
mirror-scheme = "http"
mirror-netloc = "127.0.0.1:{port}"
mirror-lfs-netloc = "127.0.0.1:{port}"
mirrors-path = ["{folder}/mirrors"]

[accessibility]
offline = true
"""
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]


@pytest.fixture
def olah(pytestconfig: pytest.Config) -> Path:
    """The command `olah-cli`, in an environment of its own that is kept for the next run."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(f"olah-{sys.version_info[0]}.{sys.version_info[1]}")
    command = folder / "bin" / "olah-cli"
    if not command.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--retries", "0", OLAH]
        if subprocess.run(install, capture_output=True).returncode:
            pytest.skip(f"{OLAH} could not be installed")
    return command


@contextmanager
def serving(olah: Path, folder: Path) -> Iterator[str]:
    """The URL of olah with the mirrors in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "c.toml").write_text(CONFIG.format(port=port, folder=folder))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([olah, "-c", folder / "c.toml"], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/models/alice/sql/revision/main", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_pull_from_olah(
    hub: HubServer,
    olah: Path,
    handmade: Handmade,
    adapter: Callable[..., Done],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    own = handmade(tmp_path / "mirrors" / "models" / "alice" / "sql", {"net.layers.0.q": 2, "net.emb": 3})
    (own / "README.md").write_text("Hi")
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "add"]):
        subprocess.run([*GIT, *words], cwd=own, check=True)
    sha = subprocess.check_output([*GIT, "rev-parse", "HEAD"], cwd=own, text=True).strip()
    with serving(olah, tmp_path) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 10)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 10)
        done = adapter("info", "alice/sql", "--json")
        assert done.code == 0, done
        done = adapter("pull", "alice/sql", "-o", tmp_path / "out", "--json")
        assert done.code == 0, done
        assert done.json["commit"] == sha
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (own / name).read_bytes()
    assert not hub.seen
