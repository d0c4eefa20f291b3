"""A small sharded base model and two adapters as files, the command lines that fold them, and calls that fail."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from adapterhub_lite import staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SHARDS, OUT, IN, RANK = 2, 13, 10, 3
SIZES = {"proj": (OUT, IN), "gate": (OUT, IN), "norm": (IN,)}
CHANGES = (
    *("write", "pwrite", "copy_file_range", "posix_fallocate", "ftruncate"),
    *("fsync", "mkdir", "rename", "link", "unlink"),
)
CALLS = (*CHANGES, "open", "close", "pread", "preadv")
PART = ".out.adapter-part"


def write_base(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Files with two linear layers and a norm each, the last with a norm only; a config, a tokenizer in a folder."""
    rng = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    places = {}
    for i in range(SHARDS + 1):
        own = {
            f"net.{i}.{name}.weight": torch.randn(shape, generator=rng).to(dtype)
            for name, shape in SIZES.items()
            if i < SHARDS or name == "norm"
        }
        if i == 1:
            own["net.1.proj.bias"] = torch.randn(OUT, generator=rng).to(dtype)
        save_file(own, folder / f"model-{i}.safetensors", {"format": "pt"})
        places.update(dict.fromkeys(own, f"model-{i}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "more").mkdir()
    (folder / "more" / "tokenizer.json").write_text("{}")
    return folder


def write_lora(folder: Path, *, seed: int, bias: bool = False) -> Path:
    """A LoRA on every linear layer."""
    rng = torch.Generator().manual_seed(100 + seed)
    tensors = {
        f"base_model.model.net.{i}.{name}.lora_{ab}.weight": torch.randn(shape, generator=rng)
        for i in range(SHARDS)
        for name in ("proj", "gate")
        for ab, shape in (("A", (RANK, IN)), ("B", (OUT, RANK)))
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["proj", "gate"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_all(home: Path) -> Path:
    write_base(home / "base")
    for seed, name in enumerate("ab"):
        write_lora(home / name, seed=seed)
    return home


def tree(folder: Path) -> dict[str, bytes] | None:
    """What is in `folder`; None if there is no such folder."""
    if not os.path.lexists(folder):
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def at_call(n: int, act: Callable[[], object], names: Sequence[str] = CALLS) -> Iterator[list[str]]:
    """Do `act` in place of the n-th system call of whatever thread; yields the names of those made."""
    calls, numbers = list[str](), itertools.count(1)

    def shim(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if next(numbers) == n:
                act()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, shim(name, getattr(os, name)))
        patch.setattr(staging, "_renameat2", shim("renameat2", staging._renameat2))
        yield calls
