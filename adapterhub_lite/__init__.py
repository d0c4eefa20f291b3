"""Adapters as files, methods as plugins.

>>> import adapterhub_lite as ah
>>> c = 0.7 * ah.load("out/sql") + 0.3 * ah.load("out/french")    # doctest: +SKIP
>>> c.truncate(rank=16).save("out/both")                          # doctest: +SKIP

Names are imported when they are first used: importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .adapter import load as load
    from .adapter import merge as merge
    from .compare import Diff as Diff
    from .compare import diff as diff
    from .compose import Base as Base
    from .compose import Chain as Chain
    from .compose import Fuse as Fuse
    from .compose import Gate as Gate
    from .compose import Mean as Mean
    from .compose import Route as Route
    from .compose import Rows as Rows
    from .compose import Sum as Sum
    from .compose import Use as Use
    from .compose import chain as chain
    from .compose import mean as mean
    from .compose import route as route
    from .compose import use as use
    from .delta import Delta as Delta
    from .delta import Dense as Dense
    from .delta import LowRank as LowRank
    from .delta import Outline as Outline
    from .delta import Sparse as Sparse
    from .errors import AdapterError as AdapterError
    from .errors import ConfigError as ConfigError
    from .errors import FileError as FileError
    from .errors import HubError as HubError
    from .errors import NotMergeable as NotMergeable
    from .errors import OutputExists as OutputExists
    from .errors import PluginError as PluginError
    from .errors import ScoreError as ScoreError
    from .errors import UnknownName as UnknownName
    from .extraction import extract as extract
    from .folding import fold as fold
    from .folding.verify import verify as verify
    from .hookspecs import hookimpl as hookimpl
    from .hub.push import push as push
    from .live import adapt as adapt
    from .protocol import Method as Method
    from .protocol import Params as Params
    from .routing import Router as Router
    from .rule import Part as Part
    from .rule import Place as Place
    from .rule import Rule as Rule
    from .site import Site as Site
    from .tuning import Tuned as Tuned
    from .tuning import tune as tune

_HOME = {
    "Adapter": "adapter",
    "load": "adapter",
    "merge": "adapter",
    "Diff": "compare",
    "diff": "compare",
    "Base": "compose",
    "Chain": "compose",
    "Fuse": "compose",
    "Gate": "compose",
    "Mean": "compose",
    "Route": "compose",
    "Rows": "compose",
    "Sum": "compose",
    "Use": "compose",
    "chain": "compose",
    "mean": "compose",
    "route": "compose",
    "use": "compose",
    "Delta": "delta",
    "Dense": "delta",
    "LowRank": "delta",
    "Outline": "delta",
    "Sparse": "delta",
    "AdapterError": "errors",
    "ConfigError": "errors",
    "FileError": "errors",
    "HubError": "errors",
    "NotMergeable": "errors",
    "OutputExists": "errors",
    "PluginError": "errors",
    "ScoreError": "errors",
    "UnknownName": "errors",
    "extract": "extraction",
    "fold": "folding",
    "verify": "folding.verify",
    "hookimpl": "hookspecs",
    "push": "hub.push",
    "adapt": "live",
    "Method": "protocol",
    "Params": "protocol",
    "Router": "routing",
    "Part": "rule",
    "Place": "rule",
    "Rule": "rule",
    "Site": "site",
    "Tuned": "tuning",
    "tune": "tuning",
}

__all__ = ["__version__", "method", "router", *_HOME]


def method(name: str, **options: Any) -> Method:
    """The method called `name`, from whatever plugin gives it, with these options.

    >>> method("lora", rank=16, alpha=32).scaling
    2.0
    """
    from .registry import registry

    return registry().method(name)(**options)


def router(name: str, **options: Any) -> Router:
    """The router called `name`, from whatever plugin gives it, with these options.

    >>> router("arrow", top_k=2)
    Arrow(top_k=2, temperature=1.0)
    """
    from .registry import registry

    return registry().router(name)(**options)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name[:1].isupper():  # a method's class, LoRA say, whatever plugin it comes from
        from .registry import registry

        for cls in registry().methods().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
