"""One rank-16 adapter folded into a 0.85B Llama in bfloat16 (4 files, 1.7 GB): whole processes, against copying it.

python benchmarks/fold.py [--peft] [--grow] [--runs N] [--dir DIR]
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
from merge import command_line

YARDSTICK = "import torch, then cp -r"


def commands(adapter: list[str], base: Path, own: Path, out: Path, peft: bool) -> list[timing.Command]:
    """Importing torch and copying the base, then the fold, then PEFT's; each writes a new folder."""
    copied, folded, theirs = out / "copy", out / "folded", out / "peft"
    copy = f"import torch, subprocess as s; s.run(['cp', '-r', {str(base)!r}, {str(copied)!r}], check=True)"
    fold = [*adapter, "merge", str(own), "--into", str(base), "-o", str(folded)]
    found = [
        timing.Command(YARDSTICK, [sys.executable, "-c", copy], writes=copied),
        timing.Command("adapter merge --into", fold, writes=folded),
    ]
    if peft:
        script = [sys.executable, str(Path(__file__).with_name("peft_fold.py")), str(base), str(own), str(theirs)]
        found.append(timing.Command("PEFT", script, rounds=3, writes=theirs))
    return found


def main() -> None:
    """Build what is missing, time, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=fixtures.CACHE, help="cache (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--peft", action="store_true", help="PEFT too")
    parser.add_argument("--grow", action="store_true", help="bases two and four times as large too: 12 GB of disk")
    parser.add_argument("--adapter", help="the command to time (default: the `adapter` beside this Python)")
    options = parser.parse_args()
    print(timing.machine())
    print("$", shlex.join(["python", *sys.argv]), flush=True)
    for times in (1, 2, 4) if options.grow else (1,):
        base, own = fixtures.build_apart("sharded", "--times", str(times), folder=options.dir)
        out = Path(tempfile.mkdtemp(prefix="out-", dir=options.dir))
        try:
            todo = commands(command_line(options.adapter), base, own, out, options.peft and times == 1)
            samples = timing.measure(todo, options.runs)
        finally:
            shutil.rmtree(out)
        print(f"\n{times} × 1.7 GB\n\n{timing.table(samples, YARDSTICK)}", flush=True)
    print(f"load after: {timing.load()}")


if __name__ == "__main__":
    main()
