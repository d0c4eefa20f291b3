"""Many adapters resident on one model: tokens a second and memory, against PEFT: `python benchmarks/serving.py`.

A batch of 64 rows decodes one token each, with adapters drawn from all that are there. One process and interleaved,
CPU time of one thread, the smallest of many rounds; that the outputs are those of PEFT, `batches.py` sees to. Memory is
what a process of its own has more of when 64 adapters were added, before any forward. PEFT is left out from where
adding adapters takes longer than the limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import Pipe, get_context
from typing import Any

import torch
from batches import forward
from live import LINEARS, llama, times
from peft import LoraConfig, get_peft_model

import adapterhub_lite as ah

RANK, ROWS, MIB = 8, 64, 1 << 20
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Side:
    """One library's model and what its adapters cost."""

    def __init__(self) -> None:
        self.model: Any = llama(512, 8, 1376)
        self.count, self.seconds = 0, 0.0

    def grow(self, count: int) -> None:
        """Add adapters until there are so many."""
        start = time.thread_time()
        for i in range(self.count, count):
            self.add(i)
        self.seconds += time.thread_time() - start
        self.count = count

    def add(self, i: int) -> None:
        raise NotImplementedError


class Ours(Side):
    def __init__(self) -> None:
        super().__init__()
        self.adapters = ah.adapt(self.model)

    def add(self, i: int) -> None:
        self.adapters.add(f"a{i}", ah.method("lora", rank=RANK, alpha=16, init_weights="random"), LINEARS, seed=i)


class Theirs(Side):
    def add(self, i: int) -> None:
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules=LINEARS, init_lora_weights=False)
        if self.count == i == 0:
            self.model = get_peft_model(self.model, config, adapter_name="a0").eval()
        else:
            self.model.add_adapter(f"a{i}", config)
            self.model.eval()


def numbers(adapters: ah.Adapters) -> int:
    """The bytes of one adapter's numbers."""
    parts = (p for name, p in adapters.model.named_parameters() if ".adapters.a0." in name)
    return sum(p.numel() * p.element_size() for p in parts)


def memory(side: type[Side], count: int) -> float:
    """MiB of memory for each of so many adapters, in a process that is forked for it."""
    receiver, sender = Pipe(duplex=False)
    child = get_context("fork").Process(target=_added, args=(side, count, sender))
    child.start()
    found: float = receiver.recv()
    child.join()
    return found


def _added(side: type[Side], count: int, sender: Any) -> None:
    own = side()
    own.grow(1)  # what comes once is no adapter's
    before = resident()
    own.grow(count)
    sender.send((resident() - before) / (count - 1) / MIB)


@torch.no_grad()
def measured(ours: Ours, theirs: Theirs | None, rounds: int) -> dict[str, float]:
    """Tokens a second with the adapters that are there, and what it took to add each."""
    names = random.Random(0).choices([f"a{i}" for i in range(ours.count)], k=ROWS)
    ids = torch.randint(3, 1000, (ROWS, 1), generator=torch.Generator().manual_seed(0))
    run = partial(forward, ours.model, input_ids=ids)
    runs: dict[str, Callable[[], Any]] = {"ours": run}
    if theirs is not None:
        runs["PEFT"] = partial(forward, theirs.model, input_ids=ids, adapter_names=names)
    ours.adapters.activate(names)
    t = times(runs, 2, rounds)
    with ours.adapters.inference():
        run()
        t |= times({"inference()": run}, 2, rounds)
    found = {f"tokens a second, {name}": ROWS / seconds for name, seconds in t.items()}
    for name, side in {"ours": ours, "PEFT": theirs}.items():
        if side is not None:
            found[f"seconds to add one, {name}"] = side.seconds / side.count
    return {"different ones in the batch": len(set(names)), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="adapters")
    parser.add_argument("--limit", type=float, default=120, help="seconds of adding to PEFT, then it is left out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mib = {name: memory(side, ROWS) for name, side in {"ours": Ours, "PEFT": Theirs}.items()}
    ours, theirs, found = Ours(), Theirs(), dict[int, dict[str, float]]()
    peft: Theirs | None = theirs
    for size in (size for size in SIZES if size <= options.most):
        ours.grow(size)
        if peft is not None:
            peft.grow(size)
        found[size] = measured(ours, peft, options.rounds)
        if not options.json:
            print(size, ", ".join(f"{name} {value:.3g}" for name, value in found[size].items()), flush=True)
        if peft is not None and peft.seconds > options.limit:
            peft = None
            if not options.json:
                print(f"PEFT: left out from here on, for adding {theirs.count} took {theirs.seconds:.0f} s", flush=True)
    mib["its numbers alone"] = numbers(ours.adapters) / MIB
    if options.json:
        print(json.dumps({"MiB an adapter": mib, "by adapters": found}, indent=2))
    else:
        print("MiB an adapter:", ", ".join(f"{name} {value:.2f}" for name, value in mib.items()))


if __name__ == "__main__":
    main()
