"""PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`, read strictly, written reproducibly.

Where PEFT guesses, warns or ignores, reading refuses: what is not understood could change what
the adapter computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from adapterhub_lite import FileError, hookimpl
from adapterhub_lite.checkpoint import Checkpoint, unpickle
from adapterhub_lite.format import Contents, Format, Writer

from .config import Entries, base_class, read_config
from .facts import named, read_facts, with_shape
from .joined import split_tensors, writing_joined
from .layout import CONFIG, PICKLE, TYPES, WEIGHTS, tails
from .tensors import shared_tensors, sort_tensors
from .wholes import replaced
from .writing import writing


class PeftFormat:
    """The layout of Hugging Face PEFT (https://github.com/huggingface/peft)."""

    name = "peft"
    carrier = "lora"

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file()

    def files(self, folder: Path) -> list[Path]:
        return [folder / CONFIG, folder / WEIGHTS]

    def read(self, folder: Path, methods: Callable[[str | None], Any]) -> Contents:
        config = read_config(folder / CONFIG)
        if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
            raise FileError(
                "a pickle can run code when it is read, so it is not",
                where=folder / PICKLE,
                fix=unpickle(PICKLE),
            )
        checkpoint = Checkpoint.open(folder / WEIGHTS)
        facts = read_facts(checkpoint)
        entries = Entries(config, folder / CONFIG)
        base, revision = entries.text("base_model_name_or_path"), entries.text("revision")
        task = entries.text("task_type")
        transposed = entries.flag("fan_in_fan_out")
        targets = entries.targets()
        kept_options = entries.kept()
        method = named(facts, entries.method(methods), methods, folder / WEIGHTS)
        readers = ("peft",) if method.peft_type in TYPES else ()
        count = 0 if method.peft_joined is None else entries.count(method.peft_joined)
        entries.refuse_leftovers()
        if count:
            sites, have_names = split_tensors(checkpoint, method, count, facts)
            return Contents(
                method=method,
                sites=sites,
                numbered=not have_names,
                base=base,
                revision=revision,
                base_class=base_class(config),
                task=task,
                facts=facts,
                readers=readers,
            )
        shared = shared_tensors(checkpoint, method)
        sites, kept = sort_tensors(checkpoint, method, shared, kept_options, folder)
        sites = {name: with_shape(name, part, facts) for name, part in sites.items()}
        if targets is not None:
            wanted = set(targets)
            for site in sites:
                if not any(tail in wanted for tail in tails(site)):
                    raise FileError(
                        f"has an adapter at {site!r}, which target_modules does not name",
                        where=folder / WEIGHTS,
                        fix=f"correct target_modules in {CONFIG}",
                    )
        selective = any(config.get(key) for key in ("exclude_modules", "layers_to_transform"))
        return Contents(
            method=method,
            sites=sites,
            base=base,
            revision=revision,
            base_class=base_class(config),
            task=task,
            shared=shared,
            kept=kept,
            kept_options=kept_options,
            targets=None if selective else targets,
            transposed=transposed,
            facts=facts,
            readers=readers,
        )

    def replaced(
        self, kept: Mapping[str, Any], options: Mapping[str, Any]
    ) -> list[tuple[str, Any, tuple[int, ...] | None]]:
        return replaced(kept, options)

    def writer(self, folder: Path, contents: Contents, *, room: int) -> AbstractContextManager[Writer]:
        if contents.method.peft_joined is not None:
            return writing_joined(folder, contents, room=room)
        return writing(folder, contents, room=room)


@hookimpl
def formats() -> list[Format]:
    return [PeftFormat()]
