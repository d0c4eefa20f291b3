"""Merge three rank-16 adapters of a 0.85B Llama by every rule: whole processes, against `import torch` and PEFT.

python benchmarks/rules.py [--peft] [--runs N] [--dir DIR]
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import fixtures
import timing
from merge import YARDSTICK, command_line

FACTORS = ["mean", "slerp", "karcher", "model_stock", "tsv", "iso_c", "iso_cts", "core_space", "knots"]
FACTORS += ["ctm", "svc", "pico", "robust_merge"]
ENTRIES = ["ties", "dare_linear", "dare_ties"]


def ours(adapter: list[str], inputs: list[str], out: Path) -> list[timing.Command]:
    """The yardstick; rules on factors, whole; rules on entries, truncated to rank 16."""
    commands = [timing.Command(YARDSTICK, [sys.executable, "-c", "import torch"])]
    for rule in FACTORS:
        given = inputs[:2] if rule == "slerp" else inputs
        merge = [*adapter, "merge", *given, "--rule", rule, "--force", "-q", "-o", str(out / rule)]
        commands.append(timing.Command(f"--rule {rule}", merge))
    for rule in ENTRIES:
        merge = [*adapter, "merge", *inputs, "--rule", rule, "--rank", "16", "--force", "-q", "-o", str(out / rule)]
        commands.append(timing.Command(f"--rule {rule} --rank 16", merge, rounds=1, warmup=False))
    return commands


def theirs(base: Path, inputs: list[str], out: Path, limit: float) -> list[timing.Command]:
    """PEFT's merges of the changes themselves, to rank 16; each adapter keeps a fifth."""
    script = [sys.executable, str(Path(__file__).with_name("peft_merge.py")), str(base), *inputs]
    script += ["--weights", "1", "1", "1", "--density", "0.2", "--rank", "16", "--out", str(out)]
    return [
        timing.Command(f"PEFT {kind}, rank 16", [*script, "--type", kind], rounds=1, warmup=False, limit=limit)
        for kind in ("ties_svd", "dare_linear_svd")
    ]


def main() -> None:
    """Build what is missing, time, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=fixtures.CACHE, help="cache (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="measured rounds (default: %(default)s)")
    parser.add_argument("--peft", action="store_true", help="PEFT too: needs 1.7 GB of disk, and minutes")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each of PEFT's merges")
    parser.add_argument("--adapter", help="the command to time (default: the `adapter` beside this Python)")
    options = parser.parse_args()

    inputs = [str(p) for p in fixtures.build_apart("adapters", "--dtype", "bfloat16", folder=options.dir)]
    out = Path(tempfile.mkdtemp(prefix="out-", dir=options.dir))
    try:
        commands = ours(command_line(options.adapter), inputs, out)
        if options.peft:
            (base,) = fixtures.build_apart("base", folder=options.dir)
            commands += theirs(base, inputs, out / "peft", options.limit)
        print(timing.machine())
        print("$", shlex.join(["python", *sys.argv]), flush=True)
        samples = timing.measure(commands, options.runs)
    finally:
        shutil.rmtree(out)
    print(timing.table(samples, YARDSTICK))
    print(f"load after: {timing.load()}")


if __name__ == "__main__":
    main()
