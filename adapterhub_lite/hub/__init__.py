"""References to the Hub: what `owner/name[@revision]` means, and a model's files from there or from the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import FileError

PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.md",
    "*.jinja",
    "*.model",
)  # weights, configs, tokenizers; no pickles
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REFERENCE = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^@\s]{{1,200}}))?")


def snapshot(ref: str | os.PathLike[str]) -> Path:
    """The folder `ref` if there is one, else that of the model `owner/name[@revision]`, fetched as far as needed.

    Cache, token, endpoint and offline mode are those of huggingface_hub. A text that is no such reference comes back
    as the path that it is. Raises `FileError` if there is no such model, or it cannot be fetched.
    """
    text = str(ref)
    found = _REFERENCE.fullmatch(text) if isinstance(ref, str) or not Path(ref).is_absolute() else None
    if found is None or os.path.lexists(text):
        return Path(ref)
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(found["repo"], revision=found["revision"], allow_patterns=list(PATTERNS)))
    except errors.GatedRepoError:
        fix = f"ask for access at its page on the Hub, then run 'hf auth login' as whoever has it ({found['repo']})"
        raise FileError("is gated: who may fetch it is decided by its owner", where=text, fix=fix) from None
    except errors.RevisionNotFoundError:
        raise FileError(
            "has no such revision", where=text, fix="name a branch, a tag or a commit that it has"
        ) from None
    except errors.RepositoryNotFoundError:
        what = "is neither a folder nor a model on the Hub that you may see"
        raise FileError(what, where=text, fix="check the name, or run 'hf auth login' if it is private") from None
    except errors.LocalEntryNotFoundError:
        what = "is no folder, is not in the Hub's cache, and could not be fetched"
        fix = "check the path, or the network and HF_HUB_OFFLINE"
        raise FileError(what, where=text, fix=fix) from None
    except errors.HfHubHTTPError as error:
        what = f"could not be fetched from the Hub: {str(error).splitlines()[0][:200]}"
        raise FileError(what, where=text, fix="try again later") from None
    except errors.HFValidationError:
        raise FileError("is neither a folder nor a name on the Hub", where=text, fix="check the path") from None
