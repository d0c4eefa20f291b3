"""One of two gloo processes that train the toy model with every method: `python worker.py ddp|fsdp OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy import METHODS, adapted, fill, tokens

import adapterhub_lite as ah
from adapterhub_lite.sharding import whole

STEPS, BATCH = 3, 4


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def batches() -> list[torch.Tensor]:
    return list(tokens(STEPS * BATCH, 9).split(BATCH))


def optimizer_of(adapters: ah.Adapters) -> torch.optim.Optimizer:
    found = torch.optim.AdamW(adapters.param_groups(lr=1e-2))
    adapters.register(found)
    return found


def prepared(method: Any) -> tuple[Any, ah.Adapters]:
    model, adapters = adapted(method)
    fill(model)
    model.train()
    return model, adapters


def ended(model: Any) -> dict[str, torch.Tensor]:
    """All tensors of the adapter, whole."""
    return {
        key.removeprefix("module."): whole(p.detach()).clone()
        for key, p in model.named_parameters()
        if "adapters." in key
    }


def ddp(method: Any) -> tuple[dict[str, torch.Tensor], ah.Adapters]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, adapters = prepared(method)
    wrapped, optimizer = accelerator.prepare(model, optimizer_of(adapters))
    for rows in batches():
        optimizer.zero_grad()
        accelerator.backward(loss_of(wrapped, rows.chunk(2)[accelerator.process_index]))
        optimizer.step()
    return ended(model), adapters


def fsdp(method: Any) -> tuple[dict[str, torch.Tensor], ah.Adapters]:
    mesh = init_device_mesh("cpu", (2,))
    model, adapters = prepared(method)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(adapters)
    for rows in batches():
        optimizer.zero_grad()
        loss_of(model, rows.chunk(2)[dist.get_rank()]).backward()
        optimizer.step()
    return ended(model), adapters


def one(method: Any) -> dict[str, torch.Tensor]:
    """The same, in this process alone."""
    model, adapters = prepared(method)
    optimizer = optimizer_of(adapters)
    for rows in batches():
        optimizer.zero_grad()
        loss_of(model, rows).backward()
        optimizer.step()
    return ended(model)


if __name__ == "__main__":
    how, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for i, method in enumerate(METHODS):
        result, adapters = {"ddp": ddp, "fsdp": fsdp}[how](method)
        torch.save(result, out / f"{i}-{dist.get_rank()}.pt")
        adapters.save("a", out / f"saved-{i}-{dist.get_rank()}")  # every process calls it: shards are gathered
    dist.destroy_process_group()
