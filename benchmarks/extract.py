"""Extract a LoRA of rank 16 from a fine-tune of the 0.85B Llama: whole processes, against a full SVD for each layer.

python benchmarks/extract.py [--runs N] [--dir DIR]

A full SVD of all 112 layers takes half an hour or more: it is done for the seven of the first block. The same seven
are extracted too, so that the two are compared at the same work.
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

RANK = "16"


def main() -> None:
    """Build what is missing, time, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=fixtures.CACHE, help="cache (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="measured rounds (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for the full SVDs (default: %(default)s)")
    parser.add_argument("--adapter", help="the command to time (default: the `adapter` beside this Python)")
    options = parser.parse_args()
    (base,) = fixtures.build_apart("base", folder=options.dir)
    (tuned,) = fixtures.build_apart("tuned", folder=options.dir)
    out = Path(tempfile.mkdtemp(prefix="out-", dir=options.dir))
    extract = [*command_line(options.adapter), "extract", str(base), str(tuned), "--rank", RANK, "--force", "-o"]
    svd = [sys.executable, str(Path(__file__).with_name("full_svd.py")), str(base), str(tuned), RANK]
    commands = [
        timing.Command(YARDSTICK, [sys.executable, "-c", "import torch"]),
        timing.Command("all 112 layers", [*extract, str(out / "all")], warmup=False),
        timing.Command("7 layers", [*extract, str(out / "seven"), "--targets", "layers.0.*"], warmup=False),
        timing.Command("7 layers, full SVD", [*svd, "model.layers.0."], warmup=False, limit=options.limit),
    ]
    print(timing.machine())
    print("$", shlex.join(["python", *sys.argv]), flush=True)
    try:
        samples = timing.measure(commands, options.runs)
    finally:
        shutil.rmtree(out)
    print(timing.table(samples, YARDSTICK))
    print(f"load after: {timing.load()}")


if __name__ == "__main__":
    main()
