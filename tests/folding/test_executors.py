"""Shards folded by somebody's executor: threads, processes, a Dask cluster of two; and workers that fail."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_fold import tree, write_all

import adapterhub_lite as ah
from adapterhub_lite import folding
from adapterhub_lite.errors import AdapterError, FileError
from adapterhub_lite.folding.task import fold_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Done

    Command = Callable[..., Done]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_all(tmp_path_factory.mktemp("executors"))
    fold(home, "expected")
    return home


def fold(home: Path, out: str, **options: Any) -> object:
    return ah.fold(home / "base", 0.7 * ah.load(home / "a") + 0.3 * ah.load(home / "b"), home / out, **options)


def beside(home: Path) -> set[str]:
    return {path.name for path in home.iterdir() if path.name.startswith(".")}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers, processes of their own, on this machine."""
    pytest.importorskip("distributed")
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


def test_threads(home: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        fold(home, "threads", executor=pool)
    assert tree(home / "threads") == tree(home / "expected")


def processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


def test_processes(home: Path) -> None:
    with processes() as pool:
        fold(home, "processes", executor=pool, rounding="stochastic", seed=5)
    fold(home, "alone", rounding="stochastic", seed=5)
    assert tree(home / "processes") == tree(home / "alone") != tree(home / "expected")


def test_dask(home: Path, cluster: Any) -> None:
    from distributed import Client

    with Client(cluster) as client:
        done: list[tuple[int, int]] = []
        fold(home, "dask", executor=client.get_executor(), progress=lambda *n: done.append(n))
        assert len(set(client.run(os.getpid))) == 2
    assert tree(home / "dask") == tree(home / "expected")
    assert done[-1][0] == done[-1][1]


def test_dask_through_the_command(home: Path, cluster: Any, adapter: Command) -> None:
    url = cluster.scheduler_address.replace("tcp://", "dask://")
    told = adapter(
        "merge", home / "a", home / "b", "--weights", "0.7,0.3", "--into", home / "base", "-o", home / "command",
        "--executor", url,
    )  # fmt: skip
    assert told.code == 0, told
    assert tree(home / "command") == tree(home / "expected")


class Failing(Executor):
    """Runs a function in place of every task."""

    def __init__(self, instead: Callable[..., Any], pool: Executor) -> None:
        self.instead, self.pool = instead, pool

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.pool.submit(self.instead, *args, **kwargs)


def die(job: Any) -> None:
    os._exit(3)


def no_disk(job: Any) -> None:
    raise OSError(28, "No space left on device", str(job.target))


def no_file(job: Any) -> None:
    raise FileError("truncated", where=job.shard.checkpoint.path, fix="download it again")


def a_bug(job: Any) -> None:
    raise ZeroDivisionError("by zero\nin two lines")


def no_network(job: Any) -> None:
    raise ConnectionResetError("the worker has gone")


@pytest.mark.parametrize(
    ("instead", "kind", "words"),
    [
        (no_disk, FileError, "no space left"),
        (no_file, FileError, "truncated; download it again"),
        (a_bug, AdapterError, r"ZeroDivisionError: by zero\\nin"),
        (no_network, AdapterError, "a worker failed: ConnectionResetError"),
    ],
)
def test_errors_in_a_worker_are_typed(home: Path, instead: Any, kind: type[AdapterError], words: str) -> None:
    with ThreadPoolExecutor(2) as pool, pytest.raises(kind, match=words) as refused:
        fold(home, "failed", executor=Failing(instead, pool))
    assert ".adapter-part" not in str(refused.value)
    assert not (home / "failed").exists()
    assert beside(home) == set()


def test_an_error_comes_back_whole_from_another_process(home: Path) -> None:
    with processes() as pool, pytest.raises(FileError) as refused:
        fold(home, "failed", executor=Failing(no_file, pool))
    assert (refused.value.what, refused.value.fix) == ("truncated", "download it again")
    assert str(refused.value).startswith(str(home / "base" / "model-"))


def test_a_worker_that_dies(home: Path) -> None:
    fold(home, "old")
    before = tree(home / "old")
    with processes() as pool, pytest.raises(AdapterError, match="a worker failed: BrokenProcessPool"):
        fold(home, "old", force=True, executor=Failing(die, pool))
    assert tree(home / "old") == before
    assert beside(home) == set()


def die_half_way(job: Any) -> Any:
    """Once: with a part of the file written, and nothing that can be caught."""
    if (flag := job.target.parent.parent / "died").exists():
        return fold_shard(job)
    flag.touch()
    job.target.write_bytes(b"half")
    os._exit(3)


def test_dask_gives_a_dead_workers_shard_to_another(home: Path, cluster: Any) -> None:
    from distributed import Client

    with Client(cluster) as client:
        fold(home, "died-once", executor=Failing(die_half_way, client.get_executor()))
    assert (home / "died").exists()
    assert tree(home / "died-once") == tree(home / "expected")
    assert beside(home) == set()


@pytest.mark.parametrize("url", ["ray://host:1", "127.0.0.1:8786", "dask://", "dask:/x", "\n"])
def test_urls_that_are_none(home: Path, adapter: Command, url: str) -> None:
    done = adapter("merge", home / "a", "--into", home / "base", "-o", home / "none", "--executor", url)
    assert done.code == 2
    assert "is no dask://HOST:PORT" in done.err
    assert not (home / "none").exists()


def test_a_scheduler_that_does_not_answer(home: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    real = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda address, timeout: real(address, timeout="0.2s"))
    for url in ("dask://127.0.0.1:1", "dask://127.0.0.1:notaport", "dask://nobody.invalid:1"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning, message="coroutine .* was never awaited")
            done = adapter("merge", home / "a", "--into", home / "base", "-o", home / "none", "--executor", url)
        done.refused(f"{url}: no cluster answers", "check the scheduler's address")
    assert not (home / "none").exists()


def test_dask_that_is_not_installed(home: Path, adapter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = adapter("merge", home / "a", "--into", home / "base", "-o", home / "none", "--executor", "dask://x:1")
    done.refused("--executor: dask is not installed; pip install 'adapterhub-lite[cluster]'")


def test_the_workers_that_are_used_are_those(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed in this process then."""
    monkeypatch.setattr(folding, "MOST_THREADS", 0)  # which a pool of our own would not take
    monkeypatch.setattr(folding._Run, "_in_process", None)
    with ThreadPoolExecutor(1) as pool:
        fold(home, "elsewhere", executor=pool)
    assert tree(home / "elsewhere") == tree(home / "expected")
