"""Options that several commands have, and options that a command has together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..errors import nearest

C = TypeVar("C", bound=Callable[..., Any])
DTYPES = {
    "float32": "F32", "fp32": "F32", "float64": "F64", "fp64": "F64",
    "float16": "F16", "fp16": "F16", "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip


def together(*options: Callable[[Any], Any]) -> Callable[[C], C]:
    """These options, in the order of `--help`."""

    def decorate(command: C) -> C:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def dtype_option(default: str) -> Callable[[C], C]:
    """`--dtype`, as safetensors spells it."""

    def parsed(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is None:
            return None
        if value.lower() not in DTYPES:
            raise click.BadParameter(f"{value!r} is not a dtype adapters are stored in; {nearest(value, DTYPES)}")
        return DTYPES[value.lower()]

    return click.option("--dtype", callback=parsed, help=f"float32, float16, bfloat16 or float64. Default: {default}.")


merged_options = together(
    dtype_option("the widest input's"),
    click.option(
        "--keep", metavar="REF", help="Where they differ, take heads, biases and token rows from REF, or 'none'."
    ),
    click.option("--any-base", is_flag=True, help="Merge although the adapters name different base models."),
)
"""How what is merged becomes one adapter: `--dtype`, `--keep` and `--any-base`."""
