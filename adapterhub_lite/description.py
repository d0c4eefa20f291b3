"""What an adapter's headers say of it, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import options
from .checkpoint import ITEMSIZE

if TYPE_CHECKING:
    from .protocol import Method
    from .source import Single

DEEPEST = 8  # sums in sums that are written out


def describe(adapter: Single) -> dict[str, Any]:
    """All that the headers say, JSON-able."""
    own = adapter.own
    tensors = [t for part in own.sites.values() for t in part.tensors.values()]
    modules = {}
    for name, part in own.sites.items():
        here = own.method.at(name)
        outline = here.outline(part.shapes)
        modules[name] = {
            "kind": part.kind,
            "shape": list(part.shape),
            "rank": _rank(here) if outline.rank is None else outline.rank,
            "scaling": None if outline.rank is None else outline.scale,
            "parameters": sum(t.numel for t in part.tensors.values()),
        }
    recipe = own.facts.get("recipe")
    error = own.facts.get("error")
    overall, of = (error.get("overall"), error.get("of", "delta")) if isinstance(error, dict) else (None, None)
    known = isinstance(overall, float) or overall == 0
    return {
        "method": own.method.name,
        "config": options.plain(own.method),
        "base_model": own.base,
        "revision": own.revision,
        "task": own.task,
        "suffixes": sorted({name.rpartition(".")[2] for name in own.sites}),
        "modules": modules,
        "parameters": sum(t.numel for t in tensors),
        "bytes": sum(t.numel * ITEMSIZE[t.dtype] for t in (*tensors, *own.kept.values())),
        "dtypes": sorted({t.dtype for t in tensors}),
        "kept": sorted(own.kept),
        "recipe": recipe if isinstance(recipe, dict) else None,
        "error": overall if known else None,
        "error_of": of if known and of in ("delta", "tensors") else None,
    }


def _rank(method: Method) -> int | None:
    """What the options say of the rank, for ΔW is not known from the file."""
    rank = getattr(method, "rank", None)
    return rank if isinstance(rank, int) else None


def formula(recipe: Any, depth: int = 0) -> str:
    """0.7 * sql + 0.3 * french; a stranger's header may hold anything."""
    match recipe:
        case {"rule": "sum", "terms": [*terms], **more} if depth < DEEPEST and "options" not in more:
            return _terms(terms, " + ", depth)
        case {"rule": str(rule), "terms": [*terms], "options": {**given}} if depth < DEEPEST:
            said = "".join(f"; {key} {value}" for key, value in list(given.items())[:8])
            return f"{rule}({_terms(terms, ', ', depth)}{said})"
        case {"rule": "difference", "base": {"model": str(base)}, "tuned": {"model": str(tuned)}}:
            return f"{tuned} - {base}"
        case _:
            return "…"


def _terms(terms: list[Any], between: str, depth: int) -> str:
    shown = [f"{t.get('weight')} * {_term(t, depth)}" for t in terms[:8] if isinstance(t, dict)]
    return between.join([*shown, *([f"{len(terms) - 8} more"] if len(terms) > 8 else [])])


def _term(term: dict[str, Any], depth: int) -> str:
    match term:
        case {"adapter": str(name)}:
            return name
        case {"rule": "pad", "of": of}:
            return f"padded({formula(of, depth + 1)})"
        case {"rule": "truncate", "of": of}:
            how = ", ".join(f"{key} {term[key]}" for key in ("rank", "max_error", "budget") if key in term)
            return f"truncated({formula(of, depth + 1)}; {how})"
        case {"rule": str(), "options": {}}:
            return formula(term, depth + 1)
        case _:
            return "an adapter"
