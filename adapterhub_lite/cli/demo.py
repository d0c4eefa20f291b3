"""`adapter demo`: the tour, in about a minute."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import click

from .output import progress, table


@click.command()
@click.option("-o", "--out", "folder", type=click.Path(path_type=Path), help="Leave the adapters in this folder.")
@click.option("--seed", default=0, help="Of the model and the adapters.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def demo(folder: Path | None, seed: int, quiet: bool) -> None:
    """Train a small model and two adapters, merge them as files, and measure what each knows."""
    import torch

    import adapterhub_lite as ah

    from .. import demo as tour

    def say(text: str) -> None:
        if not quiet:
            click.echo(text)

    start = time.monotonic()
    torch.manual_seed(seed)
    texts = tour.texts()
    model = tour.ByteModel()
    size = sum(p.numel() for p in model.parameters())
    say(f"1. A base model: {size:,} parameters over bytes, trained on Python code.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with progress("   training", quiet) as step:
        tour.train(model, optimizer, texts["code"][0], 220, step)

    work = folder or Path(tempfile.mkdtemp(prefix="adapter-demo-"))
    try:
        adapters = ah.adapt(model)
        for name, what in (("prose", "Python's documentation"), ("tables", "character tables")):
            say(f"2. An adapter for {what}: LoRA of rank 8 on every linear layer.")
            adapters.add(name, ah.method("lora", rank=8, alpha=16), targets="all-linear", seed=seed)
            adapters.activate(name)
            with progress("   training", quiet) as step:
                optimizer = torch.optim.AdamW(adapters.param_groups(lr=2e-3), weight_decay=0.0)
                tour.train(model, optimizer, texts[name][0], 80, step)
            adapters.save(name, work / name, force=True)
        say("3. Merged, as files alone: the base model is not needed.")
        a, b = ah.load(work / "prose"), ah.load(work / "tables")
        merged = 0.7 * a + 0.5 * b
        exact = merged.save(work / "merged", force=True)
        small = merged.truncate(rank=8).save(work / "merged-rank8", force=True)
        say(f"   adapter merge prose tables --weights 0.7 0.5 -o merged                  error {exact.overall:.2g}")
        say(f"   adapter merge prose tables --weights 0.7 0.5 --rank 8 -o merged-rank8   error {small.overall:.2g}")
        rows = []
        for name in ("merged", "merged-rank8"):
            adapters.load(work / name, name=name)
        for name in ("", "prose", "tables", "merged", "merged-rank8"):
            adapters.activate(name or None)
            losses = [tour.bits_per_byte(model, texts[kind][1]) for kind in ("prose", "tables")]
            where = work / name / "adapter_model.safetensors" if name else None
            kb = f"{where.stat().st_size / 1000:.0f} kB" if where else "-"
            rows.append((name or "base alone", *(f"{loss:.2f}" for loss in losses), kb))
        say("4. Bits per byte on held-out text (lower is better; 8 is guessing):")
        click.echo(table(rows, ("", "prose", "tables", "size"), right=(1, 2, 3)))
        say(f"Done in {time.monotonic() - start:.0f} s." + (f" The adapters are in {folder}." if folder else ""))
    finally:
        if folder is None:
            shutil.rmtree(work, ignore_errors=True)
