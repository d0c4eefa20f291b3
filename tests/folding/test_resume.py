"""What an unfinished run left is used again if its content is right, and only then."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_fold import PART, tree, write_all, write_lora

import adapterhub_lite as ah
from adapterhub_lite import folding
from adapterhub_lite.errors import FileError
from adapterhub_lite.folding import task
from adapterhub_lite.folding.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Done

    Command = Callable[..., Done]

SHARDS = {f"model-{i}.safetensors" for i in range(3)}


def fold(weight: float = 0.7, other: str = "b", **options: Any) -> object:
    return ah.fold("base", weight * ah.load("a") + 0.3 * ah.load(other), "out", **options)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were computed since."""
    names: list[str] = []
    real = task.fold_shard

    def counted(job: Any) -> Any:
        names.append(job.shard.name)
        return real(job)

    monkeypatch.setattr(task, "fold_shard", counted)
    return names


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that stopped when two of three shards were done; `whole` beside it is what it would be."""
    monkeypatch.chdir(write_all(tmp_path))
    fold()
    Path("out").rename("whole")
    real, notes = Journal.note, list[str]()

    def note(self: Journal, file: str, digest: str, facts: Any) -> None:
        if len(notes) == 2:
            raise FileError("the disk is gone", where=self.path, fix="look at it")
        notes.append(file)
        real(self, file, digest, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "note", note)
        with pytest.raises(FileError, match=r"out.*the disk is gone; look at it; then pass --resume \(resume=True\)"):
            fold()
    assert not Path("out").exists()
    return tmp_path / PART


def noted(folder: Path) -> list[str]:
    return [json.loads(line)["file"] for line in (folder / ".journal.jsonl").read_text().splitlines()[1:]]


def as_whole(home: Path) -> bool:
    return tree(home / "out") == tree(home / "whole") and not (home / PART).exists()


def test_only_what_is_missing_is_computed(left: Path, computed: list[str]) -> None:
    done = noted(left)
    fold(resume=True)
    assert set(computed) == SHARDS - set(done)
    assert as_whole(left.parent)


def test_without_resume_all_is_done_again(left: Path, computed: list[str]) -> None:
    fold()
    assert set(computed) == SHARDS
    assert as_whole(left.parent)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_the_base(path: Path) -> None:
    shutil.copy(path.parent.parent / "base" / path.name, path)


def gone(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [flip, cut, of_the_base, gone, folder], ids=lambda f: f.__name__)
def test_content_counts_and_not_existence(left: Path, computed: list[str], change: Callable[[Path], None]) -> None:
    done = [name for name in noted(left) if name != "model-2.safetensors"]  # in which nothing changes
    change(left / done[0])
    fold(resume=True)
    assert done[0] in computed
    assert not set(computed) & set(done[1:])
    assert as_whole(left.parent)


def test_a_torn_line_is_no_entry_and_the_next_is_not_glued_to_it(
    left: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = noted(left)
    with (left / ".journal.jsonl").open("a") as file:
        file.write('{"file": "model-')
    remove = Journal.remove
    monkeypatch.setattr(Journal, "remove", lambda self: seen.append(noted(left)) or remove(self))
    seen: list[list[str]] = []
    fold(resume=True)
    assert set(computed) == SHARDS - set(done)
    assert set(seen[0]) == SHARDS
    assert as_whole(left.parent)


def test_a_last_line_that_is_torn_off_is_done_again(left: Path, computed: list[str]) -> None:
    done, journal = noted(left), left / ".journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    fold(resume=True)
    assert set(computed) == SHARDS - {done[0]}
    assert as_whole(left.parent)


@pytest.mark.parametrize("text", ["", "{}", "\n\n", "null\n", '{"work": "other"}\n', "\x00" * 99, "[1]\n{}\n"])
def test_a_journal_that_is_none_counts_for_nothing(left: Path, computed: list[str], text: str) -> None:
    (left / ".journal.jsonl").write_text(text)
    fold(resume=True)
    assert set(computed) == SHARDS
    assert as_whole(left.parent)


def change_base_size(home: Path) -> dict[str, Any]:
    path = home / "base" / "model-2.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :])
    return {}


def change_base_time(home: Path) -> dict[str, Any]:
    os.utime(home / "base" / "model-0.safetensors", (1, 1))
    return {}


def other_adapter(home: Path) -> dict[str, Any]:
    write_lora(home / "c", seed=7)
    return {"other": "c"}


def same_name_other_content(home: Path) -> dict[str, Any]:
    shutil.rmtree(home / "b")
    write_lora(home / "b", seed=8)
    return {}


@pytest.mark.parametrize(
    "other",
    [
        change_base_size, change_base_time, other_adapter, same_name_other_content,
        lambda home: {"weight": 0.5}, lambda home: {"rounding": "stochastic", "seed": 3},
        lambda home: {"weights": [{"net.0.*": 1, "*": 0.7}, {"net.0.*": 0.1, "*": 0.3}]},
        lambda home: {"link": True},
    ],
    ids=["size", "time", "adapter", "content", "weight", "rounding", "module", "link"],
)  # fmt: skip
def test_other_work_begins_anew(left: Path, computed: list[str], other: Callable[[Path], dict[str, Any]]) -> None:
    options, home = other(left.parent), left.parent
    fold(resume=True, **options)
    assert set(computed) == SHARDS
    Path("out").rename("resumed")
    fold(**options)
    assert tree(home / "resumed") == tree(home / "out")


def test_nothing_to_go_on_with_is_no_error(left: Path, computed: list[str]) -> None:
    shutil.rmtree(left)
    fold(resume=True)
    assert set(computed) == SHARDS
    assert as_whole(left.parent)


def test_a_failure_that_leaves_nothing_does_not_tell_of_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_all(tmp_path))
    Path("base/model-1.safetensors").write_bytes(b"")
    with pytest.raises(FileError) as refused:
        fold()
    assert "resume" not in str(refused.value)


def test_the_command_goes_on(left: Path, adapter: Command, computed: list[str]) -> None:
    done = noted(left)
    told = adapter("merge", "a", "b", "--weights", "0.7", "0.3", "--into", "base", "-o", "out", "--resume")
    assert re.match("wrote out: 4 layers changed, 6 files", told.out), told
    assert set(computed) == SHARDS - set(done)
    assert as_whole(left.parent)


def test_adapters_in_memory_are_never_taken_for_others(left: Path, computed: list[str]) -> None:
    """Their recipe tells no digest, so what a run with one left is nobody's."""
    work = folding.planned(folding.BaseModel.open("base"), ah.load("a")).work(None)
    assert work == folding.planned(folding.BaseModel.open("base"), ah.load("a")).work(None)
    site = ah.load("a").terms[0][1].site(next(iter(ah.load("a").sites)))
    own = ah.load("a").terms[0][1].saved(site.name)
    held = ah.Adapter.of(ah.load("a").terms[0][1].own.method, {site.name: site}, {site.name: own})
    plans = [folding.planned(folding.BaseModel.open("base"), held, any_base=True).work(None) for _ in range(2)]
    assert plans[0] != plans[1]


def test_what_a_worker_of_a_dead_run_writes_later_is_left_out(left: Path) -> None:
    def progress(done: int, total: int) -> None:
        (left / ".model-0.safetensors.0123abcd").write_bytes(b"late")

    fold(progress=progress)
    assert as_whole(left.parent)


def test_what_would_fail_again_is_not_kept(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(job: Any) -> Any:
        raise ah.NotMergeable("no")

    monkeypatch.setattr(task, "fold_shard", refuses)
    with pytest.raises(ah.NotMergeable, match=r"^no$"):
        fold(resume=True)
    assert not left.exists()


def test_patterns_in_another_order_are_other_work(tmp_path: Path) -> None:
    """The first that matches counts."""
    one, two = ({"weight": dict.fromkeys(order, 1)} for order in (("*.q", "*"), ("*", "*.q")))
    assert Journal(tmp_path, one).key != Journal(tmp_path, two).key
