"""Fixtures for the tests of merging: the command in this process, and adapters written by hand or by PEFT.

`peers` imports PEFT, which takes seconds, so only the fixtures and tests that need it do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

os.environ["HF_HUB_OFFLINE"] = "1"  # as `peers` does: read once, by whoever imports huggingface_hub first

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

collect_ignore = ["golden"]  # scripts that need another environment, and what they made

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from hub_server import HubServer
    from peers import Peer

PREFIX = "base_model.model."

# Name, shape of the weight; "emb" is an embedding (rows, width), the others are linear layers and convolutions.
LAYERS: dict[str, tuple[int, ...]] = {
    "net.layers.0.q": (13, 7),
    "net.layers.0.k": (5, 11),
    "net.layers.1.q": (13, 7),
    "net.layers.1.k": (5, 11),
    "net.conv": (6, 4, 3, 2),
    "net.point": (8, 5, 1),
    "net.emb": (17, 9),
}


class Done(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, *words: str) -> str:
        """Its message, if it is one of exit code 1: one printable line that has all the words."""
        assert self.code == 1, self
        assert self.out == ""
        line = self.err.removesuffix("\n")
        assert line.isprintable(), line
        assert line.startswith("adapter: "), line
        assert len(line) < 1100
        for word in words:
            assert word in line, (word, line)
        return line


class Handmade(Protocol):
    def __call__(
        self,
        folder: Path,
        layers: Mapping[str, int],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = ...,
        **config: Any,
    ) -> Path: ...


@pytest.fixture(scope="session")
def adapter() -> Callable[..., Done]:
    """Run the command in this process."""
    from adapterhub_lite.cli import run

    def call(*args: object) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(arg) for arg in args])
        return Done(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def handmade() -> Handmade:
    """Write a LoRA in PEFT's dialect without PEFT: `layers` are names from LAYERS and their ranks."""

    def write(
        folder: Path,
        layers: Mapping[str, int],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
        **config: Any,
    ) -> Path:
        rng = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for name, r in layers.items():
            out, into, *kernel = LAYERS[name]
            a, b = ("lora_A.weight", "lora_B.weight") if name != "net.emb" else ("lora_embedding_A", "lora_embedding_B")
            if name == "net.emb":
                out, into = into, out
            made[f"{PREFIX}{name}.{a}"] = torch.randn(r, into, *kernel, generator=rng)
            made[f"{PREFIX}{name}.{b}"] = torch.randn(out, r, *(1 for _ in kernel), generator=rng) * scale
        folder.mkdir(parents=True, exist_ok=True)
        made = tensors({key: t.to(dtype) for key, t in made.items()})
        save_file(made, folder / "adapter_model.safetensors", {"format": "pt"})
        ranks = set(layers.values())
        default = {"peft_type": "LORA", "r": max(ranks, default=1), "lora_alpha": 8, "target_modules": sorted(layers)}
        if len(ranks) > 1:
            default["rank_pattern"] = dict(layers)
        (folder / "adapter_config.json").write_text(json.dumps({**default, **config}))
        return folder

    return write


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An adapter that PEFT wrote, by the arguments of `peers.write_adapter`; made once, not to be changed."""
    from peers import write_adapter

    made: dict[str, Path] = {}

    def get(peer: Peer, **options: Any) -> Path:
        options = {"rank": 6, "alpha": 9, "seed": 3, **options}
        key = f"{peer.name} {sorted(options.items())!r}"
        if key not in made:
            made[key] = write_adapter(tmp_path_factory.mktemp("peft") / "adapter", peer, **options)
        return made[key]

    return get


class PeftAgrees(Protocol):
    def __call__(
        self,
        out: Path,
        peer: Peer,
        parts: Sequence[Path],
        weights: Sequence[float],
        *,
        kept: Path | None = None,
        change: Callable[[nn.Module], None] = ...,
    ) -> None: ...


@pytest.fixture(scope="session")
def peft_agrees() -> PeftAgrees:
    """Assert that PEFT with the adapter `out` is the base with Σ wᵢ ΔWᵢ folded into it in float64.

    `kept`: the adapter whose whole values (heads, biases, token rows) replace the base's. `change`: what else
    is done to the base. PEFT must load the adapter without a missing or an unexpected key.
    """
    from peers import dense_delta, load_peft, native, output

    def replace(model: nn.Module, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        rows = config["trainable_token_indices"]
        for key, value in load_file(folder / "adapter_model.safetensors").items():
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            module = name.removesuffix(".token_adapter.trainable_tokens_delta")
            if ".lora_" in name:
                continue
            if module != name:
                indices = rows if isinstance(rows, list) else rows[module.rpartition(".")[2]]
                model.get_submodule(module).get_parameter("weight")[indices] = value.double()
            else:
                model.get_parameter(name.replace(".token_adapter.", ".")).copy_(value)

    def check(
        out: Path,
        peer: Peer,
        parts: Sequence[Path],
        weights: Sequence[float],
        *,
        kept: Path | None = None,
        change: Callable[[nn.Module], None] = lambda model: None,
    ) -> None:
        model = peer.build().double()
        with torch.no_grad():
            if kept is not None:
                replace(model, kept)
            for part, w in zip(parts, weights, strict=True):
                for name, delta in dense_delta(part).items():
                    module = model.get_submodule(name)
                    module.get_parameter("weight").add_(native(w * delta, module))
            change(model)
        expected = output(model, peer)
        found = output(load_peft(out, peer).double(), peer)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert (output(peer.build().double(), peer) - expected).abs().max() > 1e-3  # or nothing was tested

    return check


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of our own, with Xet, at which huggingface_hub looks: as the user `me`, with an empty cache.

    The client's pauses between its attempts are left out; it gives up on an answer after half a second.
    """
    from hub_server import HubServer
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    home = tmp_path / "hf_home"
    with HubServer(tmp_path / "xet_store") as server:
        values = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / "agents.json"),
            "HF_HUB_ETAG_TIMEOUT": 0.5,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.5,
        }
        for name, value in values.items():  # read from the environment when it was imported
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", Unhurried())
        monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.5)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        _http.close_session()
        yield server
        _http.close_session()


class Unhurried:
    """The module `time`, as far as the client's HTTP needs it, without waiting."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def __getattr__(self, name: str) -> Any:
        import time

        return getattr(time, name)
