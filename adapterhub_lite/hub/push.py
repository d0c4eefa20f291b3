"""A folder to a model on the Hub: verified, scanned, and one commit on top of what was there when it was looked at."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _version
from ..errors import AdapterError, ConfigError, FileError, HubError
from .card import NAME as CARD
from .card import by_hand, card
from .content import Content, File, read
from .leaks import Leak, leaks, refuse, whoever
from .refusals import REFUSED, refusal, status_of
from .telling import told

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from huggingface_hub.hf_api import RepoFile

PATIENCE = 120.0  # seconds without a byte until a server is given up, where the client would wait for ever
MAIN = "main"
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?/[A-Za-z0-9](?:[\w.-]{0,94}\w)?")
_COMMIT = re.compile("[0-9a-f]{40}")
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
    scanned: dict[str, Path | str] = {
        **{name: file.path for name, file in content.files.items()},
        CARD: page.text(None),
    }
    found = leaks(scanned, people=whoever() - {repo.partition("/")[0]})  # whose name is on the page anyway
    if not allow_leaks and not dry_run:
        refuse(found, out)
    planned = Pushed(
        repo=repo,
        revision=revision or MAIN,
        kind=content.kind,
        files=page.sizes(page.text(None)),
        card=page.text(None),
        left=content.left,
        leaks=tuple(found),
    )
    if dry_run:
        return planned
    with _PATIENCE:
        return _Push(content, page, planned, private=private, pr=pr).run(message or f"Push {content.kind}")


def _check(repo: str, revision: str | None, pr: bool, license: str | None) -> None:
    if not _NAME.fullmatch(repo) or ".." in repo or "--" in repo:
        fix = "give owner/name; a branch is a --revision (revision=)"
        raise ConfigError("is no name of a model on the Hub", where=repo, fix=fix)
    if revision is not None and _COMMIT.fullmatch(revision):
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
        return "" if self.own is None else by_hand(self.own, self.repo)

    def replaces(self, remote: str | None) -> bool:
        """Whether somebody wrote other things into the card on the Hub, which the folder's takes the place of."""
        there = "" if remote is None else by_hand(remote, self.repo)
        return bool(there and self.written) and there != self.written

    def text(self, remote: str | None) -> str:
        """The card; somebody's own text is the folder's, or if there is none that on the Hub."""
        old = self.own if remote is None or self.written else remote
        said, where = told(self.content, self.repo), self.content.card or f"{self.repo}/{CARD}"
        return card(old, said, self.repo, license=self.license, datasets=self.datasets, where=where)

    def sizes(self, text: str) -> dict[str, int]:
        return {**{name: file.size for name, file in self.content.files.items()}, CARD: len(text.encode())}


