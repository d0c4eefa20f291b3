"""How PEFT spells files and tensor keys: `base_model.model.<module>.<suffix>`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from adapterhub_lite import Method
from adapterhub_lite.format import SiteContents

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model."  # what an adapter has only once hangs on PEFT's own module
PREFIX = ROOT + "model."
# What PEFT itself loads, by `peft_type`; a method of ours may have another.
TYPES = frozenset(
    [
        *("ADALORA", "ADAPTION_PROMPT", "BOFT", "C3A", "CPT", "DELORA", "FOURIERFT", "GRALORA", "HRA", "IA3"),
        *("LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "POLY"),
        *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS"),
        *("VBLORA", "VERA", "WAVEFT", "XLORA"),
    ]
)


def within(module: str, path: str) -> bool:
    """PEFT's rule for a list of names: the whole name, or all of it behind a dot."""
    return path == module or path.endswith("." + module)


def tails(path: str) -> Iterator[str]:
    """The names that PEFT's lists of names may call the module by: its own, and all behind each dot."""
    yield path
    for i, c in enumerate(path):
        if c == ".":
            yield path[i + 1 :]


def plain_key(key: str) -> str:
    """The key of a whole value, as if the module had no adapter beside it."""
    module, _, parameter = key.rpartition(".")
    if module.endswith(".token_adapter.base_layer"):  # of trained token rows, which are kept with it
        return key
    return f"{module.removesuffix('.base_layer')}.{parameter}"


def beside(key: str, sites: Collection[str]) -> str:
    """The key that PEFT gives a whole value: where an adapter is beside it, the module is a `base_layer`."""
    module, _, parameter = key.rpartition(".")
    return f"{module}.base_layer.{parameter}" if module.removeprefix(PREFIX) in sites else key


def family_of(method: Method, part: SiteContents) -> str:
    return part.kind if part.kind in method.peft_keys() else ""
