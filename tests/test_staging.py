"""A staged folder is old or new, whatever fails, is interrupted or killed.

Run as a program this file is the victim: it saves until it is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from adapterhub_lite import staging
from adapterhub_lite.errors import FileError, OutputExists
from adapterhub_lite.staging import staged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(staging.fcntl is None, reason="folders have no locks here")

CALLS = (
    *("open", "close", "write", "pwrite", "fsync", "mkdir", "rename", "link", "unlink", "rmdir"),
    *("listdir", "scandir", "stat", "lstat", "fstat"),
)
OLD = {"adapter_config.json": b"old", "adapter_model.safetensors": b"old" * 50, "sub/more": b"old"}
NEW = {"adapter_config.json": b"new", "adapter_model.safetensors": b"new" * 99, "extra": b"new"}


def ours(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() or not any(folder.iterdir())


def fill(folder: Path, content: dict[str, bytes]) -> None:
    """Write through the calls in CALLS, in two steps each, so that a torn file is possible."""
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(handle, data[:1])
            os.pwrite(handle, data[1:], 1)
        finally:
            os.close(handle)


def save(out: Path, content: dict[str, bytes], *, force: bool) -> None:
    with staged(out, force=force, replaceable=ours) as folder:
        fill(folder, content)


def tree(folder: Path) -> dict[str, bytes] | None:
    """What is in `folder`; None if there is no such folder."""
    if not os.path.lexists(folder):
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leftovers(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if ".adapter-" in p.name)


@contextlib.contextmanager
def at_call(n: int, act: Callable[[], object], *, exchange: bool = True) -> Iterator[list[str]]:
    """Do `act` in place of the n-th system call (of n or more: never); yields the calls made.

    Without `exchange` the system has no renameat2.
    """
    calls: list[str] = []

    def shim(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == n:
                act()
            return real(*args, **kwargs)

        return call

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, shim(name, getattr(os, name)))
        patch.setattr(staging.fcntl, "flock", shim("flock", staging.fcntl.flock))
        patch.setattr(staging, "_renameat2", shim("renameat2", staging._renameat2 if exchange else missing))
        yield calls


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


# What it does -------------------------------------------------------------------------------


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with staged(out, replaceable=ours) as folder:
        assert (folder.parent, out.exists()) == (out.parent, False)
        assert folder.name.startswith(".out.")
        assert folder.name.endswith(".adapter-tmp")
        fill(folder, NEW)
        (folder / "link").symlink_to("nowhere")
    assert tree(out) == NEW
    assert (out / "link").is_symlink()
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in (OLD, NEW, OLD):
        save(out, content, force=True)
        assert tree(out) == content
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_relative_paths_survive_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with staged(Path("out"), replaceable=ours) as folder:
        monkeypatch.chdir(tmp_path)
        fill(folder, NEW)
    assert tree(tmp_path / "here" / "out") == NEW
    assert not (tmp_path / "out").exists()


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path / "parent" / "out", NEW, force=False)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert (modes["parent"], modes["out"], modes["extra"]) == (0o750, 0o750, 0o640)


def test_all_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    real, rename = os.fsync, staging._renameat2

    def fsync(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        real(handle)

    def renameat2(source: Path, target: Path, flags: int) -> None:
        events.append("rename")
        rename(source, target, flags)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(staging, "_renameat2", renameat2)
    out = tmp_path / "made" / "out"
    save(out, OLD, force=False)
    where = events.index("rename")
    inside = [out, *out.rglob("*")]
    assert set(events[:where]) == {p.stat().st_ino for p in inside}
    assert set(events[where + 1 :]) == {out.parent.stat().st_ino, tmp_path.stat().st_ino}


# What it refuses ----------------------------------------------------------------------------


def make_file(out: Path) -> None:
    out.write_bytes(b"precious")


def make_link_to_file(out: Path) -> None:
    make_file(out.parent / "target")
    out.symlink_to("target")


def make_link_to_folder(out: Path) -> None:
    (out.parent / "target").mkdir()
    fill(out.parent / "target", OLD)
    out.symlink_to("target")


def make_dangling_link(out: Path) -> None:
    out.symlink_to("nowhere")


def make_fifo(out: Path) -> None:
    os.mkfifo(out)


def make_stranger(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_bytes(b"precious")


def state(parent: Path) -> dict[str, tuple[int, bytes | str]]:
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in parent.rglob("*"):
        what = path.readlink().as_posix() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path)] = (path.lstat().st_ino, what)
    return found


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (make_file, "this is a file"),
        (make_link_to_file, "this is a link"),
        (make_link_to_folder, "this is a link"),
        (make_dangling_link, "this is a link"),
        (make_fifo, "this is a file"),
        (make_stranger, ""),
    ],
)
def test_nothing_else_is_replaced(tmp_path: Path, force: bool, make: Callable[[Path], None], word: str) -> None:
    make(tmp_path / "out")
    before = state(tmp_path)
    word = word or ("does not look like an output of ours" if force else "the output exists; .*--force")
    with pytest.raises(OutputExists, match=word):
        save(tmp_path / "out", NEW, force=force)
    assert state(tmp_path) == before


def test_an_output_is_replaced_with_force_only(tmp_path: Path) -> None:
    save(tmp_path / "out", OLD, force=False)
    before = state(tmp_path)
    with pytest.raises(OutputExists, match="choose another -o or pass --force"):
        save(tmp_path / "out", NEW, force=False)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/", "x/..", "a\0b"])
def test_names_of_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match="cannot be the name of a new folder"):
        save(tmp_path / name if name == "a\0b" else Path(name), NEW, force=True)


def test_bad_parents(tmp_path: Path) -> None:
    make_file(tmp_path / "file")
    with pytest.raises(FileError, match="a part of the path is a file"):
        save(tmp_path / "file" / "out", NEW, force=False)
    with pytest.raises(FileError, match="name too long"):
        save(tmp_path / "new" / ("x" * 300), NEW, force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("make", [Path.mkdir, make_stranger, make_file, make_dangling_link])
def test_what_appeared_meanwhile_is_not_clobbered(tmp_path: Path, exchange: bool, make: Callable[[Path], None]) -> None:
    before = {}
    with (  # noqa: PT012
        at_call(0, interrupt, exchange=exchange),
        pytest.raises(OutputExists),
        staged(tmp_path / "out", replaceable=ours) as folder,
    ):
        fill(folder, NEW)
        make(tmp_path / "out")
        before = {k: v for k, v in state(tmp_path).items() if ".adapter-tmp" not in k}
    assert state(tmp_path) == before != {}


@pytest.mark.parametrize("exchange", [True, False])
def test_what_appeared_meanwhile_is_replaced_with_force_if_ours(tmp_path: Path, exchange: bool) -> None:
    out = tmp_path / "out"
    with at_call(0, interrupt, exchange=exchange):
        with staged(out, force=True, replaceable=ours) as folder:
            fill(folder, NEW)
            save(out, OLD, force=False)
        assert tree(out) == NEW
        with (  # noqa: PT012
            pytest.raises(OutputExists, match="does not look like"),
            staged(out, force=True, replaceable=ours),
        ):
            shutil.rmtree(out)
            make_stranger(out)
    assert tree(out) == {"thesis.tex": b"precious"}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_even_an_empty_folder_that_appeared_at_the_last_moment_stays(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain rename would replace it: POSIX lets one rename over an empty folder."""
    out, real, looked = tmp_path / "out", staging._occupied, []

    def occupied(*args: Any) -> bool:
        taken = real(*args)
        looked.append(taken)
        if len(looked) == 2:  # 1: at entry
            out.mkdir()
        return taken

    monkeypatch.setattr(staging, "_occupied", occupied)
    with at_call(0, interrupt, exchange=exchange), pytest.raises(OutputExists, match="the output exists"):
        save(out, NEW, force=False)
    assert looked == [False, False]
    assert tree(out) == {}
    assert leftovers(tmp_path) == []


# Failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError, ConnectionResetError])
@pytest.mark.parametrize("replace", [False, True])
def test_an_exception_in_the_block_leaves_things_as_they_were(
    tmp_path: Path, error: type[BaseException], replace: bool
) -> None:
    out = tmp_path / "a" / "b" / "out"
    if replace:
        save(out, OLD, force=False)
    before = state(tmp_path)
    with pytest.raises(error), staged(out, force=replace, replaceable=ours) as folder:  # noqa: PT012
        fill(folder, NEW)
        raise error
    assert state(tmp_path) == before  # no parents either


def test_errors_of_the_system_name_the_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileError) as caught, staged(out, replaceable=ours) as folder:
        (folder / "missing" / "x").write_bytes(b"")
    assert str(caught.value) == f"{out}/missing/x: no such file or directory; check the path"
    with pytest.raises(FileError) as caught, staged(out, replaceable=ours):
        disk_full()
    assert str(caught.value).startswith(f"{out}: no space left on device; free some space")
    with pytest.raises(FileError) as caught, staged(out, replaceable=ours) as folder:
        raise FileError("tensor 'a' is NaN", where=folder / "model.safetensors", fix="look for it")
    assert str(caught.value) == f"{out}/model.safetensors: tensor 'a' is NaN; look for it"
    with pytest.raises(FileError) as caught, staged(out, replaceable=ours):
        (tmp_path / "input").read_bytes()
    assert str(caught.value) == f"{tmp_path}/input: no such file or directory; check the path"
    assert list(tmp_path.iterdir()) == []