class _Push:
    """One push: the state of the repository when it was looked at, and the commit on top of it."""

    def __init__(self, content: Content, page: _Page, planned: Pushed, *, private: bool, pr: bool) -> None:
        from huggingface_hub import HfApi, get_token

        self.where = planned.repo
        self.api = HfApi(library_name="adapterhub-lite", library_version=_version.__version__)
        if get_token() is None:
            fix = "run 'hf auth login', or set HF_TOKEN to a token that may write"
            raise HubError("cannot be pushed to without a token", where=self.where, fix=fix, reason="denied")
        self.content, self.page, self.planned, self.private, self.pr = content, page, planned, private, pr
        self.made = False

    def run(self, message: str) -> Pushed:
        planned = self.planned
        head = self._ask(self._head)
        tree = self._ask(lambda: self._tree(head))
        remote = self._ask(lambda: self._card(head)) if CARD in tree else None
        text = self.page.text(remote)
        wanted: dict[str, File | bytes] = {**self.content.files, CARD: text.encode()}
        sent = tuple(name for name, own in sorted(wanted.items()) if not _same(own, tree.get(name)))
        planned = replace(
            planned,
            card=text,
            files=self.page.sizes(text),
            others=tuple(sorted(tree.keys() - wanted.keys() - {".gitattributes"})),
            commit=head,
            url=f"{self.api.endpoint}/{planned.repo}",
            card_replaced=self.page.replaces(remote),
        )
        if not sent:
            return planned
        done = self._commit({name: wanted[name] for name in sent}, wanted, head, message)
        url = None if done.pr_url is None else str(done.pr_url)
        return replace(planned, sent=sent, commit=done.oid, url=done.commit_url, pull_request=url)

    # What is there ----------------------------------------------------------------------------------

    def _head(self) -> str | None:
        """The commit at the end of the branch; the model and the branch are made if there are none."""
        from huggingface_hub import errors

        repo, revision = self.planned.repo, self.planned.revision
        try:
            return self._look(revision)
        except errors.GatedRepoError:
            raise
        except errors.RevisionNotFoundError:
            self.api.create_branch(repo, branch=revision, exist_ok=True)
        except errors.RepositoryNotFoundError:
            self.api.create_repo(repo, private=True if self.private else None, exist_ok=True)
            self.made = True
            if revision != MAIN:
                self.api.create_branch(repo, branch=revision, exist_ok=True)
        return self._look(revision)

    def _look(self, revision: str) -> str | None:
        info = self.api.model_info(self.planned.repo, revision=revision)
        if self.private and info.private is False:
            fix = "make it private on its page, push to another name, or leave out --private (private=True)"
            raise FileError("exists, and everybody can see it", where=self.where, fix=fix)
        return info.sha

    def _tree(self, commit: str | None) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        if commit is None:
            return {}
        entries = self.api.list_repo_tree(self.planned.repo, revision=commit, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _card(self, commit: str | None) -> str:
        path = self.api.hf_hub_download(self.planned.repo, CARD, revision=commit)
        return Path(path).read_bytes().decode("utf-8-sig", "replace")

    # The commit -------------------------------------------------------------------------------------

    def _commit(
        self, changed: Mapping[str, File | bytes], wanted: Mapping[str, File | bytes], head: str | None, message: str
    ) -> CommitInfo:
        """The commit, which has every file as it is here; `FileError` if there is none."""
        try:
            done = self._send(changed, head, message)
        except Exception as error:
            landed = None if self.pr or status_of(error) in REFUSED else self._landed(wanted, head)
            if landed is None:
                raise self._failed(error, head) from error
            return landed
        self._ask(lambda: self._read_back(changed, done.oid))
        return done

    def _send(self, changed: Mapping[str, File | bytes], head: str | None, message: str) -> CommitInfo:
        """One commit, through whatever storage the Hub has: the client takes open files past Xet."""
        try:
            return self._created(changed, head, message, opened=None)
        except Exception as error:
            if "xet-write-token" not in f"{error!r} {error.__cause__!r}":
                raise
            with contextlib.ExitStack() as opened:
                return self._created(changed, head, message, opened=opened)

    def _created(
        self,
        changed: Mapping[str, File | bytes],
        head: str | None,
        message: str,
        opened: contextlib.ExitStack | None,
    ) -> CommitInfo:
        from huggingface_hub import CommitOperationAdd

        def content(own: File | bytes) -> Any:
            if isinstance(own, bytes):
                return own
            return own.path if opened is None else opened.enter_context(open(own.path, "rb"))

        done: CommitInfo = self.api.create_commit(
            self.planned.repo,
            [CommitOperationAdd(name, content(own)) for name, own in changed.items()],
            commit_message=message,
            revision=self.planned.revision,
            parent_commit=head,
            create_pr=self.pr,
        )
        return done

    def _landed(self, wanted: Mapping[str, File | bytes], head: str | None) -> CommitInfo | None:
        """The commit at the end of the branch, if it has what was sent although no answer said so."""
        from huggingface_hub import CommitInfo

        try:
            now = self._look(self.planned.revision)
            tree = self._tree(now)
        except Exception:  # the error that brought us here tells more
            return None
        if now is None or now == head or not all(_same(own, tree.get(name)) for name, own in wanted.items()):
            return None
        url = f"{self.api.endpoint}/{self.planned.repo}/commit/{now}"
        return CommitInfo(commit_url=url, commit_message="", commit_description="", oid=now)

    def _read_back(self, changed: Mapping[str, File | bytes], commit: str) -> None:
        tree = self._tree(commit)
        for name, own in changed.items():
            if not _same(own, tree.get(name)):
                what = f"has {'another' if name in tree else 'no'} {name} in the commit {commit[:7]} of this push"
                fix = "push again; if it stays so, the Hub ignores such a file"
                raise HubError(what, where=self.where, fix=fix, reason="corrupt")

    # What went wrong --------------------------------------------------------------------------------

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except AdapterError:
            raise
        except Exception as error:
            raise self._failed(error, None) from error

    def _failed(self, error: Exception, head: str | None) -> AdapterError:
        """The error as one line, with what to do and what is left."""
        found = refusal(error, self.where, head)
        if not self.made or not isinstance(found, HubError):
            return found
        what = f"{found.what} (the model was made, and is empty)"
        return HubError(what, where=found.where, fix=found.fix, reason=found.reason)


def _same(own: File | bytes, there: RepoFile | None) -> bool:
    """Whether the file on the Hub has the same bytes, by its digest."""
    if there is None:
        return False
    if isinstance(own, bytes):
        if there.lfs is not None:
            return hashlib.sha256(own).hexdigest() == there.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % len(own) + own, usedforsecurity=False).hexdigest() == there.blob_id
    if own.size != there.size:
        return False
    return own.sha256 == there.lfs.sha256 if there.lfs is not None else own.git_sha1 == there.blob_id


class _Patience:
    """The client with an end to its patience, if nobody gave it one; its own warnings are about what we do anyway."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        from huggingface_hub import get_session
        from huggingface_hub.utils import logging

        with self.lock:
            self.users += 1
            if self.users > 1:  # another push in another thread
                return
            session = get_session()
            self.undo.callback(logging.set_verbosity, logging.get_verbosity())
            self.undo.callback(setattr, session, "timeout", session.timeout)
            if not any(session.timeout.as_dict().values()):
                session.timeout = PATIENCE
            logging.set_verbosity(ERROR)

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.undo.close()


_PATIENCE = _Patience()
