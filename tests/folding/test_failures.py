"""Whatever call fails, is interrupted or is the last before a kill: OUT is the old model or the new one, whole.

Run as a program this file is the victim: it folds, and is killed at a call.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_fold import PART, at_call, tree, write_all, write_base

import adapterhub_lite as ah
from adapterhub_lite.errors import AdapterError, FileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Done

    Command = Callable[..., Done]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses fork, and renames that swap two folders")

MOST = 400  # calls that a fold makes at most, those that only read among them

# Reads lines with the number of a call and a weight; answers with the exit code of a fold that was killed there.
VICTIM = """
import os, sys
from small_fold import CHANGES, at_call
from test_failures import fold
fold(0.5, "warm-up")
print("ready", flush=True)
for line in sys.stdin:
    n, weight = line.split()
    pid = os.fork()
    if not pid:
        with at_call(int(n), lambda: os._exit(9), CHANGES):
            fold(float(weight), "out", force=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def fold(weight: float, out: str | Path = "out", **options: Any) -> object:
    return ah.fold("base", weight * ah.load("a") + 0.3 * ah.load("b"), out, **options)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_all(tmp_path))
    return tmp_path


@pytest.fixture
def results(home: Path) -> dict[float, dict[str, bytes]]:
    """What a fold gives, by the weight of a."""
    found = {}
    for weight in (0.7, -0.7):
        fold(weight, f"results/{weight}")
        found[weight] = tree(home / "results" / str(weight))
    assert None not in found.values()
    assert found[0.7] != found[-0.7]
    return found  # type: ignore[return-value]


def beside(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()} - {"a", "b", "base", "results", "warm-up"}


def test_every_call_that_fails(home: Path, results: dict[float, dict[str, bytes]]) -> None:
    """With an OUT that is there and without one in turn; the error is typed, and tells of a path that people know."""
    begun = 0
    for n in range(1, MOST):
        existing, number = bool(n % 2), (errno.EIO, errno.ENOSPC)[n // 2 % 2]
        shutil.rmtree("out", ignore_errors=True)
        if existing:
            shutil.copytree("results/-0.7", "out")
        before = tree(home / "out")

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with at_call(n, fail) as calls:
            try:
                fold(0.7, force=existing)
            except AdapterError as error:
                message = str(error)
                assert ".adapter-" not in message
                assert os.strerror(number).lower() in message
                assert any(f"{place}" in message for place in ("out", "base/", "a/", "b/")), message
                after = tree(home / "out")
                assert after == before
                kept = (home / PART).exists()
                begun += kept
                assert ("--resume" in message) == kept
            else:
                assert tree(home / "out") == results[0.7], f"call {n}, {calls[n - 1 :][:1]}"
                if len(calls) < n:
                    break
        assert beside(home) <= {"out", PART}
    else:
        pytest.fail("it never ran to its end")
    assert begun > 10  # a run that fails late leaves something
    fold(-0.7, force=True)
    assert tree(home / "out") == results[-0.7]
    assert beside(home) == {"out"}


@pytest.fixture
def victim(home: Path) -> Iterator[Callable[[int, float], int]]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM], cwd=home, env={**os.environ, "PYTHONPATH": path}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    assert stdout.readline() == "ready\n"

    def kill(n: int, weight: float) -> int:
        stdin.write(f"{n} {weight}\n")
        stdin.flush()
        return int(stdout.readline())

    yield kill
    process.communicate()


def test_a_kill_at_every_call(
    home: Path, results: dict[float, dict[str, bytes]], victim: Callable[[int, float], int]
) -> None:
    """Between any two calls that change the disk. Every fourth run is followed by one that
    goes on with what is left, the others by one that does not.
    """
    seen, weights = [], (0.7, -0.7)
    for n in range(1, MOST):
        if n % 3 == 0:
            shutil.rmtree("out", ignore_errors=True)
        before, weight = tree(home / "out"), weights[n % 2]
        code = victim(n, weight)
        after = tree(home / "out")
        assert after == results[weight] or (code == 9 and after == before), f"a mixture after call {n}"
        assert beside(home) <= {"out", PART}
        seen.append("old" if after == before else "new")
        if code == 0:
            break
        if n % 4 == 0:
            fold(weight, force=True, resume=True)
            assert tree(home / "out") == results[weight]
            assert beside(home) == {"out"}
    else:
        pytest.fail("it never ran to its end")
    assert set(seen) == {"old", "new"}
    fold(0.7, force=True)
    assert tree(home / "out") == results[0.7]
    assert beside(home) == {"out"}


