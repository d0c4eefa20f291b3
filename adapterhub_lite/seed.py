"""Randomness that depends on a seed and a name, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one site: the same on every rank, in any order of sites, whatever the global state."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
