"""Adapters on live models against PEFT and yardsticks, in one process and interleaved: `python benchmarks/live.py`.

CPU time of one thread, the smallest of many rounds; every line is a ratio of two figures of the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import adapterhub_lite as ah

ROUNDS = 30


class HandWritten(nn.Module):
    """The least that a LoRA layer can do."""

    def __init__(self, layer: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.layer, self.scaling = layer, scaling
        self.A = nn.Parameter(torch.randn(rank, layer.in_features))
        self.B = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in) -> (batch, out)."""
        y: Tensor = self.layer(x) + self.scaling * F.linear(F.linear(x, self.A), self.B)
        return y


def times(runs: dict[str, Callable[[], Any]], repeat: int, rounds: int) -> dict[str, float]:
    """Seconds of CPU for one call of each: one after the other in each round, the smallest of all rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            for _ in range(repeat):
                run()
            best[name] = min(best[name], (time.thread_time() - start) / repeat)
    return best


def adapted(width: int, name: str, **options: Any) -> nn.Module:
    return handle(width, name, **options).model[0]


def handle(width: int, name: str, **options: Any) -> Any:
    adapters = ah.adapt(nn.Sequential(nn.Linear(width, width)))
    adapters.add("a", ah.method(name, rank=8, alpha=16, **options), "0")
    return adapters


def theirs(width: int, **options: Any) -> nn.Module:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], **options)
    layer: nn.Module = get_peft_model(nn.Sequential(nn.Linear(width, width)), config).base_model.model[0]
    return layer


def one_layer(rounds: int) -> dict[str, float]:
    x = torch.randn(1, 64)
    plain = nn.Linear(64, 64)
    layers = {
        "plain": plain,
        "hand": HandWritten(nn.Linear(64, 64), 8, 2.0),
        "ours": adapted(64, "lora"),
        "peft": theirs(64),
    }
    with torch.no_grad():
        t = times({name: lambda layer=layer: layer(x) for name, layer in layers.items()}, 500, rounds)
    return {
        "one LoRA layer, d 64, batch 1: ours / hand-written (at most 1)": t["ours"] / t["hand"],
        "... what it adds / what PEFT adds (at most 0.5)": (t["ours"] - t["plain"]) / (t["peft"] - t["plain"]),
    }


TOKENS = (1, 16, 128, 512)
WAYS = ("forward, no_grad", "forward, inference()", "forward and backward")


def dora(rounds: int) -> dict[str, float]:
    """One layer of 1024 x 1024, rank 8, by the number of tokens: DoRA / our LoRA, which is to be at most 1.5."""
    found = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, 1024)
        handles = {"LoRA": handle(1024, "lora"), "ours": handle(1024, "dora")}
        layers = {**{who: own.model[0] for who, own in handles.items()}, "PEFT": theirs(1024, use_dora=True)}

        def step(layer: nn.Module, x: Tensor = x) -> None:
            layer(x).square().sum().backward()

        def call(layer: nn.Module, x: Tensor = x) -> None:
            layer(x)

        for way in WAYS:
            run = step if way == WAYS[2] else call
            here = {who: layer for who, layer in layers.items() if way != WAYS[1] or who != "PEFT"}
            with torch.no_grad() if way != WAYS[2] else nullcontext(), ExitStack() as stack:
                if way == WAYS[1]:
                    for own in handles.values():
                        stack.enter_context(own.inference())
                runs = {who: lambda layer=layer, run=run: run(layer) for who, layer in here.items()}
                t = times(runs, 3, rounds)
            found |= {_cell(tokens, way, who): t[who] / t["LoRA"] for who in here if who != "LoRA"}
    return found


def _cell(tokens: int, way: str, who: str) -> str:
    return f"DoRA, d 1024, {tokens} tokens, {way}: {who} / our LoRA"


def table(found: dict[str, float]) -> str:
    """What `dora` found, as Markdown."""
    columns = [(way, who) for way in WAYS for who in ("ours", "PEFT") if way != WAYS[1] or who == "ours"]
    lines = ["| tokens | " + " | ".join(f"{way}: {who}" for way, who in columns) + " |", "|--:" * 6 + "|"]
    for tokens in TOKENS:
        values = " | ".join(f"{found[_cell(tokens, way, who)]:.2f}" for way, who in columns)
        lines.append(f"| {tokens} | {values} |")
    return "\n".join(lines)


def llama(width: int, layers: int, inner: int) -> Any:
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, vocab_size=1000)).eval()


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(rounds: int) -> dict[str, float]:
    base, ours, peft = (llama(512, 8, 1376) for _ in range(3))
    adapters = ah.adapt(ours)
    adapters.add("a", ah.method("lora", rank=8, alpha=16), "all-linear")
    peft = get_peft_model(peft, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)).eval()
    models = {"base": base, "ours": ours, "peft": peft}
    token = torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad():
        t = times({name: lambda m=m: m(input_ids=token) for name, m in models.items()}, 3, rounds)
    found = {
        "one token, 8 layers of 512: ours / base (at most 1.12)": t["ours"] / t["base"],
        "... PEFT / base": t["peft"] / t["base"],
    }
    ids = torch.ones(1, 64, dtype=torch.int64)

    def step(m: Any) -> None:
        m(input_ids=ids, labels=ids).loss.backward()

    t = times({name: lambda m=m: step(m) for name, m in models.items() if name != "base"}, 1, rounds)
    return {**found, "a training step, 64 tokens: ours / PEFT (at most 1)": t["ours"] / t["peft"]}


def adding(rounds: int) -> dict[str, float]:
    ours, peft = llama(512, 32, 1376), llama(512, 32, 1376)
    adapters = ah.adapt(ours)

    def add() -> None:
        adapters.add("a", ah.method("lora", rank=16), "all-linear")
        adapters.remove("a")

    def get() -> None:
        get_peft_model(peft, LoraConfig(r=16, target_modules=LINEARS)).unload()

    t = times({"ours": add, "peft": get}, 1, min(rounds, 8))
    return {
        "adding to 224 layers, and removing: seconds (at most 0.1)": t["ours"],
        "... ours / PEFT": t["ours"] / t["peft"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, float] = {}
    for part in (one_layer, dora, model, adding):
        found |= part(options.rounds)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if not name.startswith("DoRA"):
            print(f"{value:8.3f}  {name}")
    print("\nDoRA / our LoRA, d 1024, rank 8 (at most 1.5)\n")
    print(table(found))


if __name__ == "__main__":
    main()