def test_a_disk_that_is_too_small_is_seen_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(home)
    needed = sum(len(data) for data in (tree(home / "base") or {}).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with at_call(0, lambda: None) as calls, pytest.raises(FileError, match=f"out: needs {needed} bytes, and"):
        fold(0.7)
    assert "pwrite" not in calls
    assert beside(home) == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    fold(0.7)


def test_a_limit_of_file_size(home: Path, results: dict[float, dict[str, bytes]]) -> None:
    import resource

    fold(-0.7)
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (1, 300, len(results[0.7]["model-0.safetensors"]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, own[1]))
        try:
            with pytest.raises(FileError, match=r"out.*file too large"):
                fold(0.7, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, own)
        assert tree(home / "out") == results[-0.7]
        assert beside(home) <= {"out", PART}
    signal.signal(signal.SIGXFSZ, handler)


def test_a_second_run_for_one_out_is_refused(home: Path, adapter: Command) -> None:
    (home / PART).mkdir()
    handle = os.open(home / PART, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = adapter("merge", "a", "b", "--into", "base", "-o", "out", "-q")
        done.refused("out: another run is writing it; wait for that one, or stop it")
    finally:
        os.close(handle)
    assert tree(home / "out") is None
    fold(0.7)
    assert beside(home) == {"out"}


def test_what_the_next_run_has_begun_is_not_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the rename and the end of a run another one may begin, at the same place."""
    real, begun = os.fsync, list[int]()

    def fsync(handle: int) -> None:
        real(handle)
        if (home / "out").exists() and not begun:
            (home / PART).mkdir()
            (home / PART / "theirs").write_text("")
            begun.append(os.open(home / PART, os.O_RDONLY))
            fcntl.flock(begun[0], fcntl.LOCK_EX)

    monkeypatch.setattr(os, "fsync", fsync)
    fold(0.7)
    assert (home / PART / "theirs").exists()
    os.close(begun[0])


@pytest.mark.parametrize("moment", ["import", "compute", "late"])
def test_interrupt_of_the_real_command(
    home: Path, results: dict[float, dict[str, bytes]], moment: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """^C when the folder is made, when the first shard is computed, when the second begins: 130, OUT as it was."""
    fold(-0.7)
    where = {
        "import": ("adapterhub_lite.folding", "_check_space"),
        "compute": ("adapterhub_lite.folding.task", "fold_shard"),
        "late": ("adapterhub_lite.folding.journal.Journal", "note"),
    }[moment]
    hooks = tmp_path_factory.mktemp("hooks")
    (hooks / "victim.py").write_text(
        "import pkgutil, os, signal, sys, time\n"
        "from adapterhub_lite.cli import main\n"
        f"owner = pkgutil.resolve_name({where[0]!r})\n"
        f"real = getattr(owner, {where[1]!r})\n"
        "def slow(*args, **options):\n"
        "    result = real(*args, **options)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.5)\n"
        "    return result\n"
        f"setattr(owner, {where[1]!r}, slow)\n"
        "main(sys.argv[1:])\n"
    )
    command = ["merge", "a", "b", "--weights", "0.7", "0.3", "--into", "base", "-o", "out", "--force", "-q"]
    start = time.monotonic()
    done = subprocess.run([sys.executable, hooks / "victim.py", *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    kept = (home / PART).exists()
    expected = "; pass --resume (resume=True) to go on with what is done" if kept else ""
    assert done.stderr == f"adapter: interrupted{expected}\n"
    assert kept == (moment == "late")
    assert time.monotonic() - start < 50
    assert tree(home / "out") == results[-0.7]
    fold(0.7, force=True, resume=True)
    assert tree(home / "out") == results[0.7]
    assert beside(home) == {"out"}


def test_another_base_beside_it_is_left_alone(home: Path) -> None:
    """The folder of an unfinished run belongs to one OUT."""
    (home / ".other.adapter-part").mkdir()
    write_base(home / "second", seed=1)
    fold(0.7)
    assert beside(home) == {"out", "second", ".other.adapter-part"}
    assert json.loads((home / "out" / "adapterhub_lite.json").read_text())["recipe"]["base"] == "base"
