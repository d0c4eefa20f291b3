"""Files from the Hub, in the client's cache: the commit first, then what is needed of it, each file verified."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from ..checkpoint import BLOCK
from ..errors import FileError, HubError, nearest
from .failures import told
from .listing import Digests, File, Listing, digests, digests_of, listed, remember, replace_text, storage
from .reference import Reference, on_hub
from .wire import Transfer, api

ADAPTER = ("*.safetensors", "*.json", "*.md")
BASE = (*ADAPTER, "*.txt", "*.jinja", "*.model")  # and tokenizers; no pickles
ADAPTER_CONFIG, COMPOSITION, MODEL_CONFIG = "adapter_config.json", "composition.json", "config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_AT_ONCE, _LARGE = 8, 1 << 20  # files that are fetched at once, and bytes from which they are not


@dataclass(frozen=True)
class Pulled:
    """A folder on the Hub, now in the cache, every file of it verified."""

    reference: Reference
    """Pinned to its commit."""
    folder: Path
    files: Mapping[str, File]
    """By their names in the folder."""
    digests: Mapping[str, Digests]
    """Of the files that were read through for this; of others the cache was known to be right."""


def snapshot(ref: str | os.PathLike[str], *, patterns: Sequence[str] = BASE, deep: bool = True) -> Path:
    """The folder `ref` if there is one, else that of the reference `ref` to the Hub, fetched as far as needed.

    A text that is no reference comes back as the path that it is. With `deep` the folders in it are fetched too:
    a model may have its templates there, or modules of its own.
    Raises `HubError` for what the Hub does not have or give, `FileError` for files that are not what it announced.
    """
    reference = on_hub(ref)
    return Path(ref) if reference is None else fetch(reference, patterns=patterns, deep=deep).folder


def resolve(reference: Reference, transfer: Transfer | None = None) -> Reference:
    """The same, pinned to the commit that it is now; offline, that it was when it was last fetched."""
    from huggingface_hub import constants

    if reference.pinned:
        return reference
    revision = reference.revision or constants.DEFAULT_REVISION
    if constants.HF_HUB_OFFLINE:
        with contextlib.suppress(OSError):
            pinned = reference.at((storage(reference.repo) / "refs" / revision).read_text().strip())
            if pinned.pinned:
                return pinned
    with told_of(reference):
        found = api(f"models/{reference.repo}/revision/{quote(revision, safe='')}", transfer or Transfer())[0]
        pinned = reference.at(str(found["sha"]))
        if not pinned.pinned:
            raise ValueError("no commit")
    return pinned


def whole(reference: Reference) -> Pulled:
    """What the folder is, fetched and verified anew: an adapter, else a composition or a model with what is below."""
    pinned = resolve(reference)
    with told_of(reference):
        there = listed(pinned.repo, pinned.commit, Transfer(), reference).within(reference.folder)
    adapter, composition = ADAPTER_CONFIG in there, COMPOSITION in there
    model = not adapter and not composition and MODEL_CONFIG in there
    pulled = fetch(pinned, patterns=BASE if model else ADAPTER, deep=model or (composition and not adapter), again=True)
    note_branch(reference, pinned)
    return pulled


def fetch(
    reference: Reference, *, patterns: Sequence[str] = ADAPTER, deep: bool = False, again: bool = False
) -> Pulled:
    """The folder in the cache, with the files that match `patterns`; those that lack there are fetched.

    A file that was verified before and not touched since is believed, unless `again`. One that is not what the Hub
    announced is fetched once more, and if that does not help, removed. Raises as `snapshot`.
    """
    pinned = resolve(reference)
    with told_of(reference):
        listing = listed(pinned.repo, pinned.commit, Transfer(), reference)
    wanted = chosen(listing, reference, patterns, deep=deep)
    # Of a hostile listing nothing is written before all of it was looked at.
    with told_of(reference), _bars():
        places = _downloaded(listing, list(wanted.values()))
    checked: dict[str, Digests] = {}
    try:
        for name, file in wanted.items():
            place = places[file.path]
            if again or not listing.knows(file, place):
                checked[name] = _verified(listing, file, place, reference)
    finally:
        remember(listing)
    note_branch(reference, pinned)
    folder = storage(pinned.repo) / "snapshots" / pinned.commit / pinned.folder
    return Pulled(pinned, folder, wanted, checked)


def cached(listing: Listing, files: Sequence[File]) -> dict[str, Path] | None:
    """Where these are in the cache, by their paths; None unless all are there."""
    from huggingface_hub import try_to_load_from_cache

    places = {}
    for file in files:
        found = try_to_load_from_cache(listing.repo, file.path, revision=listing.commit)
        if not isinstance(found, str):
            return None
        places[file.path] = Path(found)
    return places


def chosen(listing: Listing, reference: Reference, patterns: Sequence[str], *, deep: bool = False) -> dict[str, File]:
    """The files of the folder that are wanted; `HubError` if there are none."""
    there = (listing.below if deep else listing.within)(reference.folder)
    wanted = {
        name: file
        for name, file in sorted(there.items())
        if any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)
    }
    if any(name.endswith(".safetensors") for name in wanted):
        return wanted
    folders = sorted({path.rpartition("/")[0] for path in listing.files if path.endswith(".safetensors")} - {""})
    if not there:
        what, fix = f"has no folder {reference.folder!r}", nearest(reference.folder, folders)
    elif pickled := [name for name in there if any(fnmatchcase(name, pattern) for pattern in _PICKLES)]:
        what = f"has its tensors in {pickled[0]!r}, a pickle: reading it could run code, so it is not fetched"
        fix = "ask its author for safetensors, or convert it yourself if you trust it"
    else:
        what = "has no .safetensors"
        fix = f"name one of its folders: {reference.repo}:{folders[0]}" if folders else "name another one"
    raise HubError(what, where=reference, fix=fix, reason="missing")


def _downloaded(listing: Listing, files: Sequence[File]) -> dict[str, Path]:
    """Each file's place in the cache, by its path."""
    from huggingface_hub import hf_hub_download

    def one(file: File) -> tuple[str, Path]:
        return file.path, Path(hf_hub_download(listing.repo, file.path, revision=listing.commit))

    known = cached(listing, files)
    if known is not None:
        return known
    # The large ones one by one, and by this thread: an interrupt ends them at once, and nothing is left of them.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        places = dict(pool.map(one, [file for file in files if file.size < _LARGE]))
    return {**places, **dict(map(one, [file for file in files if file.size >= _LARGE]))}


