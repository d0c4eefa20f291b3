"""The entries of `adapter_config.json`, each taken by who understands it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapterhub_lite import ConfigError, FileError, Method, NotMergeable, strict_json
from adapterhub_lite.errors import nearest

MAX_KEPT = 1000  # names in modules_to_save
MAX_JOINED = 10_000  # sites in one tensor

# Entries that do not change what the saved tensors compute: which modules were chosen, and bookkeeping.
INERT = frozenset(
    [
        "auto_mapping",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "megatron_core",
        "peft_version",
        "runtime_config",
    ]
)


def read_config(path: Path) -> dict[str, Any]:
    return strict_json.read(path, missing="an adapter folder has it beside the weights")


def base_class(config: Mapping[str, Any]) -> str | None:
    """A name to compare; nothing is ever imported by it."""
    auto = config.get("auto_mapping")
    name = auto.get("base_model_class") if isinstance(auto, dict) else None
    return name if isinstance(name, str) else None


class Entries:
    """The entries of `adapter_config.json`, taken out one by one; what is left was not understood."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.path = path
        self.left = {key: value for key, value in config.items() if key not in INERT}

    def text(self, key: str) -> str | None:
        value = self.left.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value or None

    def flag(self, key: str) -> bool:
        value = self.left.pop(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def count(self, key: str) -> int:
        """How many sites there are; 1 where it is not said."""
        value = self.left.pop(key, None)
        if value is not None and (type(value) is not int or not 0 < value <= MAX_JOINED):
            raise self._wrong(key, value, f"a number from 1 to {MAX_JOINED}")
        return value or 1

    def names(self, key: str) -> list[str]:
        value = self.left.pop(key, None) or []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(key, value, "a list of names")
        return value

    def targets(self) -> tuple[str, ...] | None:
        """The suffixes that name the adapted modules; None if a regular expression does, which nobody runs."""
        if isinstance(self.left.get("target_modules"), str):
            self.left.pop("target_modules")
            return None
        return tuple(self.names("target_modules")) or None

    def kept(self) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        if modules := self.names("modules_to_save"):
            if len(modules) > MAX_KEPT:
                raise self._wrong("modules_to_save", modules, f"at most {MAX_KEPT} names")
            kept["modules_to_save"] = modules
        bias = self.left.pop("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise self._wrong("bias", bias, "none, all or lora_only")
        if bias != "none":
            kept["bias"] = bias
        if tokens := self.left.pop("trainable_token_indices", None):
            for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
                if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
                    raise self._wrong("trainable_token_indices", tokens, "a list of token numbers")
            kept["trainable_token_indices"] = tokens
        return kept

    def method(self, methods: Callable[[str | None], Any]) -> Method:
        kind = self.left.pop("peft_type", None)
        if not isinstance(kind, str):
            raise self._wrong("peft_type", kind, "the name of a method")
        try:
            likely = [methods(kind.lower())]  # most are called as PEFT calls them: one plugin is loaded
        except Exception:
            likely = []
        for candidates in (lambda: likely, lambda: methods(None).values()):
            for cls in candidates():
                if cls.peft_type == kind:
                    try:
                        found: Method | None = cls.from_peft(self.left)
                    except NotMergeable as e:
                        raise NotMergeable(e.what, where=self.path, fix=e.fix) from None
                    except ConfigError as e:
                        raise FileError(e.what, where=self.path, fix=e.fix) from None
                    if found is not None:
                        return found
        known = sorted({cls.peft_type for cls in methods(None).values() if cls.peft_type})
        if kind in known:
            options = ", ".join(k for k, v in sorted(self.left.items()) if k.startswith("use_") and v)
            raise FileError(
                f"no installed method reads peft_type {kind!r} with {options or 'these options'}",
                where=self.path,
                fix="install a plugin that does (adapter methods shows what is there)",
            )
        raise FileError(f"no installed method reads peft_type {kind!r}", where=self.path, fix=nearest(kind, known))

    def refuse_leftovers(self) -> None:
        for key, value in sorted(self.left.items()):
            if value not in (None, False, [], {}, "", 0):
                raise FileError(
                    f"{key}={value!r} is set, and what it changes is not known here",
                    where=self.path,
                    fix="remove the entry if the adapter does not depend on it",
                )

    def _wrong(self, key: str, value: Any, meant: str) -> FileError:
        return FileError(f"{key} is {value!r} and not {meant}", where=self.path, fix=f"correct {key}")
