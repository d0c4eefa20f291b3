"""A file appears whole or not at all; what staging does for folders is in test_staging."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_staging import at_call, disk_full, interrupt, leftovers

from adapterhub_lite.errors import FileError, OutputExists
from adapterhub_lite.staging import staged_file

OLD, NEW = b"old" * 50, b"new" * 99


def ours(file: Path) -> bool:
    return file.read_bytes()[:3] in (b"old", b"new")


def save(out: Path, content: bytes, *, force: bool = False) -> None:
    with staged_file(out, force=force, replaceable=ours) as file:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(handle, content[:1])
            os.write(handle, content[1:])
        finally:
            os.close(handle)


def test_the_file_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a" / "page.html"
    with staged_file(out, replaceable=ours) as file:
        assert (file.name, file.exists(), out.exists()) == ("page.html", False, False)
        file.write_bytes(NEW)
    assert out.read_bytes() == NEW
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]


def test_only_force_replaces_and_only_what_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    save(out, OLD)
    with pytest.raises(OutputExists, match="pass --force"):
        save(out, NEW)
    assert out.read_bytes() == OLD
    save(out, NEW, force=True)
    assert out.read_bytes() == NEW
    out.write_bytes(b"a letter")
    with pytest.raises(OutputExists, match="does not look like an output of ours"):
        save(out, NEW, force=True)
    assert out.read_bytes() == b"a letter"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("folder", "this is a folder, not a file"), ("link", "link"), ("pipe", "a device or a pipe")):
        with pytest.raises(OutputExists, match=words):
            save(tmp_path / name, NEW, force=True)
    for name in ("..", "a\0b"):
        with pytest.raises(FileError, match="name of a new file"):
            save(tmp_path / name, NEW)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize(("act", "error"), [(disk_full, FileError), (interrupt, KeyboardInterrupt)])
def test_a_failure_at_any_call_leaves_the_old_or_the_new_file(
    tmp_path: Path, force: bool, exchange: bool, act: object, error: type[BaseException]
) -> None:
    out = tmp_path / "page.html"

    def start() -> None:
        out.unlink(missing_ok=True)
        if force:
            out.write_bytes(OLD)

    start()
    with at_call(10**6, lambda: None, exchange=exchange) as calls:
        save(out, NEW, force=force)
    for n in range(1, len(calls) + 1):
        start()
        said = ""
        try:
            with at_call(n, act, exchange=exchange):  # type: ignore[arg-type]
                save(out, NEW, force=force)
        except error as caught:
            said = str(caught)
        assert ".adapter-tmp" not in said
        now = out.read_bytes() if out.exists() else None
        assert now in ((OLD, NEW) if force else (None, NEW))
        save(tmp_path / "next", NEW, force=True)  # which removes what a dead run left
        assert leftovers(tmp_path) == []
