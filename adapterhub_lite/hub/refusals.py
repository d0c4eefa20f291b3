"""What the Hub says to a push that it does not take, where that is something else than to a pull."""

from __future__ import annotations

from ..errors import AdapterError, HubError
from .failures import as_hub_error

STALE = 412  # the branch has another end than the commit's parent
REFUSED = frozenset([400, 401, 403, 404, 413, 422, 429])  # after these nothing can have been committed
LONGEST = 200  # characters of a server's words


def refusal(error: Exception, where: str, head: str | None = None) -> AdapterError:
    """The error of the client as ours. `where` is the model, `head` the commit that the push was on top of.

    One that is nothing of the Hub's is raised as it is.
    """
    from huggingface_hub import errors

    status = status_of(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            "cannot be reached: offline mode is on", where=where, fix="unset HF_HUB_OFFLINE", reason="offline"
        )
    if status == STALE:
        fix = f"look at what they did since {(head or 'the start')[:7]}, then push again"
        what = "was changed by somebody else meanwhile, so nothing was committed"
        return HubError(what, where=where, fix=fix, reason="conflict")
    if status == 401:  # of which the client thinks that there is no such model
        fix = "run 'hf auth login', or set HF_TOKEN to a token that may write"
        return HubError("your token is not accepted by the Hub", where=where, fix=fix, reason="denied")
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        what, fix = "is no model on the Hub that you may see", "check the name, and whose token it is: 'hf auth whoami'"
        return HubError(what, where=where, fix=fix, reason="missing")
    if isinstance(error, ValueError) and status is None and "metadata" in str(error):
        what = f"the Hub does not take the card's metadata: {' '.join(str(error).split())[:LONGEST]}"
        fix = "correct what it names in README.md, or --license (license=)"
        return HubError(what, where=where, fix=fix, reason="server")
    found = as_hub_error(error, where, "could not be pushed to")
    if found is None:
        raise error
    return found


def status_of(error: Exception) -> int | None:
    """Of the answer, if there was one."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status
