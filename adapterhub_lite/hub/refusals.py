"""What the Hub says to a push that it does not take: one line, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import FileError, os_error

LONGEST = 200  # characters of a server's words
LATER = "try again later"
TOO_MANY, SERVER_ERROR = 429, 500


def refusal(error: BaseException, where: str) -> FileError:
    """The error of the client, or of what it is built on, as ours. `where` is the model."""
    for each in _chain(error):
        found = _typed(each, where)
        if found is not None:
            return found
    return FileError(f"the upload failed: {_words(error)}", where=where, fix=LATER)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what brought it about: an upload's own error only says which file it was."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _typed(error: BaseException, where: str) -> FileError | None:
    from huggingface_hub import errors

    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FileError("cannot be reached, for HF_HUB_OFFLINE is set", where=where, fix="unset it")
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, where)
    if "TimeoutException" in names or isinstance(error, TimeoutError):
        return FileError("the Hub does not answer", where=where, fix=LATER)
    if "TransportError" in names or isinstance(error, ConnectionError):  # of whichever httpx the client has
        fix = "check the network and HF_ENDPOINT, and try again later"
        return FileError(f"the Hub cannot be reached: {_words(error)}", where=where, fix=fix)
    if isinstance(error, ValueError) and "metadata" in str(error):
        what = f"the Hub does not take the card's metadata: {_words(error)}"
        return FileError(what, where=where, fix="correct what it names in README.md, or --license (license=)")
    if isinstance(error, OSError) and error.errno is not None:
        return os_error(error, where)
    return None


def _answered(error: Exception, where: str) -> FileError:
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    said = _words(getattr(error, "server_message", None) or error)
    if status == 401:
        fix = "run 'hf auth login', or set HF_TOKEN to a token that may write"
        return FileError("the Hub does not take the token", where=where, fix=fix)
    if status == 403:
        what = f"the token may not write there: {said}"
        return FileError(what, where=where, fix="use a token that may, or push to a name of your own")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileError("has no such branch", where=where, fix="check --revision (revision=)")
    if status == 404:
        fix = "check the name, and whether the token may see it"
        return FileError("the Hub has no such model, or not for this token", where=where, fix=fix)
    if status == 409:
        return FileError(
            f"the Hub has something else there: {said}", where=where, fix="look at its page, then try again"
        )
    if status == TOO_MANY:
        wait = str(getattr(response, "headers", {}).get("Retry-After", ""))
        fix = f"try again in {wait} s" if wait.isdigit() else LATER
        return FileError("the Hub has had too many requests from here", where=where, fix=fix)
    if status >= SERVER_ERROR:
        return FileError(f"the Hub failed, with {status}: {said}", where=where, fix=LATER)
    return FileError(f"the Hub refuses it, with {status}: {said}", where=where, fix="correct what it names")


def _words(error: object) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    return (text if len(text) <= LONGEST else f"{text[:LONGEST]} …").rstrip(".") or type(error).__name__
