"""Whether an output of ours is what it was: its files by their digests, its tensors by computing some of them again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter
from ..base_model import BaseModel
from ..checkpoint import Checkpoint, check_finite, sha256
from ..combine import labelled
from ..errors import ConfigError, FileError, NotMergeable, os_error
from ..hub.pull import snapshot
from ..per_site import Weight
from ..source import stored
from . import manifest
from .planning import Plan, header_digest, planned
from .recipe import found, not_ours, rebuilt

if TYPE_CHECKING:
    from .again import Compared

ADAPTER = "adapter_config.json"
CARD = "README.md"  # anybody may write into it, and publishing does
FIX = "fold again, or copy the folder again from where it is whole"
BLOCKS = 4  # of each tensor, that are computed again
AT_ONCE = 4  # files that are read at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """What was checked, and found as it should be; and what was not."""

    kind: str
    """A "model" that adapters were folded into, or an "adapter"."""
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    files: int
    """Of a model, those that have the SHA-256 that the manifest says."""
    nbytes: int
    """That they have."""
    tensors: int
    """Tensors that the strictly read headers have."""
    numbers: int = 0
    """Of the tensors that adapters change, computed again and found the same, bit by bit."""
    of: int = 0
    """All that they have."""

    def plain(self) -> dict[str, Any]:
        """As JSON carries it."""
        told = {"kind": self.kind, "checked": list(self.checked), "unchecked": list(self.unchecked)}
        return {
            **told,
            "files": self.files,
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "recomputed": self.numbers,
            "of": self.of,
        }


def verify(
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapters: Sequence[str | Path] | None = None,
    *,
    blocks: int | None = BLOCKS,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Verified:
    """Check the folder `out`, a model that adapters were folded into or a merged adapter.

    Of a model every file is read, and must have the digest that its manifest has. With `base` the headers of that
    model, and what lies beside its weights, must be those that were folded into; with `adapters`, in any order, these
    must have the digests of the recipe. With both, `blocks` of each tensor that adapters change (None: all), chosen by
    `seed`, are computed again and compared bit by bit, and so are bytes of all other tensors.

    Of an adapter nothing has a digest: it is read strictly, its numbers must be finite, and the `adapters` those of
    its recipe.

    Raises `FileError` that names the first file or tensor that differs, and `ConfigError` for what cannot be checked.
    """
    if blocks is not None and blocks < 1:
        raise ConfigError(f"{blocks} blocks are nothing to compare", fix="give at least 1")
    folder = snapshot(out)
    if not (folder / manifest.NAME).exists() and (folder / ADAPTER).exists():
        if base is not None:
            raise ConfigError(
                "is an adapter, which has no base in it", where=folder, fix="leave out --base (base=None)"
            )
        return _adapter(folder, adapters, progress)
    return _Model(folder, base, adapters, progress).verified(blocks, seed)


def _adapter(folder: Path, adapters: Sequence[str | Path] | None, progress: Progress) -> Verified:
    own, tensors = stored(folder), 0
    infos = [
        info for file in own.files if file.suffix == ".safetensors" for info in Checkpoint.open(file).tensors.values()
    ]
    total = sum(info.nbytes for info in infos)
    done = 0
    for info in infos:
        check_finite(info.read(), info)
        tensors, done = tensors + 1, done + info.nbytes
        progress(done, total)
    checked = ["the folder is read strictly", "all numbers are finite"]
    unchecked = ["its own bytes: an adapter has no digest of them"]
    recipe = own.own.facts.get("recipe")
    if adapters is not None:
        if recipe is None:
            raise FileError("has no recipe: it was not merged", where=folder, fix="leave out --adapters")
        found(recipe, adapters, folder)
        checked.append("the adapters have the digests of the recipe")
    elif recipe is not None:
        unchecked.append("the adapters that it was merged from: give --adapters")
    return Verified("adapter", tuple(checked), tuple(unchecked), len(own.files), total, tensors)


class _Model:
    """A folded model, its manifest, and what it is said to be made of."""

    def __init__(
        self,
        folder: Path,
        base: str | os.PathLike[str] | None,
        adapters: Sequence[str | Path] | None,
        progress: Progress,
    ) -> None:
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "there is no such folder"
            raise FileError(what, where=folder, fix="give the folder that a fold or a merge wrote")
        self.folder, self.base, self.adapters, self.progress = folder, base, adapters, progress
        told = manifest.read(folder)
        self.files: Mapping[str, str] = told["files"]
        self.replaced: list[str] = sorted(told["replaced"])
        self.where = folder / manifest.NAME
        self.nbytes = 0
        self.other_card = False
        self.recipe = _checked_recipe(told["recipe"], self.where)

    def verified(self, blocks: int | None, seed: int) -> Verified:
        hidden = self._names()
        self.nbytes = self._digests()
        model = BaseModel.open(self.folder)
        self._headers({name: shard.path for name, shard in model.shards.items()})
        files = len(self.files) - (self.other_card and CARD in self.files)
        checked = [f"{files} files have the digests of the manifest", "headers and index are whole"]
        unchecked = [f"hidden files: {', '.join(hidden[:5])}"] if hidden else []
        unchecked += [f"{CARD}, which was written since"] if self.other_card else []
        source = None if self.base is None else self._base()
        checked += ["the base's headers and other files are those of the recipe"] if source else []
        merged = None
        if self.adapters is not None:
            own = found(self.recipe["of"], self.adapters, self.where)
            merged = rebuilt(self.recipe["of"], own, self.where)
            checked.append("the adapters have the digests of the recipe")
        tensors = len(model.tensors)
        if source is None or merged is None:
            lacking = [*(["--base"] if source is None else []), *(["--adapters"] if merged is None else [])]
            unchecked.append(f"that the weights are what the recipe gives: give {' and '.join(lacking)}")
            return Verified("model", tuple(checked), tuple(unchecked), files, self.nbytes, tensors)
        compared, total = self._again(source, *merged, blocks, seed)
        checked.append(f"{compared.numbers} of {total} changed numbers, computed again, are the same")
        part = "" if compared.whole else "samples of "
        checked.append(f"{part}the {compared.copied} other tensors are the base's")
        if compared.numbers < total or not compared.whole:
            unchecked.append("the other numbers and bytes: say --all")
        return Verified("model", tuple(checked), tuple(unchecked), files, self.nbytes, tensors, compared.numbers, total)

    def _names(self) -> list[str]:
        """What is hidden; `FileError` for a file that is missing or one too many."""
        there, hidden = set[str](), list[str]()
        for path in _walk(self.folder, PurePosixPath()):
            if any(part.startswith(".") for part in path.parts):
                hidden.append(str(path))
            elif str(path) != manifest.NAME:
                there.add(str(path))
        for name in sorted(there ^ self.files.keys()):
            if name == CARD and name in there:
                self.other_card = True
                continue
            if name in there:
                raise FileError(
                    "is not in the manifest", where=self.folder / name, fix="remove it, if you know what it is"
                )
            raise FileError("is missing", where=self.folder / name, fix=FIX)
        return hidden

    def _digests(self) -> int:
        """How many bytes were read; `FileError` for a file that has another digest."""
        names = sorted(self.files)
        try:
            sizes = {name: (self.folder / name).stat().st_size for name in names}
        except OSError as error:  # a link that leads nowhere
            raise os_error(error, self.folder) from None
        total, done = sum(sizes.values()), 0
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for name, digest in zip(names, pool.map(lambda name: sha256(self.folder / name), names), strict=True):
                if digest != self.files[name] and name == CARD:
                    self.other_card = True
                elif digest != self.files[name]:
                    what = "is not what was written: its SHA-256 differs"
                    raise FileError(what, where=self.folder / name, fix=FIX)
                done += sizes[name]
                self.progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
        return total

    def _headers(self, shards: Mapping[str, Path]) -> None:
        """That files of weights, ours or the base's, have the headers of the recipe."""
        headers: Mapping[str, str] = self.recipe["headers"]
        for name in sorted(shards.keys() ^ headers.keys()):
            what = "is not in the recipe" if name in shards else "is missing"
            where = next(iter(shards.values())).with_name(name) if shards else name
            raise FileError(what, where=where, fix="give the base that was folded into")
        for name, path in shards.items():
            if header_digest(path) != headers[name]:
                fix = "give the base that was folded into, or fold again"
                raise FileError("has another header than the recipe says", where=path, fix=fix)

    def _base(self) -> BaseModel:
        assert self.base is not None
        model = BaseModel.open(snapshot(self.base))
        self._headers({name: shard.path for name, shard in model.shards.items()})
        for name in (*map(str, model.others), *([model.index] if model.index else [])):
            if name != manifest.NAME and self.files.get(name) != sha256(model.folder / name):
                what = "is another one beside the folded model" if name in self.files else "was not there when folding"
                raise FileError(what, where=model.folder / name, fix="give the base that was folded into")
        return model

    def _again(
        self, base: BaseModel, merged: Adapter, weights: Sequence[Weight], blocks: int | None, seed: int
    ) -> tuple[Compared, int]:
        from .again import Compared, Sample
        from .blocks import Rounding

        compared: Compared | None = None
        error: FileError | NotMergeable | None = None
        for plan in self._plans(base, merged, weights):
            compared = Compared(plan, self.folder, Rounding(self.recipe.get("seed")), Sample(blocks, seed))
            try:
                compared.wholes()
            except FileError as other:  # the head may be another adapter's
                error = error or other
                continue
            error, done = None, 0

            def step(total: int = len(plan.layers)) -> None:
                nonlocal done
                done += 1
                self.progress(done, total)

            compared.layers(step)
            compared.untouched()
            return compared, sum(info.numel for shard in plan.shards for info in shard.touched)
        assert error is not None
        raise error

    def _plans(self, base: BaseModel, merged: Adapter, weights: Sequence[Weight]) -> Iterator[Plan]:
        """What would be folded; more than one where adapters bring different heads, for the recipe names none."""
        error: Exception | None = None
        fitting = False
        for keep in (None, "none", *labelled(source for _, source in merged.terms)):
            try:
                plan = planned(base, merged, weights=weights, any_base=True, keep=keep)
            except NotMergeable as other:
                error = error or other
                continue
            if sorted(whole.old.name for whole in plan.wholes) == self.replaced:
                fitting = True
                yield plan
                if keep is None:
                    return
        if not fitting:
            raise error or FileError(
                "names other replaced tensors than its adapters bring", where=self.where, fix="fold again"
            )


def _checked_recipe(recipe: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    match recipe:
        case {"rule": "fold", "base": str(), "headers": {**headers}, "of": {}} if all(
            isinstance(digest, str) for digest in headers.values()
        ):
            pass
        case _:
            raise not_ours(where)
    match recipe:
        case {"rounding": "nearest"} if "seed" not in recipe:
            return recipe
        case {"rounding": "stochastic", "seed": int()}:
            return recipe
        case _:
            raise not_ours(where)


def _walk(folder: Path, inner: PurePosixPath) -> Iterator[PurePosixPath]:
    """Files below, by their relative paths; of a folder that is a link, the link."""
    try:
        entries = sorted(os.scandir(folder / inner), key=lambda entry: entry.name)
    except OSError as error:
        raise os_error(error, folder / inner) from None
    for entry in entries:
        path = inner / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, path) if not entry.name.startswith(".") else (path,)
        else:
            yield path
