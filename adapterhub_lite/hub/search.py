"""Adapters on the Hub for a base model: what their headers say they are, and how often they were fetched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from .. import _version
from ..description import describe
from ..errors import AdapterError, ConfigError
from ..registry import registry
from ..source import OnHub, stored
from .failures import told
from .wire import Transfer

LIMIT = 20
WIDER = 10  # times as many are looked at where only those of a method are wanted
AT_ONCE = 8
_BASE = re.compile(r"[\w-][\w.-]{0,95}(?:/[\w-][\w.-]{0,95})?")


@dataclass(frozen=True)
class Hit:
    """One adapter on the Hub."""

    repo: str
    commit: str | None
    downloads: int | None
    """In the last 30 days."""
    likes: int | None
    modified: str | None
    """The day."""
    method: str | None = None
    ranks: tuple[int, ...] = ()
    parameters: int | None = None
    nbytes: int | None = None
    """Of its tensors."""
    problem: str | None = None
    """Why nothing else is known of it: it is gated, a pickle, or not understood."""

    def plain(self) -> dict[str, Any]:
        """As JSON carries it."""
        return {**asdict(self), "ranks": list(self.ranks)}


@dataclass(frozen=True)
class Search:
    """What was found, the most fetched first."""

    hits: tuple[Hit, ...]
    looked_at: int
    transfer: Transfer
    """What it took to read the headers."""


def search(
    base: str,
    *,
    method: str | None = None,
    limit: int = LIMIT,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Search:
    """The adapters that name `base`, `owner/model`, as their base model: at most `limit`, those of one `method` only.

    Of each the config and the header are fetched, no tensor. Of more than ten times `limit` none is looked at.

    Raises `HubError` where the Hub cannot be asked, `ConfigError` for a method that there is not.
    """
    if not _BASE.fullmatch(base):
        raise ConfigError("is no name of a model on the Hub", where=base, fix="give owner/model")
    if limit < 1:
        raise ConfigError(f"a limit of {limit} leaves nothing", fix="give at least 1")
    if method is not None:
        registry().method(method)
    from huggingface_hub import HfApi

    api = HfApi(library_name="adapterhub-lite", library_version=_version.__version__)
    most, transfer = limit if method is None else WIDER * limit, Transfer()
    with told(base, did="could not be searched for on the Hub"):
        models = list(islice(api.list_models(filter=f"base_model:adapter:{base}", sort="downloads", full=True), most))
    registry().methods()  # before several threads ask for them
    hits, looked_at = list[Hit](), 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(models), AT_ONCE):
            part = models[start : start + AT_ONCE]
            for hit, took in pool.map(_hit, part):
                looked_at += 1
                transfer.requests += took.requests
                transfer.nbytes += took.nbytes
                if method in (None, hit.method) and len(hits) < limit:
                    hits.append(hit)
            progress(looked_at, len(models))
            if len(hits) == limit:
                break
    return Search(tuple(hits), looked_at, transfer)


def _hit(model: Any) -> tuple[Hit, Transfer]:
    """What the Hub tells of a model, and what its headers do."""
    modified = model.last_modified.date().isoformat() if model.last_modified is not None else None
    hit = Hit(model.id, model.sha, model.downloads, model.likes, modified)
    try:
        own = stored(f"{model.id}@{model.sha}" if model.sha else model.id)
        said = describe(own)
    except AdapterError as error:
        return Hit(**{**asdict(hit), "problem": error.what}), Transfer()
    found = {
        "method": said["method"],
        "ranks": tuple(sorted(set(_ranks(said)))),
        "parameters": said["parameters"],
        "nbytes": said["bytes"],
    }
    return Hit(**{**asdict(hit), **found}), own.found.transfer if isinstance(own, OnHub) else Transfer()


def _ranks(said: dict[str, Any]) -> Iterator[int]:
    for module in said["modules"].values():
        if module["rank"] is not None:
            yield module["rank"]
