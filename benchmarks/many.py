"""Merge 125, 250, 500 and 1000 adapters of 1 MiB to rank 16, to see how the cost grows.

python benchmarks/many.py [--counts N…] [--runs N] [--dir DIR]
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import fixtures
import timing
from merge import YARDSTICK, command_line


def fit(samples: dict[int, list[timing.Sample]], kind: str, unit: float) -> str:
    """The least-squares line through the medians, its worst miss, and what the last doubling cost."""
    counts = sorted(samples)
    values = [timing.median(samples[n], kind) / unit for n in counts]
    slope, intercept = statistics.linear_regression(counts, values)
    miss = max(abs(slope * n + intercept - v) / v for n, v in zip(counts, values, strict=True))
    steps = ", ".join(
        f"{b}/{a}: {y / x:.2f}" for a, b, x, y in zip(counts, counts[1:], values, values[1:], strict=False)
    )
    return f"{intercept:.3g} + {slope:.3g}·N, off by at most {miss:.0%}; {steps}"


def main() -> None:
    """Build what is missing, time, print the table and the fits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=fixtures.CACHE, help="cache (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="measured rounds (default: %(default)s)")
    parser.add_argument("--counts", type=int, nargs="+", default=[125, 250, 500, 1000])
    parser.add_argument("--adapter", help="the command to time (default: the `adapter` beside this Python)")
    options = parser.parse_args()

    counts = sorted(set(options.counts))
    inputs = fixtures.build_apart("many", "--count", str(counts[-1]), folder=options.dir)
    out = Path(tempfile.mkdtemp(prefix="out-", dir=options.dir))
    merge = [*command_line(options.adapter), "merge", "--rank", "16", "--force", "-o", str(out / "merged")]
    names = {n: f"{n} adapters" for n in counts}
    commands = [timing.Command(YARDSTICK, [sys.executable, "-c", "import torch"])]
    commands += [timing.Command(names[n], [*merge, *map(str, inputs[:n])]) for n in counts]
    print(timing.machine())
    print("$", shlex.join(["python", *sys.argv]), flush=True)
    try:
        samples = timing.measure(commands, options.runs)
    finally:
        shutil.rmtree(out)
    print(timing.table(samples, YARDSTICK))
    good = {n: samples[name] for n, name in names.items() if not any(s.error for s in samples[name])}
    if len(good) >= 2:
        print(f"wall, s:   {fit(good, 'wall', 1)}")
        print(f"CPU, s:    {fit(good, 'cpu', 1)}")
        print(f"peak, MiB: {fit(good, 'peak', timing.MIB)}")
    print(f"load after: {timing.load()}")


if __name__ == "__main__":
    main()
