"""`adapter pull`: an adapter from the Hub."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import compose
from ..base_model import BaseModel
from ..errors import FileError, HubError, printable
from ..hub import lock as locks
from ..hub.pull import ADAPTER_CONFIG, COMPOSITION, MODEL_CONFIG, Pulled, copied, silent, whole
from ..hub.reference import Reference, parse
from ..registry import registry
from ..source import DEFAULT, stored
from ..staging import staged
from .output import print_json, size

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command()
@click.argument("ref", metavar="[REF]", required=False)
@click.option("-o", "--out", metavar="OUT", type=click.Path(path_type=Path), help="Put a copy into this folder too.")
@click.option("--lock", is_flag=True, help="Write down the commit and the digests in the lock file.")
@click.option("--locked", is_flag=True, help="Take the commit that the lock file has; without REF, all in it.")
@click.option(
    "--lock-file", metavar="FILE", type=click.Path(path_type=Path), default=Path(locks.NAME),
    help=f"The lock file. Default: {locks.NAME} here.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the adapter at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def pull(
    ref: str | None,
    out: Path | None,
    lock: bool,
    locked: bool,
    lock_file: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fetch the adapter REF, owner/name[@revision][:subfolder], from the Hub.

    It may be a composition or a model too. REF is resolved to a commit first. Of that its safetensors, JSON and
    Markdown files, and a model's tokenizer, are fetched into the Hub's cache; every one is compared with the digest
    that the Hub lists, and all is read strictly, before it is used or copied to OUT. What is in the cache is not
    fetched again, but verified again.

    \b
    adapter pull someone/sql
    adapter pull someone/sql@v1 -o sql --lock
    adapter pull --locked
    """
    if ref is None and (not locked or out is not None):
        raise click.UsageError("no adapter: give a REF, or --locked for all of the lock file")
    if lock and locked:
        raise click.UsageError("--lock writes what --locked reads: give one of them")
    known = locks.read(lock_file) if locked else {}
    refs = list(known) if ref is None else [ref]
    with silent() if quiet else nullcontext():
        done = [(each, *_pulled(each, known if locked else None, lock_file, out, force)) for each in refs]
    if lock:
        for each, pulled, _ in done:
            locks.add(lock_file, each, pulled)
    if as_json:
        found = [_report(each, pulled, kind, out) for each, pulled, kind in done]
        print_json(found[0] if ref is not None else {"adapters": found})
    elif not quiet:
        for each, pulled, kind in done:
            what = f"{kind}, {size(sum(file.size for file in pulled.files.values()))}"
            click.echo(f"{printable(each)} is {pulled.reference}: {what}, {len(pulled.files)} files verified")
            click.echo(str(out or pulled.folder))
        if lock:
            click.echo(f"locked in {printable(str(lock_file))}")


def _pulled(
    ref: str, known: Mapping[str, locks.Locked] | None, lock_file: Path, out: Path | None, force: bool
) -> tuple[Pulled, str]:
    """It in the cache and in OUT, verified and read; and what it is."""
    entry = None if known is None else locks.one(known, ref, lock_file)
    reference = _reference(ref) if entry is None else entry.reference
    if out is None:
        pulled = whole(reference)
        return pulled, _checked(pulled, entry, lock_file)
    with staged(out, force=force, replaceable=_replaceable) as folder:  # first: a refused OUT costs no work
        pulled = whole(reference)
        kind = _checked(pulled, entry, lock_file)
        copied(pulled, folder)
    return pulled, kind


def _reference(ref: str) -> Reference:
    found = parse(ref)
    if found is None:
        raise FileError("is no adapter on the Hub", where=ref, fix="write owner/name[@revision][:subfolder]")
    return found


def _checked(pulled: Pulled, entry: locks.Locked | None, lock_file: Path) -> str:
    """What it is, read strictly."""
    if entry is not None:
        locks.check(pulled, entry, lock_file)
    try:
        if ADAPTER_CONFIG not in pulled.files and COMPOSITION in pulled.files:
            from ..live import folder

            names = compose.names(folder.read(pulled.folder).tree)
            for name in names:
                stored(pulled.folder / folder.ADAPTERS / name)
            return f"a composition of {', '.join(names)}"
        if ADAPTER_CONFIG not in pulled.files and MODEL_CONFIG in pulled.files:
            return f"a model, {len(BaseModel.open(pulled.folder).tensors)} tensors"
        own = stored(pulled.folder).own
        return f"{own.method.name}, {len(own.sites)} modules"
    except FileError as error:
        where = error.where.replace(str(pulled.folder), str(pulled.reference))
        raise HubError(error.what, where=where, fix=error.fix, reason="corrupt") from error


def _replaceable(folder: Path) -> bool:
    """Whether it is an adapter and nothing else."""
    return registry().format(DEFAULT).recognises(folder) and not any(path.is_dir() for path in folder.iterdir())


def _report(ref: str, pulled: Pulled, kind: str, out: Path | None) -> dict[str, Any]:
    return {
        "ref": ref,
        "repo": pulled.reference.repo,
        "commit": pulled.reference.revision,
        "folder": pulled.reference.folder,
        "path": str(out or pulled.folder),
        "kind": kind,
        "files": {
            name: {"size": own.size, "sha256": pulled.digests[name].sha256} for name, own in pulled.files.items()
        },
    }
