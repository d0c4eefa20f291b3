"""Adapters folded into a base model's files, shard by shard: a complete model comes out, and none is ever made.

What is touched is computed in blocks and rounded once; all other bytes are copied. The output appears whole or not at
all, and what an interrupted run has finished a later one may use.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, get_args

from ..base_model import BaseModel
from ..checkpoint import sha256
from ..errors import AdapterError, ConfigError, FileError, NotMergeable, nearest, os_error
from ..hub.pull import snapshot
from ..staging import staged, unfinished
from . import manifest, threads
from .copying import copied
from .journal import NAME as JOURNAL
from .journal import Journal, begun
from .manifest import Folded as Folded
from .planning import Plan as Plan
from .planning import contradictions as contradictions
from .planning import planned as planned
from .shards import Shard, lay_out

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..per_site import Weight
    from .task import Done, Job

MOST_THREADS = 8  # each has some 15 MB in work
WRITING = 10.0  # seconds that a failed run waits for workers that cannot be called back
LONGEST = 400  # characters of an error that is not ours
RESUME = "pass --resume (resume=True) to go on with what is done"

Progress = Callable[[int, int], None]
Rounded = Literal["nearest", "stochastic"]
Finish = Callable[[Shard, "Done"], None]


def fold(
    base: str | os.PathLike[str],
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[Weight] | None = None,
    rounding: Rounded = "nearest",
    seed: int = 0,
    link: bool = False,
    resume: bool = False,
    force: bool = False,
    any_base: bool = False,
    keep: str | None = None,
    executor: Executor | None = None,
    progress: Progress = lambda done, total: None,
) -> Folded:
    """Write the model `base`, with `adapter` folded into its weights, to the folder `out`.

    `base`: a folder, or `owner/name[@revision]` on the Hub.

    Every touched number is that of W + Σ wᵢ (Wᵢ − W), computed in float64 and rounded once to the base's dtype: to the
    nearest, or with `rounding="stochastic"` to one of its neighbours at random, by the `seed`, so that small changes
    survive on average.

    `weights`: of the terms of a sum, in their order, in place of its own; as for `merge`, one may be a mapping from
    patterns of site names to numbers, or to several along the layers. `link`: files without a touched tensor are
    linked, not copied. `resume`: go on with what an interrupted run of the same work left. `force`: replace an `out`
    that an earlier call wrote. `any_base`: do not compare the sketches of the base. `keep`: as for `Adapter.save`.
    `executor`: where the shards are folded, a task each; by default threads of this process. `progress(done, total)`
    is told bytes.

    Raises `NotMergeable` where no result would be right, `UnknownName` for a site that the base does not have,
    `FileError` for files that are broken or of another base, and `OutputExists`.
    """
    if rounding not in get_args(Rounded):
        raise ConfigError(f"rounding {rounding!r} is not known", fix=nearest(str(rounding), get_args(Rounded)))
    model, out = BaseModel.open(snapshot(base)), Path(out)
    _refuse_same(out, model.folder)
    with _resumable(out, resume), staged(out, force=force, replaceable=_ours, keep=begun, resume=resume) as folder:
        plan = planned(model, adapter, weights=weights, any_base=any_base, keep=keep)
        drawn = seed if rounding == "stochastic" else None
        journal = Journal(folder, {**plan.work(drawn), "link": link})
        _clear(folder, {name for name in journal.names if (folder / name).is_file()})
        _check_space(folder, plan, journal, link)
        journal.begin()
        run = _Run(plan, folder, journal, link=link, seed=drawn, any_base=any_base, progress=progress)
        try:
            result = run.on(executor)
        except NotMergeable:
            journal.remove()  # the same work would fail again
            raise
        manifest.write(result, folder)
        _clear(folder, {manifest.NAME, JOURNAL, *(PurePosixPath(name).parts[0] for name in result.files)})
        journal.remove()  # last: until then, what is done is kept if the disk is full
    return result


class _Run:
    """One fold, from an empty folder or what an earlier run left in it, to the last file."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        journal: Journal,
        *,
        link: bool,
        seed: int | None,
        any_base: bool,
        progress: Progress,
    ) -> None:
        self.plan, self.folder, self.journal = plan, folder, journal
        self.link, self.seed, self.any_base, self.progress = link, seed, any_base, progress
        self.run_id = secrets.token_hex(4)  # what a worker of a dead run still writes is not ours
        self.stop = threading.Event()
        self.total, self.done, self.lock = plan.model.nbytes, 0, threading.Lock()

    def on(self, executor: Executor | None) -> Folded:
        digests, kept, todo = self._others(), dict[str, list[float]](), list[Shard]()
        for shard in self.plan.shards:
            earlier = self.journal.done(shard.name)
            if earlier is None:
                todo.append(shard)
            else:
                digests[shard.name], facts = earlier
                kept |= facts
                self.step(shard.checkpoint.path.stat().st_size)

        def finish(shard: Shard, done: Done) -> None:
            self._part(shard).rename(self.folder / shard.name)
            own = {name: list(numbers) for name, numbers in done.kept.items()}
            self.journal.note(shard.name, done.sha256, own)
            digests[shard.name] = done.sha256
            kept.update(own)

        todo.sort(key=lambda shard: -shard.checkpoint.path.stat().st_size)  # or the last one may be the longest
        self._in_process(todo, finish) if executor is None else self._elsewhere(todo, finish, executor)
        return self.plan.result(digests, kept, self.seed)

    def step(self, nbytes: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.done += nbytes
            self.progress(min(self.done, self.total), self.total)

    def _in_process(self, todo: Sequence[Shard], finish: Finish) -> None:
        """On threads, several shards at once."""
        workers = min(threads.available(), MOST_THREADS)
        at_once = max(1, min(workers, len(todo)))
        ahead, pool = ThreadPoolExecutor(2), ThreadPoolExecutor(at_once)
        quiet = False  # an interrupt may leave this thread with a lock that another needs: nobody waits for it then
        with threads.torch_left_alone():  # until no thread of ours is left
            try:
                laid = [ahead.submit(self._lay_out, shard) for shard in todo]  # by the system, while numpy is imported
                with threads.one_each():
                    make = self._jobs(threads=max(1, -(-workers // at_once)))
                    running: dict[Future[Done], Shard] = {}
                    for shard, ready in zip(todo, laid, strict=True):  # one is done and noted while others are laid out
                        running[pool.submit(_when_laid_out, ready, make(shard, local=True))] = shard
                    for future in as_completed(running):
                        finish(running[future], future.result())
                quiet = True
            except Exception:
                quiet = True
                raise
            finally:
                self.stop.set()
                for each in (ahead, pool):
                    each.shutdown(wait=quiet, cancel_futures=True)

    def _elsewhere(self, todo: Sequence[Shard], finish: Finish, executor: Executor) -> None:
        """On somebody's executor, a task a shard."""
        from .task import fold_shard

        make = self._jobs(threads=1)
        running = {executor.submit(fold_shard, make(shard, local=False)): shard for shard in todo}
        try:
            for future in as_completed(running):
                shard = running[future]
                done = _outcome(future, shard)
                self.step(shard.checkpoint.path.stat().st_size)
                finish(shard, done)
        except Exception:
            wait([future for future in running if not future.cancel()], WRITING)  # or they would write into no folder
            raise
        finally:
            for future in running:
                future.cancel()

    def _jobs(self, threads: int) -> Callable[..., Job]:
        from .bases import check_base
        from .blocks import Rounding
        from .kinds import settled_all, site_for
        from .task import Job

        plan = self.plan
        sites = {name: site_for(layer, plan.sources) for name, layer in plan.layers.items()}
        if not self.any_base:
            check_base(plan, sites)
        terms = settled_all(plan, sites)

        def make(shard: Shard, local: bool) -> Job:
            own = {layer.name: sites[layer.name] for layer in shard.layers}
            job = Job(shard, self._part(shard), terms, own, Rounding(self.seed), threads, self.link)
            return replace(job, laid_out=True, step=self.step) if local else job

        return make

    def _lay_out(self, shard: Shard) -> None:
        lay_out(shard, self._part(shard), self.link, self.step)

    def _part(self, shard: Shard) -> Path:
        return self.folder / f".{shard.name}.{self.run_id}"

    def _others(self) -> dict[str, str]:
        """Copies of what lies beside the weights, and their digests."""
        model, digests = self.plan.model, dict[str, str]()
        for name in (*map(str, model.others), *([model.index] if model.index else [])):
            if name != manifest.NAME:  # that of a base which was folded itself
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                copied(model.folder / name, self.folder / name, self.step)
                digests[name] = sha256(self.folder / name)
        return digests


def _when_laid_out(ready: Future[None], job: Job) -> Done:
    from .task import fold_shard

    ready.result()
    return fold_shard(job)


def _outcome(future: Future[Done], shard: Shard) -> Done:
    try:
        return future.result()
    except (AdapterError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
            raise os_error(error, shard.checkpoint.path) from error
        # A fault of ours, or whatever an executor makes of a worker that died.
        raise AdapterError(
            f"a worker failed: {type(error).__name__}: {error}"[:LONGEST],
            where=shard.checkpoint.path,
            fix="look at the workers' logs; each must see the same files, and have this version installed",
        ) from error


@contextmanager
def _resumable(out: Path, resume: bool) -> Iterator[None]:
    """A failure that leaves something worth going on with says so."""
    before = _noted(out)

    def worth() -> bool:
        found = _noted(out)
        return found is not None and (resume or found != before)

    try:
        yield
    except KeyboardInterrupt:
        if worth():
            raise KeyboardInterrupt(RESUME) from None
        raise
    except AdapterError as error:
        if not worth():
            raise
        fix = f"{error.fix}; then {RESUME}" if error.fix else RESUME
        raise type(error)(error.what, where=error.where, fix=fix) from error


def _noted(out: Path) -> int | None:
    """When something that can be gone on with was last noted; None if there is nothing."""
    folder = unfinished(out)
    try:
        return (folder / JOURNAL).stat().st_mtime_ns if begun(folder) else None
    except OSError:
        return None


class _Stopped(Exception):
    """The run has failed or was interrupted: a thread of it ends."""


def _ours(folder: Path) -> bool:
    return (folder / manifest.NAME).is_file()


def _refuse_same(out: Path, base: Path) -> None:
    there, here = base.resolve(), out.absolute()
    if there in (here.resolve(), *here.resolve().parents):
        raise FileError("is the base's own folder, or in it", where=out, fix="choose another -o")
    if here.resolve() in there.parents and out.exists():
        raise FileError("has the base in it, which would be replaced too", where=out, fix="choose another -o")


def _clear(folder: Path, names: Set[str]) -> None:
    """Leave nothing else in the folder: not what a dead run had begun, nor what a worker of one wrote later."""
    for path in list(folder.iterdir()):
        if path.name not in names or path.is_symlink():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_space(folder: Path, plan: Plan, journal: Journal, link: bool) -> None:
    """Before a byte is written: what is yet to be must fit on the disk."""
    saved = [s for s in plan.shards if s.name in journal.names or (link and not s.touched)]
    needed = plan.model.nbytes - sum(shard.checkpoint.path.stat().st_size for shard in saved)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FileError(
            f"needs {needed} bytes, and {free} are free on this disk",
            where=folder,
            fix="free some space or choose another -o",
        )
