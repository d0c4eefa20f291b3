"""The tour behind `adapter demo`: a byte model that knows Python code learns two other kinds of text, and both at once.

Nothing is downloaded: the texts are files of Python's own standard library. The model is trained from
scratch, so its adapters and losses are real, if small.
"""

from __future__ import annotations

import encodings
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import AdapterError

CONTEXT, WIDTH, LAYERS, HEADS = 128, 128, 3, 4


class Block(nn.Module):
    """Attention and a feed-forward net, each after a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape  # (N, T, width)
        q, k, v = (
            y.reshape(n, t, HEADS, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )  # (N, heads, T, width/heads) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, WIDTH))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class ByteModel(nn.Module):
    """A GPT over bytes: (N, T) integers to (N, T, 256) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if p.shape[0] == 256 else p.shape[1] ** -0.5)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def texts() -> dict[str, tuple[Tensor, Tensor]]:
    """Three kinds of text, each as bytes to learn from and bytes held out: (n,) uint8."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions split the standard library
        raise AdapterError("this Python comes without pydoc_data", fix="install its whole standard library") from None
    library = Path(os.__file__).parent
    code = b"".join(file.read_bytes() for file in sorted(library.glob("*.py"))[:90])
    prose = "\n".join(text for _, text in sorted(topics.items())).encode()
    tables = b"".join(file.read_bytes() for file in sorted(Path(encodings.__path__[0]).glob("cp*.py"))[:30])
    return {"code": _split(code), "prose": _split(prose), "tables": _split(tables)}


def _split(text: bytes) -> tuple[Tensor, Tensor]:
    whole = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(whole) * 9 // 10
    return whole[:cut], whole[cut:]


def _batches(text: Tensor, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=rng)
        window = torch.stack([text[s : s + CONTEXT + 1] for s in starts.tolist()]).long()  # (N, T + 1)
        yield window[:, :-1], window[:, 1:]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    steps: int,
    progress: Callable[[int, int], None],
) -> None:
    """Any training loop will do; this is one."""
    model.train()
    warmup = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[g["lr"] for g in optimizer.param_groups], total_steps=steps
    )
    for step, (x, y) in zip(range(steps), _batches(text, seed=0, size=16), strict=False):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        progress(step + 1, steps)


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor) -> float:
    """Loss on held-out text, in bits for each byte: 8 is guessing, lower is better."""
    model.eval()
    losses = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
        for _, (x, y) in zip(range(8), _batches(text, seed=1, size=32), strict=False)
    ]
    return sum(losses) / len(losses) / math.log(2)
