"""Single requests to the Hub that the client has no call for, or none with a time limit: counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_RETRIES = 3
_BLOCK = 1 << 16
MAX_PAGES = 1000


@dataclass
class Transfer:
    """How much came over the wire for a purpose."""

    requests: int = 0
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        self.requests += 1
        self.nbytes += nbytes


def api(path: str, transfer: Transfer) -> list[Any]:
    """The answers to GET on this path below /api, all pages of it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url: str | None = f"{constants.ENDPOINT}/api/{path}"
    pages: list[Any] = []
    while url is not None and len(pages) < MAX_PAGES:
        answer = http_backoff("GET", url, headers=build_hf_headers(), timeout=_patience(), max_retries=_RETRIES)
        hf_raise_for_status(answer)
        transfer.add(len(answer.content))
        pages.append(answer.json())
        url = answer.links.get("next", {}).get("url")
    return pages


def part(repo: str, commit: str, path: str, start: int, stop: int, transfer: Transfer) -> bytes:
    """Bytes [start, stop) of a file, fewer if it ends before. Whatever the server sends, no more are read."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    if start >= stop:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    url, content = hf_hub_url(repo, path, revision=commit), bytearray()
    with http_stream_backoff("GET", url, headers=headers, timeout=_patience(), max_retries=_RETRIES) as answer:
        hf_raise_for_status(answer)
        first = 0 if answer.status_code == 206 else start  # it may know nothing of ranges
        for block in answer.iter_bytes(_BLOCK):
            content += block
            if len(content) >= first + stop - start:
                break
    transfer.add(len(content))
    return bytes(content[first : first + stop - start])


def _patience() -> float:
    """Seconds to wait for an answer, as the client waits for a file."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