CASES = [(replace, exchange) for replace in (False, True) for exchange in (True, False)]


@pytest.mark.parametrize(("replace", "exchange"), CASES)
@pytest.mark.parametrize("act", [disk_full, interrupt])
def test_any_call_may_fail(tmp_path: Path, replace: bool, exchange: bool, act: Callable[[], None]) -> None:
    """Every single call fails once: an error means the old state, no error means the new one."""
    met: set[str] = set()
    for n in range(1, 1000):
        out = tmp_path / str(n) / "deep" / "out"
        out.parent.parent.mkdir()
        if replace:
            save(out, OLD, force=False)
        failed, text, before = False, "", tree(out)
        with at_call(n, act, exchange=exchange) as calls:
            try:
                save(out, NEW, force=replace)
            except (FileError, KeyboardInterrupt) as error:
                failed, text = True, str(error)
        done = len(calls) < n
        if not done:
            met.add(calls[n - 1])
        if act is interrupt and failed and "renameat2" in calls[: n - 1]:
            assert tree(out) in (before, NEW), n  # too late to say which
        else:
            assert tree(out) == (before if failed else NEW), (n, calls[n - 1 :][:1])
        assert not (done and failed)
        assert not failed or act is interrupt or ("no space left" in text and ".adapter-" not in text)
        save(out.parent / "next", NEW, force=False)
        assert leftovers(out.parent) == []
        if done:
            break
    else:
        pytest.fail("it never got through")
    assert n > 30
    assert met >= {"open", "close", "write", "pwrite", "fsync", "mkdir", "flock", "scandir", "renameat2"}
    assert ("rename" in met) == (not exchange)


# Kills --------------------------------------------------------------------------------------


def victim(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *map(str, args)]
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def die_at_every_call(folder: Path, replace: bool, exchange: bool) -> None:
    """For every n: a child that saves and exits at its n-th call, as kill -9 would end it."""
    for n in range(1, 1000):
        out = folder / str(n) / "out"
        out.parent.mkdir()
        if replace:
            save(out, OLD, force=False)
        child = os.fork()
        if not child:
            with at_call(n, lambda: os._exit(77), exchange=exchange):
                save(out, NEW, force=replace)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(n, code, flush=True)
        if code != 77:
            return


