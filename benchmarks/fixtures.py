"""Build what the benchmarks read: adapters in PEFT's layout, and a base checkpoint for PEFT.

    python benchmarks/fixtures.py adapters|base|tuned|many|sharded [--count N] [--times N] [--dir DIR]

Each piece is built in a sibling folder and renamed, so what is there is whole, and is
not built again. Seeded: the same bytes each time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the builders import torch themselves: the timing parents must stay small
    from collections.abc import Callable, Mapping

    from torch import Generator, Tensor

CACHE = Path(".cache/benchmarks")

# A Llama of 0.85 billion parameters.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 2048, 5632, 16, 32, 8, 32000
KV = HIDDEN // HEADS * KV_HEADS
MODULES = {  # (out, in)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
RANK = 16

# 16 modules of rank 8 in bfloat16: 1 MiB of tensors.
SMALL_RANK = 8
SMALL = {
    f"layers.{i}.mlp.{name}": shape
    for i in range(8)
    for name, shape in {"up_proj": (3072, 1024), "down_proj": (1024, 3072)}.items()
}


def adapters(folder: Path, dtype: str = "bfloat16") -> list[Path]:
    """Three rank-16 adapters on every linear layer of the Llama."""
    shapes = {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in MODULES.items()}
    return [
        _once(folder / dtype / name, partial(_adapter, shapes, RANK, 32, seed, dtype))
        for seed, name in enumerate("abc")
    ]


def many(folder: Path, count: int) -> list[Path]:
    """`count` adapters of 1 MiB, all of the same shapes."""
    return [
        _once(folder / "many" / f"{i:04}", partial(_adapter, SMALL, SMALL_RANK, 16, 1000 + i, "bfloat16"))
        for i in range(count)
    ]


def base(folder: Path) -> Path:
    """The Llama itself, with random weights in bfloat16: 1.7 GB."""
    return _once(folder / "base", _base)


def sharded(folder: Path, times: int = 1) -> Path:
    """The same in 4 files; with `times`, as many layers more, and as many files: a base of another size."""
    return _once(folder / f"sharded-{times}", partial(_sharded, times))


def deep(folder: Path, times: int) -> Path:
    """A rank-16 adapter on all linear layers of `sharded(times)`."""
    shapes = {f"layers.{i}.{name}": shape for i in range(LAYERS * times) for name, shape in MODULES.items()}
    return _once(folder / "deep" / str(times), partial(_adapter, shapes, RANK, 32, 7, "bfloat16"))


def tuned(folder: Path) -> Path:
    """The Llama after a fine-tune of all its linear layers: singular values that decay, then bfloat16."""
    return _once(folder / "tuned", partial(_tuned, base(folder)))


def _once(out: Path, build: Callable[[Path], None]) -> Path:
    if not out.exists():
        staging = out.with_name(out.name + ".partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        build(staging)
        staging.rename(out)
    return out


def _adapter(shapes: Mapping[str, tuple[int, int]], rank: int, alpha: int, seed: int, dtype: str, out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (rows, columns) in shapes.items():
        key = f"base_model.model.model.{name}"
        bound = 1 / math.sqrt(columns)  # PEFT's kaiming_uniform_(a=√5)
        A = torch.empty(rank, columns).uniform_(-bound, bound, generator=rng)
        B = torch.empty(rows, rank).normal_(std=0.01, generator=rng)
        tensors[f"{key}.lora_A.weight"] = A.to(getattr(torch, dtype))
        tensors[f"{key}.lora_B.weight"] = B.to(getattr(torch, dtype))
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    _write_json(out / "adapter_config.json", peft_config(targets, rank, alpha))


def peft_config(targets: list[str], rank: int, alpha: int) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.21.2 writes it."""
    absent = """alora_invocation_tokens arrow_config auto_mapping base_model_name_or_path corda_config
        eva_config exclude_modules kasa_config layer_replication layers_pattern layers_to_transform
        lora_ga_config megatron_config modules_to_save monteclora_config revision target_parameters
        trainable_token_indices use_bdlora velora_config"""
    off = "ensure_weight_tying fan_in_fan_out lora_bias use_dora use_qalora use_rslora"
    return {
        **dict.fromkeys(absent.split()),
        **dict.fromkeys(off.split(), False),
        "alpha_pattern": {},
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }


def _base(out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    layers = [f"model.layers.{i}" for i in range(LAYERS)]
    shapes = {f"{layer}.{name}.weight": shape for layer in layers for name, shape in MODULES.items()}
    shapes |= dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], (VOCAB, HIDDEN))
    tensors = {name: _weights(shape, rng) for name, shape in shapes.items()}
    norms = [f"{layer}.{at}_layernorm.weight" for layer in layers for at in ("input", "post_attention")]
    tensors |= {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in [*norms, "model.norm.weight"]}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", _config(LAYERS))


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _tuned(model: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    rng = torch.Generator().manual_seed(1)
    tensors = load_file(model / "model.safetensors")
    for name, W in tensors.items():
        if name.startswith("model.layers.") and W.ndim == 2:
            rows, columns = W.shape
            decay = torch.arange(1, 129) ** -1.0  # of 128 directions, beside noise everywhere
            B = torch.randn(rows, 128, generator=rng) * decay
            A = torch.randn(128, columns, generator=rng)
            noise = torch.randn(rows, columns, generator=rng)
            tensors[name] = (W.float() + 0.002 * (B @ A) + 0.0003 * noise).to(W.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(model / "config.json", out)


def _sharded(times: int, out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    layers, files = LAYERS * times, 4 * times
    where: dict[str, str] = {}
    for k in range(files):
        rng = torch.Generator().manual_seed(k)
        own = range(k * layers // files, (k + 1) * layers // files)
        shapes: dict[str, tuple[int, ...]] = {
            f"model.layers.{i}.{name}.weight": shape for i in own for name, shape in MODULES.items()
        }
        norms = [f"model.layers.{i}.{at}_layernorm.weight" for i in own for at in ("input", "post_attention")]
        if k == 0:
            shapes["model.embed_tokens.weight"] = (VOCAB, HIDDEN)
        if k == files - 1:
            shapes["lm_head.weight"] = (VOCAB, HIDDEN)
            norms.append("model.norm.weight")
        tensors = {name: _weights(shape, rng) for name, shape in shapes.items()}
        tensors |= {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
        file = f"model-{k + 1:05}-of-{files:05}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    _write_json(out / "config.json", _config(layers))


def _weights(shape: tuple[int, ...], rng: Generator) -> Tensor:
    import torch

    return torch.empty(shape).normal_(std=0.02, generator=rng).to(torch.bfloat16)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def build_apart(*arguments: str, folder: Path) -> list[Path]:
    """Build in a process of its own, and return the folders: for callers that must not import torch."""
    command = [sys.executable, __file__, *arguments, "--dir", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [Path(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Build one kind and print the folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["adapters", "base", "tuned", "many", "sharded"])
    parser.add_argument("--dir", type=Path, default=CACHE, help="where (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1000, help="how many, of `many` (default: %(default)s)")
    parser.add_argument("--times", type=int, default=1, help="how large, of `sharded` (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of `adapters`")
    options = parser.parse_args()
    if options.what == "adapters":
        folders = adapters(options.dir, options.dtype)
    elif options.what == "many":
        folders = many(options.dir, options.count)
    elif options.what == "sharded":
        folders = [sharded(options.dir, options.times), deep(options.dir, options.times)]
    else:
        folders = [base(options.dir) if options.what == "base" else tuned(options.dir)]
    print(*folders, sep="\n")


if __name__ == "__main__":
    main()
