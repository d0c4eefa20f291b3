"""What a method says of itself: documentation, options, kinds of layer."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import typing
from urllib.parse import urlsplit

from .. import options
from ..errors import ConfigError, nearest
from ..protocol import Method
from ..registry import registry
from .check import Subject, check, one_line, require
from .zoo import untried

NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


@check()
def documented(method: Subject) -> str:
    """It has a plain name, a docstring that mentions every option, and a paper with an https URL."""
    cls = type(method)
    require(
        NAME.fullmatch(cls.name) is not None,
        f"the name {cls.name!r} is not lower-case words joined by _ or -",
        fix="call it as its entry point is called",
    )
    paper = urlsplit(getattr(cls, "paper", ""))
    require(
        paper.scheme == "https" and "." in paper.netloc,
        f"paper is {getattr(cls, 'paper', None)!r}, not an https URL",
        fix="give the URL of the paper that it is taken from",
    )
    text = cls.__doc__ or ""
    # A dataclass without a docstring gets its signature for one.
    written = bool(text.strip()) and not text.startswith(f"{cls.__name__}(")
    require(written, f"{cls.__name__} has no docstring", fix="say what it is, and what its options mean")
    silent = [f.name for f in dataclasses.fields(method) if not re.search(rf"\b{f.name}\b", text)]
    require(
        not silent,
        f"the docstring does not mention {', '.join(silent)}",
        fix="say what every option means, by its name",
    )
    return f"{len(inspect.cleandoc(text).splitlines())} lines"


@check()
def site_kinds_are_known(method: Method) -> str:
    """Every kind of layer it claims is one that a plugin gives."""
    claimed, known = type(method).site_kinds, registry().site_kinds()
    require(
        isinstance(claimed, frozenset) and bool(claimed),
        f"site_kinds is {claimed!r}",
        fix="give a frozenset with at least one kind; in a string, a part of a name would count as one",
    )
    unknown = sorted(claimed - known.keys())
    require(not unknown, f"no plugin gives the site kind {unknown[:1]}", fix=nearest((unknown or [""])[0], known))
    left = [f"{kind} ({why})" for kind in sorted(claimed) if (why := untried(method, kind)) is not None]
    return f"{len(claimed)} kinds" + (f"; not tried: {', '.join(left)}" if left else "")


@check()
def options_survive_json(method: Subject) -> str:
    """Its options are the same after a trip through JSON, and no part of it can be changed."""
    plain = options.plain(method)
    again = options.build(type(method), json.loads(json.dumps(plain, allow_nan=False)), owner=method.name)
    lost = [name for name, value in plain.items() if options.plain(again).get(name) != value]
    require(
        again == method,
        f"the options are others after JSON: {', '.join(lost) or 'the instances differ'}",
        fix="use annotations that JSON can carry (bool, int, float, str, None, tuple, Mapping), and compare by value",
    )
    for name in plain:
        try:
            setattr(again, name, plain[name])
        except dataclasses.FrozenInstanceError:
            continue
        require(False, f"the option {name} can be changed", fix="declare @dataclass(frozen=True, kw_only=True)")
    return f"{len(plain)} options"


@check()
def wrong_options_are_refused(method: Subject) -> str:
    """An unknown option, or one of the wrong type, is an error that names it."""
    plain = options.plain(method)
    wrong: list[tuple[str, object]] = [(f"{next(iter(plain), 'rank')}_of_no_such_option", 1)]
    wrong += [(name, object()) for name in plain]
    hints = typing.get_type_hints(type(method))
    wrong += [(name, str(value)) for name, value in plain.items() if hints[name] in (bool, int, float)]
    wrong += [(name, math.nan) for name in plain if hints[name] is float]
    for name, value in wrong:
        shown = f"{name}={value!r}" if isinstance(value, (str, int, float)) else f"{name} set to a plain object"
        try:
            options.build(type(method), {**plain, name: value}, owner=method.name)
        except ConfigError as error:
            require(name in str(error), f"the error for {name} does not name it: {error}", fix="name the option")
        except Exception as error:
            require(False, f"{shown} raises {one_line(error)}", fix="let the base class's __post_init__ validate first")
        else:
            require(
                False,
                f"{shown} is accepted",
                fix="keep the base class's __post_init__, which validates; conditions go to check()",
            )
    return f"{len(wrong)} tried"


CHECKS = (documented, site_kinds_are_known, options_survive_json, wrong_options_are_refused)
