"""Merge three rank-16 adapters of a 0.85B Llama: whole processes, against `import torch` and PEFT.

python benchmarks/merge.py [--peft] [--runs N] [--dir DIR]
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

WEIGHTS = ["0.5", "0.3", "0.2"]
YARDSTICK = "import torch"


def ours(adapter: list[str], inputs: list[str], out: Path) -> list[timing.Command]:
    """The yardstick, and the command's own jobs."""
    merge = [*adapter, "merge", *inputs, "--weights", *WEIGHTS, "--force", "-o"]
    return [
        timing.Command(YARDSTICK, [sys.executable, "-c", "import torch"]),
        timing.Command("adapter --help", [*adapter, "--help"]),
        timing.Command("adapter info a", [*adapter, "info", inputs[0]]),
        timing.Command("adapter merge, exact", [*merge, str(out / "exact")]),
        timing.Command("adapter merge --rank 16", [*merge, str(out / "rank16"), "--rank", "16"]),
    ]


def theirs(base: Path, inputs: list[str], out: Path, limit: float) -> list[timing.Command]:
    """PEFT's: cat is the exact merge, svd the truncated one."""
    script = [sys.executable, str(Path(__file__).with_name("peft_merge.py")), str(base), *inputs]
    script += ["--weights", *WEIGHTS, "--out", str(out)]
    svd = [*script, "--type", "svd", "--rank", "16"]
    commands = [timing.Command("PEFT cat", [*script, "--type", "cat"], rounds=3)]
    if limit > 0:
        commands.append(timing.Command("PEFT svd, rank 16", svd, rounds=1, warmup=False, limit=limit))
    return commands


def command_line(given: str | None) -> list[str]:
    """How to run `adapter`: as given, else the one installed beside this Python."""
    return shlex.split(given) if given else [str(Path(sys.executable).with_name("adapter"))]


def main() -> None:
    """Build what is missing, time, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=fixtures.CACHE, help="cache (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--peft", action="store_true", help="PEFT too: needs 1.7 GB of disk")
    parser.add_argument("--svd-limit", type=float, default=600, help="seconds for PEFT's svd; 0: without it")
    parser.add_argument("--adapter", help="the command to time (default: the `adapter` beside this Python)")
    options = parser.parse_args()

    inputs = [str(p) for p in fixtures.build_apart("adapters", "--dtype", options.dtype, folder=options.dir)]
    out = Path(tempfile.mkdtemp(prefix="out-", dir=options.dir))
    try:
        commands = ours(command_line(options.adapter), inputs, out)
        if options.peft:
            (base,) = fixtures.build_apart("base", folder=options.dir)
            commands += theirs(base, inputs, out / "peft", options.svd_limit)
        print(timing.machine())
        print("$", shlex.join(["python", *sys.argv]), flush=True)
        samples = timing.measure(commands, options.runs)
    finally:
        shutil.rmtree(out)
    print(timing.table(samples, YARDSTICK))
    print(f"load after: {timing.load()}")


if __name__ == "__main__":
    main()
