"""What goes wrong between here and the Hub, as errors that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import AdapterError, HubError, os_error

_BROKEN = (ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError)  # of an answer not as agreed
_DEEPEST = 10  # causes of causes


@contextmanager
def told(where: object, *, did: str = "could not be fetched from the Hub") -> Iterator[None]:
    """Errors of huggingface_hub and of the network in the block become `HubError`s about `where`."""
    try:
        yield
    except (AdapterError, KeyboardInterrupt):
        raise
    except Exception as error:
        made = as_hub_error(error, where, did)
        if made is None:
            raise
        raise made from error


def as_hub_error(
    error: BaseException, where: object, did: str = "could not be fetched from the Hub"
) -> AdapterError | None:
    """The error to raise instead; None for one that is nothing of the Hub's."""
    chain = [error]
    while len(chain) < _DEEPEST and (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for each in chain:  # what the client says last may be only that nothing is in the cache
        made = _known(each, where, did)
        if made is not None:
            return made
    return _unknown(error, where, did)


def _known(error: BaseException, where: object, did: str) -> AdapterError | None:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    def hub(reason: str, what: str, fix: str) -> HubError:
        return HubError(what, where=where, fix=fix, reason=reason)

    if isinstance(error, errors.OfflineModeIsEnabled):
        what = "is no folder, is not in the Hub's cache, and offline mode is on"
        return hub("offline", what, "unset HF_HUB_OFFLINE to fetch it, or check the name")
    if isinstance(error, errors.GatedRepoError):
        fix = "ask for access at its page on the Hub, then run 'hf auth login' as whoever has it"
        return hub("gated", "is gated: who may fetch it is decided by its owner", fix)
    if isinstance(error, errors.DisabledRepoError):
        return hub("disabled", "has been disabled on the Hub", "look at its page on the Hub")
    if isinstance(error, errors.RevisionNotFoundError):
        return hub("missing", "has no such revision", "name a branch, a tag or a commit that it has")
    if isinstance(error, errors.RepositoryNotFoundError):
        what = "is neither a folder nor a model on the Hub that you may see"
        return hub("missing", what, "check the name, or run 'hf auth login' if it is private")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return hub("missing", "has no such file", "check the name, or name another revision")
    if isinstance(error, errors.HFValidationError):
        return hub("missing", "is no name on the Hub", "check the name")
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error, where, did)
    if isinstance(error, httpx.TimeoutException):
        return hub("timeout", f"{did}: it did not answer in time", "try again later, or set HF_HUB_DOWNLOAD_TIMEOUT")
    if isinstance(error, (httpx.ConnectError, httpx.ProxyError)):
        fix = "check the network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 what is in the cache is used"
        return hub("offline", f"{did}: there is no connection to it", fix)
    if isinstance(error, httpx.TransportError):
        return hub("connection", f"{did}: the connection broke off", "try again")
    if isinstance(error, errors.FileMetadataError):
        return hub("server", f"{did}: the server is not one", "check HF_ENDPOINT, and what is between here and there")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return os_error(error, _cache())
    return None


def _status(error: Any, where: object, did: str) -> HubError:
    """By the status of the answer."""
    status = getattr(error.response, "status_code", 0)
    said = _said(error)
    if status == 401:
        return HubError(
            "your token is not accepted by the Hub", where=where, fix="run 'hf auth login'", reason="denied"
        )
    if status == 403:
        fix = "use a token that may do this: run 'hf auth login'"
        return HubError(f"{did}: your token does not allow it{said}", where=where, fix=fix, reason="denied")
    if status == 429:
        seconds = error.response.headers.get("Retry-After", "")
        fix = f"try again in {seconds} seconds" if seconds.isdigit() else "wait some minutes and try again"
        return HubError(
            f"{did}: too many requests came from here", where=where, fix=f"{fix}; with a token more are allowed",
            reason="rate limit",
        )  # fmt: skip
    if status in (408, 504):
        return HubError(f"{did}: it took too long there", where=where, fix="try again later", reason="timeout")
    if status >= 500:
        return HubError(
            f"{did}: it has an error itself ({status})", where=where, fix="try again later", reason="server"
        )
    if status in (409, 412):
        fix = "look at what is there now, and try again"
        return HubError(f"{did}: somebody else changed it meanwhile{said}", where=where, fix=fix, reason="conflict")
    first = str(error).strip().splitlines() or ["no reason is given"]
    return HubError(f"{did}: {first[0][:200]}", where=where, fix="try again later", reason="server")


def _said(error: Any) -> str:
    """What the server says, if it says something."""
    text = getattr(error, "server_message", None)
    return f" ({text.splitlines()[0][:200]})" if isinstance(text, str) and text else ""


def _unknown(error: BaseException, where: object, did: str) -> AdapterError | None:
    from huggingface_hub import errors

    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(
            "is no folder, is not in the Hub's cache, and could not be fetched", where=where,
            fix="check the network and HF_HUB_OFFLINE", reason="offline",
        )  # fmt: skip
    if isinstance(error, OSError):
        if error.errno is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            return os_error(error, _cache())  # ours: the cache's
        return HubError(f"{did}: {first}", where=where, fix="try again", reason="connection")  # of another length, say
    if isinstance(error, _BROKEN):
        what = f"{did}: the answer is not one of a Hub ({first})"
        return HubError(what, where=where, fix="check HF_ENDPOINT, and what is between here and there", reason="server")
    if type(error).__module__.split(".")[0] in ("hf_xet", "huggingface_hub", "builtins"):
        fix = "try again, or without Xet: HF_HUB_DISABLE_XET=1"
        return HubError(f"{did}: {first}", where=where, fix=fix, reason="connection")
    return None


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE
