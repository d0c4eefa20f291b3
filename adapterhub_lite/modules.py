"""What a model's files tell of its modules: the kind of layer that a tensor belongs to, by its name, shape and config.

No model is made, so these are rules about names. What they do not recognise is no layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

# Models whose layers of these names are transformers' Conv1D, which stores (in, out).
TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
TRANSPOSED_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
EMBEDDING = re.compile(r"(.*_)?(emb|embd|embed|embeddings?|embed_(tokens|positions|in)|wte|wpe|attention_bias)")
SHARED = "shared"  # T5's embedding
HEADS = {"lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls", "head"}


def module_of(key: str) -> str:
    """The module that a tensor belongs to.

    >>> module_of("h.0.attn.c_attn.weight")
    'h.0.attn.c_attn'
    """
    return key.rpartition(".")[0]


def kind_of(key: str, shape: Sequence[int], config: Mapping[str, Any]) -> str | None:
    """The kind of layer whose weight this is; None if it is no weight of a layer that has a matrix form.

    >>> kind_of("h.0.attn.c_attn.weight", (8, 24), {"model_type": "gpt2"})
    'transposed_linear'
    >>> kind_of("model.norm.weight", (8,), {}) is None
    True
    """
    module, _, parameter = key.rpartition(".")
    last = module.rpartition(".")[2]
    if parameter != "weight" or not module or not 2 <= len(shape) <= 5:
        return None
    if len(shape) > 2:
        return f"conv{len(shape) - 2}d"
    if last == SHARED or EMBEDDING.fullmatch(last):
        return "embedding"
    if last in TRANSPOSED_NAMES and config.get("model_type") in TRANSPOSED:
        return "transposed_linear"
    return "linear"


def is_head(module: str, shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    """Whether a linear layer is the model's output: by its name, or because it has a row for each word."""
    return bool(HEADS & set(module.split("."))) or (len(shape) == 2 and shape[0] == _vocabulary(config))


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    return size if isinstance(size, int) and size > 1 else None


def names(word: str, name: str) -> bool:
    """Whether a word names it: the whole name, the end of it behind a dot, or a glob of either.

    >>> names("q_proj", "layers.0.q_proj"), names("layers.0.*", "layers.0.q_proj"), names("proj", "layers.0.q_proj")
    (True, True, False)
    """
    return fnmatchcase(name, word) or fnmatchcase(name, f"*.{word}")


def suffixes(chosen: Iterable[str], every: Iterable[str]) -> tuple[str, ...] | None:
    """The last names of the chosen modules, if among all modules they name no other; else None.

    >>> suffixes(["a.q", "b.q"], ["a", "a.q", "b", "b.q", "b.k"]), suffixes(["a.q"], ["a.q", "b.q"])
    (('q',), None)
    """
    own = set(chosen)
    tails = {name.rpartition(".")[2] for name in own}
    hit = {name for name in every if name.rpartition(".")[2] in tails}
    return tuple(sorted(tails)) if hit == own else None