def _verified(listing: Listing, file: File, place: Path, reference: Reference) -> Digests:
    """The digests of the file in the cache, which are those announced."""
    from huggingface_hub import constants, hf_hub_download

    git = file.sha256 is None
    with told_of(reference):
        found = digests_of(place, git=git)
    if not found.match(file) and not constants.HF_HUB_OFFLINE:
        forget(place)
        with told_of(reference), _bars():
            place = Path(hf_hub_download(listing.repo, file.path, revision=listing.commit, force_download=True))
            found = digests_of(place, git=git)
        if not found.match(file):
            forget(place)
    if not found.match(file):
        raise _corrupt(file, found, place, reference, offline=constants.HF_HUB_OFFLINE)
    listing.note(file, place)
    return found


def _corrupt(file: File, found: Digests, place: Path, reference: Reference, *, offline: bool) -> FileError:
    if found.size != file.size:
        what = f"{file.path!r} has {found.size} bytes, and the Hub announced {file.size}"
    else:
        own = f"sha256 {found.sha256}" if file.sha256 is not None else f"git-sha1 {found.sha1}"
        what = f"{file.path!r} has the {own}, and the Hub announced {file.digest}"
    if offline:
        fix = f"the file was changed in the cache: fetch it again without HF_HUB_OFFLINE, or remove {place}"
    else:
        fix = "it was fetched twice and removed again: try later, or ask its owner"
    return HubError(what, where=reference, fix=fix, reason="corrupt")


def copied(pulled: Pulled, folder: Path) -> None:
    """Copy the files into an empty folder: plain files, each with the digest that it has to have."""
    for name, file in pulled.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        place = pulled.folder / name
        with open(place, "rb") as old, open(target, "xb") as new:

            def blocks(old: BinaryIO = old, new: BinaryIO = new) -> Iterator[bytes]:
                while block := old.read(BLOCK):
                    new.write(block)
                    yield block

            found = digests(blocks(), file.size, git=file.sha256 is None)
        if not found.match(file):  # it was changed since it was verified
            raise _corrupt(file, found, place, pulled.reference, offline=True)


def forget(place: Path) -> None:
    """Remove a file of the cache with all links that lead to it; nothing outside of the cache."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).resolve()
    while True:
        target = Path(os.path.normpath(place.parent.resolve() / place.readlink())) if place.is_symlink() else None
        if cache not in (place.parent.resolve() / place.name).parents:
            return
        place.unlink(missing_ok=True)
        if target is None:
            return
        place = target


def note_branch(reference: Reference, pinned: Reference) -> None:
    """As the client does: what a branch was, for when there is no network."""
    from huggingface_hub import constants

    if reference.pinned or constants.HF_HUB_OFFLINE or pinned.revision is None:
        return
    path = storage(pinned.repo) / "refs" / (reference.revision or constants.DEFAULT_REVISION)
    with contextlib.suppress(OSError):
        if not path.is_file() or path.read_text() != pinned.revision:
            replace_text(path, pinned.revision)


@contextlib.contextmanager
def told_of(reference: Reference) -> Iterator[None]:
    """Errors of the Hub say which reference they are about; a name that is nearly a folder's, which."""
    try:
        with told(reference):
            yield
    except HubError as error:
        here = Path(str(reference)).parent
        names = [p.name for p in here.iterdir() if p.is_dir()] if error.reason == "missing" and here.is_dir() else []
        hint = nearest(Path(str(reference)).name, names) if names else ""
        if not hint.startswith("did you mean"):
            raise
        raise HubError(
            error.what, where=error.where, fix=f"{error.fix}; {hint}", reason=error.reason
        ) from error.__cause__


def _bars() -> contextlib.AbstractContextManager[None]:
    """The client's progress bars, on a terminal only."""
    return contextlib.nullcontext() if sys.stderr.isatty() else silent()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No progress bars of the client."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
