"""Two processes end where one does: accelerate's DDP, and FSDP2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker
from toy import METHODS, llama, logits, moved, same, trained

import adapterhub_lite as ah


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, which train with one method after the other, leave in a folder."""
    out = tmp_path_factory.mktemp(request.param)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    processes = [
        subprocess.Popen(
            [sys.executable, here / "worker.py", request.param, out],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return out


@pytest.mark.parametrize("i", range(len(METHODS)), ids=lambda i: f"{i}-{METHODS[i][0]}")
def test_two_processes_end_where_one_does(results: Path, i: int) -> None:
    method = METHODS[i]
    first, second = (torch.load(results / f"{i}-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], t) for key, t in second.items())
    want = worker.one(method)
    start = trained(worker.prepared(method)[0])
    moved(start, {key: t for key, t in want.items() if key in start})
    same(first, want, 2e-5)
    # What was saved, from shards too, computes what the model does that was trained in one process.
    model, (reference, _) = llama(), worker.prepared(method)
    ah.adapt(model).load(results / f"saved-{i}-0", "a")
    for key, t in want.items():
        reference.get_parameter(key).data = t
    reference.eval()
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=1e-3)
