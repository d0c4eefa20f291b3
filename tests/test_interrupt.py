"""Killed, interrupted or out of disk at any moment: the output is the old one or the new one, never a mixture.

Most merges run in forks of one process that has torch already, so that each takes a fraction of a second.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Done

    Command = Callable[..., Done]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses fork, and renames that swap two folders")

SITES, WIDTH, RANK = 60, 96, 8

# Reads a line of JSON: where its output goes, a limit for files, and the arguments. Answers with the process's number,
# and after another line, which says that the process was signalled if it is to be, with its exit code.
SERVER = """
import json, os, resource, signal, sys
from adapterhub_lite.cli import run
run(["merge", "a", "b", "-o", "warm-up", "-q"])
print("ready", flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the fork is done
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(order["log"] + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if order["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
        code = run(order["args"])
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    """Runs the command in a fork, and signals it after a delay."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def __call__(self, *args: object, after: float | None = None, sent: int = signal.SIGKILL, limit: int = 0) -> Done:
        from conftest import Done

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        log = self.home / "log-"
        order = {"args": [*map(str, args)], "log": str(log), "limit": limit}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if after is not None:
            time.sleep(after)
            os.kill(pid, sent)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return Done(code, *(Path(f"{log}{name}").read_text() for name in ("out", "err")))

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, a and b, in a folder of their own."""
    home = tmp_path_factory.mktemp("interrupt")
    rng = torch.Generator().manual_seed(0)
    for name in "ab":
        (home / name).mkdir()
        shapes = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
        tensors = {
            f"base_model.model.net.{i}.{key}.weight": torch.randn(shape, generator=rng)
            for i in range(SITES)
            for key, shape in shapes.items()
        }
        save_file(tensors, home / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [str(i) for i in range(SITES)]}
        (home / name / "adapter_config.json").write_text(json.dumps(config))
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    server = Server(home)
    yield server
    server.close()


def files(folder: Path) -> dict[str, bytes] | None:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


def merges(server: Server, out: Path) -> tuple[list[tuple[object, ...]], list[dict[str, bytes]], float]:
    """Two commands that write `out`, what they write, and how long that takes."""
    commands: list[tuple[object, ...]] = [
        ("merge", "a", "b", "--weights", *weights, "-o", out, "--force", "-q") for weights in ((0.7, 0.3), (0.7, -0.3))
    ]
    results, start = [], time.monotonic()
    for command in commands:
        assert server(*command) == (0, "", "")
        found = files(out)
        assert found is not None
        results.append(found)
    assert results[0] != results[1]
    return commands, results, (time.monotonic() - start) / 2


def siblings(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


@pytest.mark.parametrize("existing", [True, False])
def test_kill(server: Server, home: Path, existing: bool) -> None:
    """30 kills -9, from the first moment to after the last; then the next run leaves nothing but its output."""
    out = home / f"kill-{existing}" / "out"
    commands, results, duration = merges(server, out)
    rng, seen = random.Random(7), []
    for i in range(30):
        before = files(out) if existing else None
        if not existing:
            for path in out.parent.iterdir():
                subprocess.run(["rm", "-r", path], check=True)
        done = server(*commands[i % 2], after=(i + rng.random()) / 30 * 1.3 * duration)
        assert done.code in (-signal.SIGKILL, 0)
        after = files(out)
        assert after == before or after == results[i % 2], f"a mixture after kill {i}"
        seen.append("old" if after == before else "new")
        assert done.code or after == results[i % 2]
    assert set(seen) == {"old", "new"}, seen
    assert ah.load(out).delta("net.0").rank == 2 * RANK if out.exists() else not existing
    assert server(*commands[0]).code == 0
    assert files(out) == results[0]
    assert siblings(out) == {"out"}


def test_interrupt(server: Server, home: Path) -> None:
    """20 times ^C: exit code 130 and one line; nothing half-made, and nothing beside it after the next run."""
    out = home / "interrupt" / "out"
    commands, results, duration = merges(server, out)
    rng, codes = random.Random(8), list[int]()
    for i in range(20):
        before = files(out)
        done = server(*commands[i % 2], after=(i + rng.random()) / 20 * 1.2 * duration, sent=signal.SIGINT)
        codes.append(done.code)
        after = files(out)
        assert after in (before, results[i % 2])
        if done.code == 130:
            assert done.err == "adapter: interrupted\n"
        elif done.code == 0:
            assert after == results[i % 2]
        else:  # before the command began, or after it ended
            assert done.code == -signal.SIGINT or "KeyboardInterrupt" in done.err
    assert codes.count(130) >= 8, codes
    assert server(*commands[0]).code == 0
    assert siblings(out) == {"out"}


def test_interrupt_of_the_real_command(home: Path) -> None:
    command = [Path(sys.executable).with_name("adapter"), "merge", "a", "b", "--weights", "1", "0.3", "-o"]
    for delay in (0.6, 1.0):  # while torch is imported, as a rule
        out = f"real-{delay}/out"
        process = subprocess.Popen([*command, out], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
        if said[0]:  # it was done
            assert said[0].startswith("wrote ")
            assert (home / out / "adapter_model.safetensors").is_file()
        else:
            assert (process.returncode, *said) == (130, "", "adapter: interrupted\n")
            assert not (home / out).parent.exists()


def test_two_at_once(server: Server, home: Path) -> None:
    """Runs that replace one output: it is one of theirs."""
    out = home / "race" / "out"
    _, results, _ = merges(server, out)
    second = Server(home)
    try:
        weights = ((0.7, 0.3), (0.7, -0.3))
        for i in range(6):
            orders: list[Any] = []
            for runner, w in zip((server, second), weights if i % 2 else weights[::-1], strict=True):
                assert runner.process.stdin is not None
                args = ["merge", "a", "b", "--weights", *map(str, w), "-o", str(out), "--force", "-q"]
                order = {"args": args, "log": f"{home}/log-{runner is server}", "limit": 0}
                runner.process.stdin.write(json.dumps(order) + "\n\n")
                runner.process.stdin.flush()
                orders.append(runner.process.stdout)
            for answers in orders:
                answers.readline()
                assert int(answers.readline()) == 0
            assert files(out) in results
        assert siblings(out) == {"out"}
    finally:
        second.close()


def test_limit_of_file_size(server: Server, home: Path) -> None:
    out = home / "limit" / "out"
    commands, results, _ = merges(server, out)
    for limit in (4096, 200_000, len(results[0]["adapter_model.safetensors"]) - 1):
        server(*commands[0], limit=limit).refused(str(out), "file too large")
        assert files(out) == results[1]
        assert siblings(out) == {"out"}


@pytest.mark.parametrize("call", ["pwrite", "fsync", "mkdir"])
def test_disk_that_is_full(
    adapter: Command, home: Path, monkeypatch: pytest.MonkeyPatch, call: str, tmp_path: Path
) -> None:
    """Whichever call finds out."""
    monkeypatch.chdir(home)
    out = tmp_path / "out"
    command = ("merge", "a", "b", "--weights", 0.7, 0.3, "-o", out, "--force", "-q")
    assert adapter(*command).code == 0
    before, real = files(out), getattr(os, call)
    for count in (0, 1, 5, 60):
        calls = 0

        def full(*args: Any, count: int = count, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            done = adapter(*command)
        if calls > count:
            done.refused("no space left", "free some space")
        else:
            assert done.code == 0
        assert files(out) == before
        assert siblings(out) == {"out"}


def test_small_disk(adapter: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, of 1 MB, with room for the old adapter and not for the new one beside it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a disk takes rights that we lack")
    try:
        monkeypatch.chdir(home)
        command = ("merge", "a", "b", "--weights", 0.7, 0.3, "-o", disk / "out", "-q")
        assert adapter(*command).code == 0
        before = files(disk / "out")
        adapter(*command, "--force").refused("no space left", "free some space")
        assert files(disk / "out") == before
        assert siblings(disk / "out") == {"out"}
    finally:
        subprocess.run(["umount", disk], check=True)
