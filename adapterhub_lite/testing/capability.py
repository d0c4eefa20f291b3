"""Why a check may not be for a method: facts that the method declares, never its name."""

from __future__ import annotations

from ..protocol import Method


def has_delta(method: Method) -> str | None:
    return None if method.defines("delta") else "defines no delta()"


def has_merge(method: Method) -> str | None:
    if method.defines("delta") or method.defines("merge"):
        return None
    return "defines neither delta() nor merge()"


def has_rows(method: Method) -> str | None:
    return None if method.defines("rows") else "defines no rows()"


def has_shared(method: Method) -> str | None:
    return None if method.defines("shared") else "defines no shared()"


def has_before(method: Method) -> str | None:
    return None if method.defines("before") else "defines no before()"


def has_step_rule(method: Method) -> str | None:
    if method.defines("before_step") or method.defines("after_step"):
        return None
    return "defines neither before_step() nor after_step()"


def has_refusal(method: Method) -> str | None:
    return None if method.defines("refuses") else "defines no refuses()"


def has_penalty(method: Method) -> str | None:
    return None if method.defines("penalty") else "defines no penalty()"


def has_layout(method: Method) -> str | None:
    return None if method.peft_type is not None else "declares no peft_type: its delta is what is saved"


def starts_as_identity(method: Method) -> str | None:
    return None if method.identity_at_init else "declares that identity_at_init is False"


def ignores_weight(method: Method) -> str | None:
    return "declares reads_weight: it needs the base weight" if method.reads_weight else None


def takes_any_output(method: Method) -> str | None:
    return None if method.takes_any_output else "declares that takes_any_output is False: it comes first in a chain"


def adds_delta(method: Method) -> str | None:
    return None if method.adds_delta else "declares that adds_delta is False"


def carries(method: Method) -> str | None:
    return None if method.carries_low_rank else "declares that carries_low_rank is False"


def can_be_stored(method: Method) -> str | None:
    """PEFT's layout holds the method's own tensors, or its delta as a LoRA's."""
    if method.peft_type is not None or method.defines("delta"):
        return None
    return "declares no peft_type and defines no delta(): PEFT's layout has no place for it"
