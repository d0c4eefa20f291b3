"""What went wrong, where, and what to do about it.

Every error the library raises on purpose is an `AdapterError`. Its text is one
line, whatever a stranger's file put into a name, so the command can print it as
it is.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class AdapterError(Exception):
    """Base of all deliberate errors: `what` happened, `where`, and the `fix`.

    >>> print(AdapterError("rank is 0", where="a/adapter_config.json", fix="write r >= 1"))
    a/adapter_config.json: rank is 0; write r >= 1
    """

    def __init__(self, what: str, *, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = printable(what), printable(str(where)), printable(fix)
        text = f"{self.where}: {self.what}" if self.where else self.what
        super().__init__(f"{text}; {self.fix}" if self.fix else text)


class FileError(AdapterError):
    """A file is missing, broken, hostile, or not what it says it is."""


class HubError(FileError):
    """The Hub does not have it, does not give it to you, or could not be asked; `reason` says which in a word or two.

    The reasons: "missing", "gated", "denied", "disabled", "rate limit", "timeout", "server", "connection", "offline",
    "conflict", "corrupt".
    """

    def __init__(self, what: str, *, where: object = "", fix: str = "", reason: str) -> None:
        super().__init__(what, where=where, fix=fix)
        self.reason = reason


class ConfigError(AdapterError):
    """An option has a wrong name, type or value, or two options contradict."""


class UnknownName(AdapterError):
    """A name that nothing answers to; the text carries the nearest known one."""


class PluginError(AdapterError):
    """A plugin is broken, or two plugins claim one name."""


class NotMergeable(AdapterError):
    """No result would be right: the parts are not a sum of weight changes, or contradict each other."""


class OutputExists(AdapterError):
    """The output is already there, and nobody said to replace it."""


def printable(text: str) -> str:
    """`text` on one line: control characters are shown, not sent to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to suggest for a misspelt `name`: the near ones, else all that are known (at most eight).

    >>> nearest("lroa", ["lora", "vera"])
    "did you mean 'lora'?"
    >>> nearest("x", ["lora", "vera"])
    'known: lora, vera'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    if not names:
        return "none is known"
    return "known: " + ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


_REMEDY = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose a disk that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.ENOENT: "check the path",
}


def os_error(error: OSError, where: object) -> FileError:
    """`error` of the operating system as a FileError, with a remedy.

    `where` stands in for a path that the error does not name.
    """
    if isinstance(error.filename, (str, os.PathLike)):
        where = error.filename
    what = error.strerror or type(error).__name__
    fix = _REMEDY.get(error.errno or 0, "check the path and the disk")
    return FileError(what[:1].lower() + what[1:], where=where, fix=fix)
