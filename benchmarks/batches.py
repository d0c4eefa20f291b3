"""Batches whose rows have adapters of their own, against PEFT's `adapter_names`: `python benchmarks/batches.py`.

One process and interleaved, CPU time of one thread, the smallest of many rounds; every line is a ratio of two figures
of the same run. That the outputs are equal is seen to first. Once ours is as it stands, and once within
`adapters.inference()`, for a server whose adapters do not change between one token and the next.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from live import LINEARS, llama, times
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import adapterhub_lite as ah

ROUNDS = 10
MIXED = [4, 8, 16, 32]


def ours(ranks: list[int]) -> tuple[Any, ah.Adapters]:
    """A Llama of 8 layers, 512 wide, with an adapter of each rank at all linear layers, none of them zero."""
    torch.manual_seed(0)
    model = llama(512, 8, 1376)
    adapters = ah.adapt(model)
    for i, rank in enumerate(ranks):
        adapters.add(f"a{i}", ah.method("lora", rank=rank, alpha=2 * rank, init_weights="random"), LINEARS, seed=i)
    return model, adapters


def theirs(mine: nn.Module, ranks: list[int]) -> Any:
    """The same in PEFT, with the same numbers."""
    torch.manual_seed(0)
    configs = [LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS) for rank in ranks]
    peft = get_peft_model(llama(512, 8, 1376), configs[0], adapter_name="a0")
    for i, config in enumerate(configs[1:], 1):
        peft.add_adapter(f"a{i}", config)
    for name, module in mine.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "adapters"):
            other: Any = peft.base_model.model.get_submodule(name)
            for own, part in module.adapters.named_children():  # type: ignore[union-attr]
                other.lora_A[own].weight.data, other.lora_B[own].weight.data = part.A.data, part.B.data
    return peft.eval()


def forward(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def compared(ranks: list[int], rows: int, length: int, rounds: int) -> dict[str, float]:
    """Seconds of one forward: of the base, of one adapter for all rows, and of all of them, ours and PEFT's."""
    model, adapters = ours(ranks)
    other, held = ours(ranks)
    one, _ = ours(ranks[:1])
    peft = theirs(model, ranks)
    names = [f"a{i % len(ranks)}" for i in range(rows)]
    ids = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    runs = {
        "base": partial(forward, llama(512, 8, 1376), input_ids=ids),
        "one": partial(forward, one, input_ids=ids),
        "ours": partial(forward, model, input_ids=ids),
        "inference()": partial(forward, other, input_ids=ids),
        "peft": partial(forward, peft, input_ids=ids, adapter_names=names),
    }
    adapters.activate(names)
    held.activate(names)
    with torch.no_grad():
        want = runs["peft"]()
        torch.testing.assert_close(runs["ours"](), want, rtol=1e-3, atol=1e-3)
        with held.inference():
            torch.testing.assert_close(runs["inference()"](), want, rtol=1e-3, atol=1e-3)
            return times(runs, 3 if length == 1 else 1, rounds)


CASES: dict[str, tuple[list[int], int, int]] = {
    "8 adapters, 8 rows, one token": ([8] * 8, 8, 1),
    "8 adapters, 8 rows, 128 tokens": ([8] * 8, 8, 128),
    "64 adapters, 64 rows, one token": ([8] * 64, 64, 1),
    "8 adapters, 64 rows, one token": ([8] * 8, 64, 1),
    "32 adapters of ranks 4 to 32, 64 rows, one token": (MIXED * 8, 64, 1),
    "4 adapters of ranks 4 to 32, 16 rows, 64 tokens": (MIXED, 16, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, (ranks, rows, length) in CASES.items():
        if not name.startswith(options.only):
            continue
        t = compared(ranks, rows, length, options.rounds)
        ratios = {key: t[key] / t["one"] for key in ("base", "ours", "inference()", "peft")}
        faster = {f"peft / {key}": t["peft"] / t[key] for key in ("ours", "inference()")}
        found[name] = {**ratios, **faster, "one, ms": 1000 * t["one"]}
        if not options.json:
            shown = ", ".join(f"{key} {value:.2f}" for key, value in found[name].items())
            print(f"{name}; of one adapter for all: {shown}", flush=True)
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
