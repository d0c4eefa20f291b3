"""A folder, or a file, that appears whole or not at all, whatever fails or is killed on the way."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FileError, OutputExists, os_error, printable

try:
    import fcntl
except ImportError:  # Windows: no locks on folders, hence no sweeping
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OURS = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.adapter-(?P<kind>tmp|old)", re.DOTALL)
_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100  # linux/fs.h, fcntl.h
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS = {errno.ENOLCK, errno.EBADF, *_UNSUPPORTED}
_SOMEBODY_WAS_QUICKER = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT}
_ATTEMPTS = 100


@contextlib.contextmanager
def staged(
    out: Path,
    *,
    force: bool = False,
    replaceable: Callable[[Path], bool],
    keep: Callable[[Path], bool] | None = None,
    resume: bool = False,
) -> Iterator[Path]:
    """A temporary folder beside `out` to write into; it becomes `out` when the block ends.

    If the block raises, or anything after it fails, the temporary folder is removed and
    `out` stays as it was. An `out` that exists is replaced with `force` only, and
    only if `replaceable(out)`. Missing parents of `out` are made.

    A killed process leaves `out` either old or new; what else it leaves is removed
    by the next call for the same parent folder.

    With `keep`, what a run that failed or was killed had written may be used again:
    its folder stays if `keep(folder)`, and is given to the next run for the same
    `out` that wants to `resume`; any other such run removes it.
    """
    with _staged(out, force, replaceable, "folder", keep, resume) as temp:
        yield temp


def refuse_occupied(out: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise `OutputExists` where `staged` would, before long work that is to end there."""
    _occupied(Path(out).absolute(), force, replaceable, "folder")


