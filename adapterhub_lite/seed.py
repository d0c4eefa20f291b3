"""Randomness that depends on a seed and a name, and on nothing else."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one site: the same on every rank, in any order of sites, whatever the global state."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def uniform(shape: tuple[int, ...], *key: object) -> Tensor:
    """Numbers in [0, 1), float32, multiples of 2⁻²⁴: entry i is the i-th that the counter gives under this key.

    Philox-4x64 (Salmon et al. 2011), whose stream numpy keeps from release to release; on the CPU, whatever device
    the numbers are for.
    """
    bits = _words(shape, key) >> np.uint32(8)
    return torch.from_numpy(bits.astype(np.float32)).mul_(2.0**-24).reshape(shape)


def below(shape: tuple[int, ...], chance: float, *key: object) -> Tensor:
    """Which of the numbers of `uniform` are below `chance`, a bool each, without making the numbers.

    >>> bool((below((3, 5), 0.3, "name") == (uniform((3, 5), "name") < 0.3)).all())
    True
    """
    limit = math.ceil(float(np.float32(chance)) * 2**24) << 8
    return torch.from_numpy(_words(shape, key) < limit).reshape(shape)


def _words(shape: tuple[int, ...], key: tuple[object, ...]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Random numbers of 32 bits, one for each entry."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    count = math.prod(shape)
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(-(-count // 2))
    return np.asarray(words, "<u8").view("<u4")[:count]
