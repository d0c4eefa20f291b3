"""How alike adapters of one task or of two are, from one starting seed or from two: the table in docs/diff.md.

python benchmarks/seeds.py [--dir DIR]

On the small model of `adapter demo`. Figures differ a little from machine to machine.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import fixtures
import torch

import adapterhub_lite as ah
from adapterhub_lite import demo
from adapterhub_lite.compare import Pair

TASKS, SEEDS = ("prose", "tables"), (0, 1)


def train(folder: Path) -> dict[tuple[str, int], ah.Adapter]:
    """An adapter for each task and seed, all of one base."""
    torch.manual_seed(0)
    texts, model = demo.texts(), demo.ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    demo.train(model, optimizer, texts["code"][0], 220, lambda done, total: None)
    adapters, made = ah.adapt(model), {}
    for task, seed in itertools.product(TASKS, SEEDS):
        name = f"{task}{seed}"
        adapters.add(name, ah.method("lora", rank=8, alpha=16), targets="all-linear", seed=seed)
        adapters.activate(name)
        optimizer = torch.optim.AdamW(adapters.param_groups(lr=2e-3), weight_decay=0.0)
        demo.train(model, optimizer, texts[task][0], 80, lambda done, total: None)
        adapters.save(name, folder / name, force=True)
        made[task, seed] = ah.load(folder / name)
    return made


def main() -> None:
    """Train, compare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=fixtures.CACHE, help="cache (default: %(default)s)")
    made = train(parser.parse_args().dir / "seeds")
    found = ah.diff(*made.values())
    kinds: dict[str, list[Pair]] = {}
    for (i, j), pair in found.pairs.items():
        (task, seed), (other, another) = (list(made)[k] for k in (i, j))
        kind = f"{'one task' if task == other else 'two tasks'}, {'one seed' if seed == another else 'two seeds'}"
        kinds.setdefault(kind, []).append(pair)
    first = found.pairs[0, 1]
    print(
        f"| | cosine | overlap out (by chance {first.chance_out:.2f}) | overlap in (by chance {first.chance_in:.2f}) |"
    )
    print("|---|--:|--:|--:|")
    for kind, pairs in sorted(kinds.items(), reverse=True):
        cells = [sorted(f"{getattr(p, what):.2f}" for p in pairs) for what in ("cosine", "overlap_out", "overlap_in")]
        print(f"| {kind} | " + " | ".join(c[0] if c[0] == c[-1] else f"{c[0]} to {c[-1]}" for c in cells) + " |")


if __name__ == "__main__":
    main()
