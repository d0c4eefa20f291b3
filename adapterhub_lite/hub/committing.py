"""The commit of a push: what the repository was when it was looked at, and everything as one commit on top of that."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from logging import ERROR
from typing import TYPE_CHECKING, Any

from .. import _version
from ..errors import AdapterError, FileError, HubError
from .card import NAME as CARD
from .content import File
from .listing import File as Announced
from .listing import content, digests
from .refusals import REFUSED, refusal, status_of
from .wire import Transfer

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

PATIENCE = 120.0  # seconds without a byte until a server is given up, where the client would wait for ever
MAIN = "main"
RECENT = 10  # commits on top of what was there that are looked at for a lost one


@dataclass(frozen=True)
class Done:
    """What a commit came to."""

    sent: tuple[str, ...] = ()
    """The files that were not there, or were others."""
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None


class Branch:
    """The end of a branch of a model on the Hub as it was when it was looked at, and one commit on top of it."""

    def __init__(self, repo: str, revision: str, *, private: bool, pr: bool) -> None:
        """Look at the branch; the model and the branch are made if there are none.

        Raises `HubError` for what the Hub refuses, here as in `commit`.
        """
        from huggingface_hub import HfApi, get_token

        self.repo, self.revision, self.private, self.pr = repo, revision, private, pr
        self.api = HfApi(library_name="adapterhub-lite", library_version=_version.__version__)
        if get_token() is None:
            fix = "run 'hf auth login', or set HF_TOKEN to a token that may write"
            raise HubError("cannot be pushed to without a token", where=repo, fix=fix, reason="denied")
        self.made = False
        self.head = self._ask(self._head)
        self.tree = self._ask(lambda: self._tree(self.head))

    @cached_property
    def card(self) -> str | None:
        """The text of the card that is there."""
        there = self.tree.get(CARD)
        return None if there is None else self._ask(lambda: self._card(there))

    def commit(self, wanted: Mapping[str, File | bytes], message: str) -> Done:
        """Those of the files that are not there yet, as one commit, which is read back; none if all are."""
        changed = {name: own for name, own in sorted(wanted.items()) if not _same(own, self.tree.get(name))}
        if not changed:
            return Done(commit=self.head, url=f"{self.api.endpoint}/{self.repo}")
        done = self._commit(changed, wanted, message)
        url = None if done.pr_url is None else str(done.pr_url)
        return Done(tuple(changed), done.oid, str(done.commit_url), url)

    # What is there ----------------------------------------------------------------------------------

    def _head(self) -> str | None:
        """The commit at the end of the branch; the model and the branch are made if there are none."""
        from huggingface_hub import errors

        repo, revision = self.repo, self.revision
        try:
            return self._look()
        except errors.GatedRepoError:
            raise
        except errors.RevisionNotFoundError:
            self.api.create_branch(repo, branch=revision, exist_ok=True)
        except errors.RepositoryNotFoundError:
            self.api.create_repo(repo, private=True if self.private else None, exist_ok=True)
            self.made = True
            if revision != MAIN:
                self.api.create_branch(repo, branch=revision, exist_ok=True)
        return self._look()

    def _look(self) -> str | None:
        info = self.api.model_info(self.repo, revision=self.revision)
        if self.private and info.private is False:
            fix = "make it private on its page, push to another name, or leave out --private (private=True)"
            raise FileError("exists, and everybody can see it", where=self.repo, fix=fix)
        return info.sha

    def _tree(self, commit: str | None) -> dict[str, Announced]:
        from huggingface_hub.hf_api import RepoFile

        if commit is None:
            return {}
        entries = self.api.list_repo_tree(self.repo, revision=commit, recursive=True)
        return {
            entry.path: Announced(
                entry.path, entry.size, None if entry.lfs is None else entry.lfs.sha256, entry.blob_id
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def _card(self, there: Announced) -> str:
        data = content(self.repo, self.head or MAIN, there, Transfer())
        if data is None:
            what = f"sends another {CARD} than it announces"
            raise HubError(what, where=self.repo, fix="try again later, or ask its owner", reason="corrupt")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            what = f"has a {CARD} that is not UTF-8"
            raise HubError(what, where=self.repo, fix="save it as UTF-8 on its page", reason="corrupt") from None

    # The commit -------------------------------------------------------------------------------------

    def _commit(
        self, changed: Mapping[str, File | bytes], wanted: Mapping[str, File | bytes], message: str
    ) -> CommitInfo:
        """The commit, which has every file as it is here; `FileError` if there is none."""
        try:
            done = self._send(changed, message)
        except Exception as error:
            landed = None if self.pr or status_of(error) in REFUSED else self._landed(wanted)
            if landed is None:
                raise self._failed(error, committing=True) from error
            return landed
        try:
            tree = self._tree(done.oid)
        except Exception as error:
            what = f"has the commit {done.oid[:7]} of this push, but it could not be read back"
            fix = "push again later: it tells whether every file is there"
            raise HubError(what, where=self.repo, fix=fix, reason="connection") from error
        for name, own in changed.items():
            if not _same(own, tree.get(name)):
                what = f"has {'another' if name in tree else 'no'} {name} in the commit {done.oid[:7]} of this push"
                fix = "push again; if it stays so, the Hub ignores such a file"
                raise HubError(what, where=self.repo, fix=fix, reason="corrupt")
        return done

    def _send(self, changed: Mapping[str, File | bytes], message: str) -> CommitInfo:
        """One commit, through whatever storage the Hub has: the client takes open files past Xet."""
        try:
            return self._created(changed, message, opened=None)
        except Exception as error:
            if "xet-write-token" not in f"{error!r} {error.__cause__!r}":
                raise
            with contextlib.ExitStack() as opened:
                return self._created(changed, message, opened=opened)

    def _created(
        self,
        changed: Mapping[str, File | bytes],
        message: str,
        opened: contextlib.ExitStack | None,
    ) -> CommitInfo:
        from huggingface_hub import CommitOperationAdd

        def sent(own: File | bytes) -> Any:
            if isinstance(own, bytes):
                return own
            return own.path if opened is None else opened.enter_context(open(own.path, "rb"))

        done: CommitInfo = self.api.create_commit(
            self.repo,
            [CommitOperationAdd(name, sent(own)) for name, own in changed.items()],
            commit_message=message,
            revision=self.revision,
            parent_commit=self.head,
            create_pr=self.pr,
        )
        return done

    def _landed(self, wanted: Mapping[str, File | bytes]) -> CommitInfo | None:
        """The commit since then that has what was sent although no answer said so; others may be on top of it."""
        from huggingface_hub import CommitInfo

        try:
            commits = self.api.list_repo_commits(self.repo, revision=self.revision)
            since = list(takewhile(lambda commit: commit != self.head, (commit.commit_id for commit in commits)))
            for commit in reversed(since[-RECENT:]):
                tree = self._tree(commit)
                if all(_same(own, tree.get(name)) for name, own in wanted.items()):
                    url = f"{self.api.endpoint}/{self.repo}/commit/{commit}"
                    return CommitInfo(commit_url=url, commit_message="", commit_description="", oid=commit)
        except Exception:  # the error that brought us here tells more
            return None
        return None

    # What went wrong --------------------------------------------------------------------------------

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except AdapterError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception, *, committing: bool = False) -> AdapterError:
        """The error as one line, with what to do and what is left."""
        found = refusal(error, self.repo, self.head if committing else None)
        if not isinstance(found, HubError):
            return found
        what, fix = found.what, found.fix
        if self.made:
            what += " (the model was made, and is empty)"
        if self.pr and committing and status_of(error) not in REFUSED:
            fix += ", but look first whether its pull request is there"
        return HubError(what, where=found.where, fix=fix, reason=found.reason)


def _same(own: File | bytes, there: Announced | None) -> bool:
    """Whether the file on the Hub has the same bytes, by its digest."""
    if there is None:
        return False
    return digests([own], len(own)).match(there) if isinstance(own, bytes) else own.match(there)


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


PATIENT = _Patience()