def replace_often(out: Path, who: str, times: int) -> None:
    """Replace `out` again and again; all its files name the same writer and round."""
    print("ready", flush=True)
    for i in range(times):
        mark = f"{who} {i} ".encode()
        save(out, {"adapter_config.json": mark, "a": mark * 1000, "sub/b": mark}, force=True)


def is_whole(content: dict[str, bytes]) -> bool:
    mark = content.get("adapter_config.json")
    return mark is not None and content == {"adapter_config.json": mark, "a": mark * 1000, "sub/b": mark}


@pytest.mark.parametrize(("replace", "exchange"), CASES)
def test_a_kill_at_any_call(tmp_path: Path, replace: bool, exchange: bool) -> None:
    # In a process of its own: forking one that has threads (torch's) is asking for trouble.
    output, _ = victim("die", tmp_path, int(replace), int(exchange)).communicate(timeout=100)
    codes = [line.split() for line in output.splitlines()]
    assert [code for _, code in codes] == ["77"] * (len(codes) - 1) + ["0"]
    assert len(codes) > 30
    seen = set()
    for n, code in codes:
        out = tmp_path / n / "out"
        found = tree(out)
        if exchange:  # at once; else there are moments without `out`, which the next run repairs
            assert found in ([OLD if replace else None, NEW] if code == "77" else [NEW]), n
        save(out.parent / "next", NEW, force=False)
        found = tree(out)
        assert found in [OLD if replace else None, NEW], n
        seen.add(str(found))
        assert leftovers(out.parent) == [], n
    assert len(seen) == 2


def test_kills_at_random_moments(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rng = random.Random(0)
    save(out, {"adapter_config.json": b"x", "a": b"x" * 1000, "sub/b": b"x"}, force=False)
    for _ in range(6):
        child = victim("replace", out, "killed", 10**6)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.01, 0.1))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        found = tree(out)
        assert found is not None
        assert is_whole(found)
    assert found["adapter_config.json"].startswith(b"killed")
    save(tmp_path / "next", NEW, force=False)
    assert leftovers(tmp_path) == []


def observed(out: Path) -> dict[str, bytes] | None:
    """What a reader sees in `out` at one moment; None if it was replaced while reading."""
    folder = os.open(out, os.O_RDONLY)  # must always be there
    try:
        content = {}
        for name in ("adapter_config.json", "a", "sub/b"):
            try:
                handle = os.open(name, os.O_RDONLY, dir_fd=folder)
            except FileNotFoundError:  # it is being deleted, if it was replaced
                continue
            with open(handle, "rb") as file:
                content[name] = file.read()
        same = os.path.samestat(os.fstat(folder), out.stat())
    finally:
        os.close(folder)
    return content if same else None


def test_concurrent_writers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, {"adapter_config.json": b"x", "a": b"x" * 1000, "sub/b": b"x"}, force=False)
    writers = [victim("replace", out, f"w{i}", 25) for i in range(4)]
    seen, count = set(), 0
    while any(writer.poll() is None for writer in writers):
        found = observed(out)
        if found is not None:
            assert is_whole(found), found.keys()
            seen.add(found["adapter_config.json"])
            count += 1
    assert [writer.wait() for writer in writers] == [0] * 4
    for writer in writers:
        writer.communicate()
    assert len(seen) > 5, count
    last = tree(out)
    assert last is not None
    assert is_whole(last)
    assert last["adapter_config.json"].split()[1] == b"24"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Sweeping -----------------------------------------------------------------------------------


