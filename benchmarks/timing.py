"""Time whole processes, interleaved, and say what machine that was.

For Linux. Standard library only, and nothing heavy imported: until a child replaces its program it
counts this process's memory as its own, so a small parent is what makes its peak memory true.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Command:
    """A process to time."""

    name: str
    argv: Sequence[str]
    rounds: int | None = None  # at most so many measured runs, where one takes minutes
    warmup: bool = True
    limit: float | None = None  # seconds, then it is killed
    env: Mapping[str, str] = field(default_factory=dict)
    writes: Path | None = None  # a folder that is removed before each run, which is not timed


@dataclass(frozen=True)
class Sample:
    """One run, with the descendants it waited for."""

    wall: float  # seconds
    cpu: float  # seconds, user + system
    peak: int  # bytes, resident; of the largest single process
    error: str = ""  # what went wrong: the exit status and the last line on stderr, or the time limit


def run(command: Command) -> Sample:
    """Run it once, in a process group of its own."""
    with tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        try:
            child = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **command.env},
                start_new_session=True,
            )
        except OSError as e:
            return Sample(0, 0, 0, str(e))
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(command.limit, expire) if command.limit is not None else None
        try:
            if timer is not None:
                timer.start()
            # Wait without reaping, so that the timer cannot hit a stranger that got the same pid.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            wall = time.perf_counter() - start
            if timer is not None:
                timer.cancel()
                timer.join()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        error = ""
        if child.returncode != 0:
            stderr.seek(0)
            last = stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            error = f"exit {child.returncode}: {last}"
            if expired.is_set():
                error = f"stopped at {command.limit:g} s"
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, error)


def measure(commands: Sequence[Command], rounds: int) -> dict[str, list[Sample]]:
    """Samples of each command: one warm-up that is thrown away, then `rounds` times A B C.

    A command that fails or passes its time limit keeps that sample and is not run again.
    """
    samples: dict[str, list[Sample]] = {command.name: [] for command in commands}
    if len(samples) < len(commands):
        raise ValueError("two commands have the same name")

    def once(command: Command, label: str) -> Sample:
        progress(f"{label}: {command.name}")
        if command.writes is not None:
            shutil.rmtree(command.writes, ignore_errors=True)
        return run(command)

    for command in commands:
        if command.warmup:
            sample = once(command, "warm-up")
            if sample.error:
                samples[command.name].append(sample)
    for i in range(rounds):
        for command in commands:
            done = samples[command.name]
            if not (done and done[-1].error) and (command.rounds is None or i < command.rounds):
                done.append(once(command, f"round {i + 1}/{rounds}"))
    progress("")
    return samples


def table(samples: Mapping[str, Sequence[Sample]], yardstick: str) -> str:
    """A Markdown table: median (least – most) of each command, and ratios to the yardstick's medians."""
    unit = samples[yardstick]
    lines = [
        f"| command | runs | wall, s | CPU, s | peak, MiB | wall / {yardstick} | CPU / {yardstick} |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, runs in samples.items():
        error = next((s.error for s in runs if s.error), "")
        if error:
            lines.append(f"| {name} | – | {error.replace('|', '/')} | | | | |")
            continue
        wall, cpu = [s.wall for s in runs], [s.cpu for s in runs]
        ratios = [
            "" if name == yardstick else f"{median(runs, kind) / median(unit, kind):.2f}" for kind in ("wall", "cpu")
        ]
        peak = f"{max(s.peak for s in runs) / MIB:.0f}"
        cells = [name, str(len(runs)), _spread(wall), _spread(cpu), peak, *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def median(runs: Sequence[Sample], kind: str) -> float:
    """The median of `wall`, `cpu` or `peak`."""
    values: list[float] = [getattr(s, kind) for s in runs]
    return statistics.median(values)


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f} – {max(values):.2f})" if len(values) > 1 else middle


def machine() -> str:
    """One line on what ran this: cores, load, threads, versions."""
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    names = ("torch", "safetensors", "peft", "transformers")
    libraries = ", ".join(f"{name} {_version(name)}" for name in names)
    return (
        f"{platform.system()} {platform.machine()}, {cores} cores, load {load()}, OMP_NUM_THREADS {threads}, "
        f"Python {platform.python_version()}, {libraries}"
    )


def load() -> str:
    """Processes that wanted to run, averaged over the last minute."""
    return f"{os.getloadavg()[0]:.2f}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def progress(text: str) -> None:
    """What is going on, on a terminal, in one line that the next call replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