@contextlib.contextmanager
def staged_file(out: Path, *, force: bool = False, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """As `staged`, for a single file: the path to write it to."""
    with _staged(out, force, replaceable, "file") as temp:
        yield temp / Path(out).name


@contextlib.contextmanager
def _staged(
    out: Path,
    force: bool,
    replaceable: Callable[[Path], bool],
    kind: str,
    keep: Callable[[Path], bool] | None = None,
    resume: bool = False,
) -> Iterator[Path]:
    if "\0" in str(out) or Path(out).name in ("", ".."):
        raise FileError(f"this cannot be the name of a new {kind}", where=out, fix=f"name the {kind} itself")
    temp: Path | None = None
    try:
        out = Path(out).absolute()  # the block may change the working directory
        made: list[Path] = []
        try:
            _make_parents(out.parent, made)
            _sweep(out.parent)
            _occupied(out, force, replaceable, kind)
            opened = _fresh_folder(out, made) if keep is None else _lasting_folder(out, made, keep, resume)
            with opened as temp:
                yield temp
                _sync_tree(temp)
                _commit(temp, out, made, force, replaceable, kind)
        except BaseException:
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    except FileError as error:
        if temp is None or printable(str(temp)) not in error.where:
            raise
        raise _outward(error, temp, out) from error
    except OSError as error:
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise  # of the network, raised in the block: not about a file
        refusal = os_error(error, out)
        raise (_outward(refusal, temp, out) if temp else refusal) from error


def _outward(error: FileError, temp: Path, out: Path) -> FileError:
    """`error` as one about `out`, not about the temporary folder, of which nobody has heard."""
    where = error.where
    for ours in (temp / out.name, temp):  # the file in it, or itself
        where = where.replace(printable(str(ours)), printable(str(out)))
    return FileError(error.what, where=where, fix=error.fix)


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make `folder` and its parents, noting in `made` those that were missing."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another run makes the same ones
            each.mkdir()
            made.append(each)


def _occupied(out: Path, force: bool, replaceable: Callable[[Path], bool], kind: str) -> bool:
    """Whether `out` exists; raises OutputExists unless it may be replaced."""
    try:
        mode = out.lstat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(mode):
        raise OutputExists("this is a link", where=out, fix=f"name the {kind} it points to, or another one")
    another = "choose another -o" if kind == "folder" else "choose another name"
    if not (stat.S_ISDIR if kind == "folder" else stat.S_ISREG)(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a file" if kind == "folder" else "a device or a pipe"
        raise OutputExists(f"this is {found}, not a {kind}", where=out, fix=another)
    if not force:
        raise OutputExists("the output exists", where=out, fix=f"{another} or pass --force")
    if not replaceable(out):
        raise OutputExists(
            f"this {kind} does not look like an output of ours, and is not deleted even with --force",
            where=out,
            fix=f"{another} or remove it yourself",
        )
    return True


def _sibling(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}.adapter-{kind}")


@contextlib.contextmanager
def _fresh_folder(out: Path, made: list[Path]) -> Iterator[Path]:
    """A new folder beside `out`, locked during the block; what is at its path then is removed."""
    for _ in range(_ATTEMPTS):
        temp = _sibling(out, "tmp")
        try:
            temp.mkdir()
        except FileExistsError:
            continue
        except FileNotFoundError:  # a failed run removed the parents that it had made
            _make_parents(out.parent, made)
            continue
        try:
            with _locked(temp) as held:
                if held is not False:  # else a sweep came before the lock, and took it for a dead run's
                    yield temp
                    return
        finally:
            _discard(temp)
    raise FileError("no temporary folder could be made beside it", where=out, fix="choose another folder")


def unfinished(out: Path) -> Path:
    """Where a run with `keep` that writes `out` has its folder."""
    out = Path(out).absolute()
    return out.with_name(f".{out.name}.adapter-part")


@contextlib.contextmanager
def _lasting_folder(out: Path, made: list[Path], keep: Callable[[Path], bool], resume: bool) -> Iterator[Path]:
    """The folder that a dead run left for `out`, emptied unless to `resume`; locked during the block."""
    temp = unfinished(out)
    for _ in range(_ATTEMPTS):
        ours = False
        try:
            temp.mkdir()
            ours = True
        except FileExistsError:
            if temp.is_symlink() or not temp.is_dir():
                raise FileError("is in the way, and no folder of ours", where=temp, fix="remove it") from None
        except FileNotFoundError:  # a failed run removed the parents that it had made
            _make_parents(out.parent, made)
            continue
        try:
            with _locked(temp) as held:
                if held is False:
                    if temp.is_dir():
                        raise FileError("another run is writing it", where=out, fix="wait for that one, or stop it")
                    continue  # that one has just ended
                ours = True
                if not resume:
                    for path in list(temp.iterdir()):
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                yield temp
        except BaseException:
            if ours and not keep(temp):
                _discard(temp)
            raise
        with contextlib.suppress(OSError), _locked(temp) as held:
            if held is not False:  # the folder that was replaced, not one that the next run has just made
                _discard(temp)
        return
    raise FileError("no temporary folder could be made beside it", where=out, fix="choose another folder")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Hold the lock of `folder`: True if we have it, False if another has, None if there are no locks here.

    The lock dies with the process. It is on the folder itself, not on a file in
    or beside it, so that there is nothing to clean up.
    """
    if fcntl is None:
        yield None
        return
    held: bool | None
    handle = -1
    try:
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(handle), folder.lstat())  # not removed or moved meanwhile
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held = None
        yield held
    finally:
        if handle >= 0:
            with contextlib.suppress(OSError):  # nothing was written through it, and all may be done by now
                os.close(handle)


def _sweep(parent: Path) -> None:
    """Remove what dead runs left in `parent`. Never fails: it is not what the caller asked for."""
    with contextlib.suppress(OSError):
        for left in sorted(parent.iterdir()):
            match = _OURS.fullmatch(left.name)
            if match is None:
                continue
            with contextlib.suppress(OSError), _locked(left) as dead:
                if not dead:
                    continue
                if match["kind"] == "old" and not os.path.lexists(parent / match["name"]):
                    left.rename(parent / match["name"])  # killed between the two renames of _exchange
                else:
                    _discard(left)


def _discard(folder: Path) -> None:
    """Remove `folder` as far as possible; the next sweep removes the rest."""
    with contextlib.suppress(OSError):  # of closing a handle, which is not among the errors ignored
        shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Put every file and folder in `folder` on the disk, so that the rename cannot come first."""
    for path, _, files in os.walk(folder, topdown=False, onerror=_raise):
        for name in files:
            file = Path(path, name)
            if not file.is_symlink():
                _sync(file)
        _sync(Path(path))


def _raise(error: OSError) -> None:
    raise error


def _sync(path: Path) -> None:
    if os.name == "nt":  # neither folders nor files opened for reading can be synced there
        return
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(
    temp: Path, out: Path, made: list[Path], force: bool, replaceable: Callable[[Path], bool], kind: str
) -> None:
    """Make `temp`, or the file in it, the new `out`; an old folder is then at `temp`. All or nothing."""
    parent, temp = temp, temp if kind == "folder" else temp / out.name
    for _ in range(_ATTEMPTS):
        change: Callable[[Path, Path], None] = _move
        if _occupied(out, force, replaceable, kind):
            change = _exchange if kind == "folder" else _replace
        try:
            change(temp, out)
        except OSError as error:
            if error.errno not in _SOMEBODY_WAS_QUICKER or not parent.is_dir():
                raise
            continue  # `out` came or went since we looked
        try:
            for folder in {out.parent, *(each.parent for each in made)}:
                _sync(folder)
        except BaseException:
            if change is _exchange:
                _exchange(temp, out)
            elif change is _move:
                _move(out, temp)
            raise
        return
    raise FileError("it is being replaced again and again by others", where=out, fix="choose another -o")


def _move(source: Path, target: Path) -> None:
    """Rename, unless `target` exists."""
    try:
        _renameat2(source, target, _NOREPLACE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.rename(target)


def _replace(source: Path, target: Path) -> None:
    """Rename a file over another one, in one step."""
    source.replace(target)


def _exchange(temp: Path, out: Path) -> None:
    """Swap two folders: in one step where the system can, else in three renames.

    A crash between the renames leaves no `out`, but the old folder under a name
    from which the next run restores it.
    """
    try:
        _renameat2(temp, out, _EXCHANGE)
        return
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    aside = _sibling(out, "old")
    with _locked(out):  # or a sweep would take it for a dead run's while it is aside
        try:
            out.rename(aside)
            temp.rename(out)
            aside.rename(temp)
        except BaseException:
            with contextlib.suppress(OSError):
                if os.path.lexists(aside):
                    if not os.path.lexists(temp):
                        out.rename(temp)
                    aside.rename(out)
            raise


def _renameat2(source: Path, target: Path, flags: int) -> None:
    """Linux's rename with flags; ENOSYS where there is no such call."""
    call = _libc_renameat2()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags):
        import ctypes

        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


@functools.cache
def _libc_renameat2() -> Any:
    if sys.platform != "linux":
        return None
    import ctypes  # here: most commands need no rename

    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
