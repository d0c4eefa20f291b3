"""Small base models and adapters as files, and what a folded weight must be: computed without the package."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PREFIX = "base_model.model."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    """Random numbers, in float32."""
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    files: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A model's folder: one safetensors file, or several and an index, the tensors dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **(config or {})}))
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    parts: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for i, (name, tensor) in enumerate(tensors.items()):
        parts[i % files][name] = tensor
    places = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_lora(
    folder: Path,
    layers: Mapping[str, tuple[int, int]],
    *,
    rank: int = 3,
    alpha: float = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    std: float = 0.3,
    more: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A LoRA in PEFT's layout, by the (out, in) of linear layers; `more`: other tensors, by their keys."""
    made: dict[str, Tensor] = {}
    for i, (name, (out, into)) in enumerate(layers.items()):
        made[f"{PREFIX}{name}.lora_A.weight"] = draw(rank, into, seed=1000 * seed + 2 * i, std=std).to(dtype)
        made[f"{PREFIX}{name}.lora_B.weight"] = draw(out, rank, seed=1000 * seed + 2 * i + 1, std=std).to(dtype)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(layers), **config}
    return write_adapter(folder, {**made, **(more or {})}, said, facts)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> Path:
    """An adapter's folder, from tensors by their keys and the config."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **({"adapterhub_lite": json.dumps(facts)} if facts else {})}
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "adapter_model.safetensors", metadata)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def lora_delta(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """s B A in float64, of a plain LoRA at a linear layer."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"{PREFIX}{name}.lora_{which}.weight"].double().numpy() for which in "AB")
    r = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
    return scale * (B @ A)


def rounded(x: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """float64 to `dtype`, correctly rounded; not by torch."""
    x = np.ascontiguousarray(x, dtype=np.float64)
    if dtype == torch.bfloat16:
        bits = x.view(np.int64)  # of 52 bits of the fraction, 7 stay; a carry into the exponent is right
        half = (1 << 44) - 1 + ((bits >> 45) & 1)
        kept = ((bits + half) >> 45) << 45
        return torch.from_numpy(kept.view(np.float64).copy()).to(dtype)  # holds it exactly
    kind = {torch.float32: np.float32, torch.float16: np.float16, torch.float64: np.float64}[dtype]
    return torch.from_numpy(x.astype(kind))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def off_by(got: Tensor, want: Tensor) -> tuple[int, int]:
    """How many numbers are others, and by how many units in the last place the worst is off."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    lowest = torch.iinfo(whole).min
    a, b = (t.contiguous().view(whole).long() for t in (got, want))
    a, b = (torch.where(t < 0, lowest - t, t) for t in (a, b))  # ordered as the numbers are
    return int((a != b).sum()), int((a - b).abs().max()) if got.numel() else 0


def header(file: Path) -> bytes:
    """A safetensors file's header, as its bytes are."""
    data = file.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder and below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def real(*args: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with this one's path, and as many threads as it likes."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    env = {**inherited, "PYTHONPATH": ":".join(filter(None, sys.path)), **more}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def weighted(deltas: Sequence[np.ndarray[Any, Any]], weights: Sequence[float]) -> np.ndarray[Any, Any]:
    """Σ wᵢ ΔWᵢ."""
    return np.asarray(sum(w * delta for w, delta in zip(weights, deltas, strict=True)))