def test_dead_runs_are_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = [".x.0123abcd.adapter-tmp", ".a b.ü.00000000.adapter-tmp", ".x\n.ffffffff.adapter-tmp"]
    for name in dead:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_bytes(b"half")
    keep = {".x.0123abcg.adapter-tmp", ".x.0123abc.adapter-tmp", "x.0123abcd.adapter-tmp", ".x.adapter-tmp"}
    keep |= {".x.0123abcd.adapter-tmp2", "..0123abcd.adapter-tmp", ".x.0123ABCD.adapter-tmp"}
    for name in keep:
        (tmp_path / name).mkdir()
    (tmp_path / ".file.0123abcd.adapter-tmp").write_bytes(b"precious")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_bytes(b"precious")
    (tmp_path / ".link.0123abcd.adapter-tmp").symlink_to("target")
    keep |= {".file.0123abcd.adapter-tmp", "target", ".link.0123abcd.adapter-tmp"}
    save(tmp_path / "out", NEW, force=False)
    assert {p.name for p in tmp_path.iterdir()} == {"out", *keep}
    assert (tmp_path / "target" / "file").read_bytes() == b"precious"


def test_a_live_run_is_not_swept(tmp_path: Path) -> None:
    with staged(tmp_path / "slow", replaceable=ours) as folder:
        fill(folder, OLD)
        save(tmp_path / "quick", NEW, force=False)
        victim("replace", tmp_path / "other", "process", 1).communicate(timeout=100)
        assert tree(folder) == OLD
    assert {p.name for p in tmp_path.iterdir()} == {"slow", "quick", "other"}
    assert tree(tmp_path / "slow") == OLD


def test_a_crash_between_two_renames_is_repaired(tmp_path: Path) -> None:
    fill(tmp_path / ".out.0123abcd.adapter-old", OLD)
    with pytest.raises(OutputExists):  # the old one counts as there
        save(tmp_path / "out", NEW, force=False)
    assert tree(tmp_path / "out") == OLD
    fill(tmp_path / ".out.0123abcd.adapter-old", OLD)
    save(tmp_path / "out", NEW, force=True)
    assert tree(tmp_path / "out") == NEW
    assert leftovers(tmp_path) == []


def test_a_sweep_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, renames = tmp_path / "out", os.rename, []
    save(out, OLD, force=False)

    def rename(source: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) < 20:  # a sweep that renames something would come here again
            staging._sweep(tmp_path)
        real(source, target)

    with at_call(0, interrupt, exchange=False), monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        save(out, NEW, force=True)
    assert len(renames) == 3
    assert tree(out) == NEW
    assert leftovers(tmp_path) == []


def test_a_sweep_between_making_the_folder_and_locking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = staging.fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if len(swept) < 2:
            (temp,) = (p for p in tmp_path.iterdir() if p.name in leftovers(tmp_path))
            swept.append(temp.name)
            temp.rmdir()
            if len(swept) == 2:  # the second time it still holds the lock
                raise BlockingIOError
        real(handle, how)

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    with staged(tmp_path / "out", replaceable=ours) as folder:
        assert folder.name not in swept
        assert len(swept) == 2
        fill(folder, NEW)
    assert tree(tmp_path / "out") == NEW


def test_where_folders_cannot_be_locked_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    (tmp_path / ".x.0123abcd.adapter-tmp").mkdir()
    save(tmp_path / "out", NEW, force=False)
    assert tree(tmp_path / "out") == NEW
    assert leftovers(tmp_path) == [".x.0123abcd.adapter-tmp"]
    monkeypatch.setattr(staging, "fcntl", None)
    save(tmp_path / "out", OLD, force=True)
    assert tree(tmp_path / "out") == OLD
    assert leftovers(tmp_path) == [".x.0123abcd.adapter-tmp"]


def test_parents_that_vanish_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run that failed removes the parents it had made, just before we make our folder there."""
    out, real = tmp_path / "a" / "b" / "out", staging._occupied

    def occupied(*args: Any) -> bool:
        shutil.rmtree(tmp_path / "a") if not any(out.parent.iterdir()) else None
        return real(*args)

    monkeypatch.setattr(staging, "_occupied", occupied)
    save(out, NEW, force=False)
    assert tree(out) == NEW


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "die":
        die_at_every_call(Path(where), *(bool(int(flag)) for flag in rest))
    else:
        replace_often(Path(where), rest[0], int(rest[1]))
