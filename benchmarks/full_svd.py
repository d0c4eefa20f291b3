"""What tools that extract a LoRA do for each layer: a full SVD of the difference, in float32.

python benchmarks/full_svd.py BASE TUNED RANK PREFIX: only the tensors whose names begin with PREFIX.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open


def main() -> None:
    """The factors of each layer, which are thrown away."""
    base, tuned, rank, prefix = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    with (
        safe_open(base / "model.safetensors", "pt") as one,
        safe_open(tuned / "model.safetensors", "pt") as two,
    ):
        for name in sorted(one.keys()):
            W = one.get_tensor(name)
            if name.startswith(prefix) and W.ndim == 2:
                D = two.get_tensor(name).float() - W.float()
                U, S, Vh = torch.linalg.svd(D, full_matrices=False)
                (U[:, :rank] * S[:rank]).to(W.dtype), Vh[:rank].to(W.dtype)


if __name__ == "__main__":
    main()
