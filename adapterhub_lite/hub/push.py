"""A folder to a model on the Hub: read strictly, searched for what should not be published, and sent as one commit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FileError
from .card import NAME as CARD
from .card import by_hand, card
from .committing import MAIN, PATIENT, Branch
from .content import Content, File, read
from .leaks import Leak, leaks, refuse, whoever
from .reference import Reference, parse
from .telling import told

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,99}")


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now; of a dry run, what would be."""

    repo: str
    revision: str
    kind: str
    """An "adapter", a "composition" or a "model"."""
    files: Mapping[str, int]
    """Bytes of each file, the card's too."""
    card: str
    sent: tuple[str, ...] = ()
    """The files that were not there before, or were others."""
    commit: str | None = None
    """The commit that has them."""
    url: str | None = None
    pull_request: str | None = None
    left: tuple[str, ...] = ()
    """What is in the folder and was not published: hidden files, links that lead out of it."""
    others: tuple[str, ...] = ()
    """What is on the Hub beside them, from before."""
    card_replaced: bool = False
    """Whether somebody's text in the card on the Hub was replaced by the folder's."""
    leaks: tuple[Leak, ...] = ()
    """What was found and let pass; of a dry run, what would be refused."""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def plain(self) -> dict[str, Any]:
        """As JSON carries it."""
        told: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found = [{"where": leak.where, "kind": leak.kind, "shown": leak.shown} for leak in self.leaks]
        return {**told, "files": dict(self.files), "bytes": self.nbytes, "leaks": found}


def push(
    out: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    message: str | None = None,
    private: bool = False,
    pr: bool = False,
    dry_run: bool = False,
    allow_leaks: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pushed:
    """Publish the folder `out` as the model `repo`, `owner/name` on the Hub, in one commit.

    The folder is an adapter, a composition, or a model that adapters were folded into, and is read strictly first. The
    model is made if there is none, `private` if so; its branch `revision` too. With `pr` the commit is a pull request.
    With `dry_run` nothing is sent and nobody is asked. `license` and `datasets` go into the card's metadata.

    Raises `FileError` for a folder that is not whole, or would publish what it should not (unless `allow_leaks`),
    `HubError` for whatever the Hub refuses, and where somebody else committed meanwhile; `ConfigError` for options that
    contradict.
    """
    _check(repo, revision, pr, license)
    content = read(Path(out), progress)
    page = _Page(content, repo, license, tuple(datasets))
    text = page.text(None)
    texts: dict[str, Path | str] = {name: file.path for name, file in content.files.items()}
    found = leaks({**texts, CARD: text}, people=whoever() - {repo.partition("/")[0]})  # who is on the page anyway
    if not allow_leaks and not dry_run:
        refuse(found, out)
    planned = Pushed(
        repo=repo,
        revision=revision or MAIN,
        kind=content.kind,
        files=page.sizes(text),
        card=text,
        left=content.left,
        leaks=tuple(found),
    )
    if dry_run:
        return planned
    with PATIENT:
        branch = Branch(repo, planned.revision, private=private, pr=pr)
        text = page.text(branch.card)
        wanted: dict[str, File | bytes] = {**content.files, CARD: text.encode()}
        done = branch.commit(wanted, message or f"Push {content.kind}")
    return replace(
        planned,
        files=page.sizes(text),
        card=text,
        sent=done.sent,
        commit=done.commit,
        url=done.url,
        pull_request=done.pull_request,
        others=tuple(sorted(branch.tree.keys() - wanted.keys() - {".gitattributes"})),
        card_replaced=page.replaces(branch.card),
    )


def _check(repo: str, revision: str | None, pr: bool, license: str | None) -> None:
    if parse(repo) != Reference(repo) or ".." in repo or "--" in repo:
        fix = "give owner/name; a branch is a --revision (revision=)"
        raise ConfigError("is no name of a model on the Hub", where=repo, fix=fix)
    if Reference(repo, revision).pinned:
        raise ConfigError(f"nothing can be added to the commit {revision}", where=repo, fix="give a branch")
    if pr and revision not in (None, MAIN):
        raise ConfigError("a pull request is for the branch main", where=repo, fix="leave out --revision (revision=)")
    if license is not None and not _LICENSE.fullmatch(license):
        fix = "give one as the Hub spells it: apache-2.0, mit, cc-by-4.0, other"
        raise ConfigError(f"{license!r} is no name of a licence", fix=fix)


@dataclass(frozen=True)
class _Page:
    """The card, for whatever text it stands in."""

    content: Content
    repo: str
    license: str | None
    datasets: tuple[str, ...]

    @property
    def own(self) -> str | None:
        """The text that the folder has."""
        path = self.content.card
        if path is None:
            return None
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise FileError("is not UTF-8", where=path, fix="save it as UTF-8") from None

    @property
    def written(self) -> str:
        """What somebody wrote into the folder's card."""
        return "" if self.own is None else by_hand(self.own, self.repo, self.content.card)

    def replaces(self, remote: str | None) -> bool:
        """Whether somebody wrote other things into the card on the Hub, which the folder's takes the place of."""
        there = "" if remote is None else by_hand(remote, self.repo, f"{self.repo}/{CARD}")
        return bool(there and self.written) and there != self.written

    def text(self, remote: str | None) -> str:
        """The card; somebody's own text is the folder's, or if there is none that on the Hub."""
        old = self.own if remote is None or self.written else remote
        said, where = told(self.content, self.repo), self.content.card or f"{self.repo}/{CARD}"
        return card(old, said, self.repo, license=self.license, datasets=self.datasets, where=where)

    def sizes(self, text: str) -> dict[str, int]:
        return {**{name: file.size for name, file in self.content.files.items()}, CARD: len(text.encode())}
