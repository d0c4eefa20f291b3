"""What a card says of a folder, from its headers and its manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .. import options, strict_json
from ..base_model import BaseModel
from ..description import describe, formula
from ..folding import manifest
from ..recipe import size
from ..source import Stored, stored
from .card import LIBRARY, Told, class_of, code, inline, on_the_hub
from .content import ADAPTERS, COMPOSITION, Content
from .reference import Reference, parse

DEEPEST = 32  # sums in sums
TOOLS = "With `adapterhub-lite`:"


def told(content: Content, repo: str) -> Told:
    """What to say of it once it is `repo` on the Hub."""
    if content.kind == "model":
        return _model(content, repo)
    if content.kind == "composition":
        return _composition(content, repo)
    return _adapter(stored(content.folder), repo)


def _adapter(own: Stored, repo: str) -> Told:
    contents, name = own.own, repo.partition("/")[2]
    recipe = contents.facts.get("recipe")
    usage = [] if contents.kept else [(TOOLS, "python", _loaded(contents.base, repo, name, "load"))]
    usage.append(("On files, without a model:" if usage else TOOLS, "sh", f"adapter info {repo}\nadapter pull {repo}"))
    if "peft" in contents.readers:
        usage.append(("With PEFT:", "python", _with_peft(contents.base, contents.task, repo)))
    return Told(
        relation="adapter",
        library=next(iter(contents.readers), LIBRARY),
        base=contents.base,
        tags=_tags(contents.method.name, *contents.readers, *(["merge"] if isinstance(recipe, dict) else [])),
        facts=_facts(own),
        usage=usage,
        formula=formula(recipe) if isinstance(recipe, dict) else None,
        inputs=_sources(recipe),
    )


def _composition(content: Content, repo: str) -> Told:
    parts = {path.name: stored(path) for path in sorted((content.folder / ADAPTERS).iterdir()) if path.is_dir()}
    tree = strict_json.read(content.folder / COMPOSITION, missing="save it again")["composition"]
    bases = {part.own.base for part in parts.values()}
    base = bases.pop() if len(bases) == 1 else None
    return Told(
        relation="adapter",
        library=LIBRARY,
        base=base,
        tags=_tags("composition", *sorted({part.own.method.name for part in parts.values()})),
        facts={
            "composition": code(json.dumps(tree, ensure_ascii=False)),
            "base model": _base(base),
            "size": size(sum(file.size for file in content.files.values())),
        },
        usage=[(TOOLS, "python", _loaded(base, repo, "", "load_composition"))],
        parts={name: _facts(part) for name, part in parts.items()},
    )


def _model(content: Content, repo: str) -> Told:
    said = manifest.read(content.folder)
    recipe = said["recipe"]
    model = BaseModel.open(content.folder)
    base = recipe.get("base") if isinstance(recipe.get("base"), str) else None
    name = _class(model.config)
    facts = {"base model": _base(base), "size": size(sum(file.size for file in content.files.values()))}
    rounding = recipe.get("rounding")
    if isinstance(rounding, str):
        facts["rounding"] = code(rounding)
    retained = said.get("retained")
    if isinstance(retained, dict):
        kept, unchanged = retained.get("projection"), retained.get("unchanged")
        if isinstance(kept, (int, float)):
            facts["kept of the change"] = f"{kept:.4g} (along the change that was meant, after rounding)"
        if isinstance(unchanged, (int, float)):
            facts["unchanged weights"] = f"{unchanged:.1%} of those at the adapted layers"
    load = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{repo}")'
    check = f"adapter verify {repo}"
    usage = [("With transformers:", "python", load)] if model.config else []
    return Told(
        relation="merge",
        library="transformers" if model.config else LIBRARY,
        base=base,
        tags=_tags("merge"),
        facts=facts,
        usage=[*usage, ("Whether every file is what was written:", "sh", check)],
        formula=f"{base or 'the base model'} + {formula(recipe.get('of'))}",
        inputs=_sources(recipe.get("of")),
        also=_repos(recipe.get("of")),
    )


def _facts(own: Stored) -> dict[str, str]:
    said = describe(own)
    changed = options.changed(own.own.method)
    paper = own.own.method.paper
    facts = {"method": f"{code(said['method'])} ([paper]({paper}))" if paper.startswith("https://") else code(paper)}
    if changed:
        facts["options"] = code(", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in changed.items()))
    facts["base model"] = _base(said["base_model"])
    facts["layers"] = f"{len(said['modules'])}: {code(', '.join(said['suffixes']))}"
    facts["parameters"] = f"{said['parameters']:,} ({', '.join(said['dtypes'])})"
    facts["size"] = size(said["bytes"])
    if said["kept"]:
        facts["whole values beside it"] = code(", ".join(said["kept"]))
    if said["error"] is not None:
        of = "of its tensors" if said["error_of"] == "tensors" else "of ΔW"
        facts["error"] = f"{said['error']:.3g} (relative, Frobenius norm, {of}, measured when it was made)"
    return facts


def _tags(*own: str) -> list[str]:
    return list(dict.fromkeys([LIBRARY, *own]))


def _base(name: str | None) -> str:
    if name is None:
        return "not named"
    return f"[{name}](https://huggingface.co/{name})" if on_the_hub(name) else code(name)


def _loaded(base: str | None, ref: str, name: str, call: str) -> str:
    named = f", name={json.dumps(name)}" if name else ""
    return (
        "import adapterhub_lite as ah\n\n"
        f"model = ...  # {'the base model' if base is None else inline(base)}, as a torch module\n"
        f"adapters = ah.adapt(model)\nadapters.{call}({json.dumps(ref)}{named})"
    )


def _with_peft(base: str | None, task: str | None, repo: str) -> str:
    name = class_of(task)
    base_model = f"{name}.from_pretrained({json.dumps(base)})" if on_the_hub(base) else "...  # the base model"
    transformers = f"from transformers import {name}\n" if on_the_hub(base) else ""
    return (
        f"from peft import PeftModel\n{transformers}\n"
        f'base = {base_model}\nmodel = PeftModel.from_pretrained(base, "{repo}")'
    )


def _class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model with this config."""
    match config.get("architectures"):
        case [str(name), *_] if "For" in name:
            purpose = name.rpartition("For")[2]
            known = {"CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"}
            return f"AutoModelFor{purpose}" if purpose in known else "AutoModel"
    return "AutoModel"


def _inputs(recipe: Any, depth: int = 0) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """The adapters in a recipe: name, reference to the Hub or "", digests; a stranger's header may hold anything."""
    match recipe:
        case {"adapter": str(name), "sha256": {**digests}}:
            yield name, str(recipe.get("hub", "")), {str(file): str(digest) for file, digest in digests.items()}
        case {"of": of} if depth < DEEPEST:
            yield from _inputs(of, depth + 1)
        case {"terms": [*terms]} if depth < DEEPEST:
            for term in terms:
                yield from _inputs(term, depth + 1)


def _sources(recipe: Any) -> list[tuple[str, Mapping[str, str]]]:
    """The same as Markdown: what came from the Hub is linked to, at its commit."""
    found = []
    for name, hub, digests in _inputs(recipe):
        reference = parse(hub)
        linked = reference is not None and reference.pinned
        found.append((_link(reference) if reference is not None and linked else code(name), digests))
    return found


def _link(reference: Reference) -> str:
    short = f"{reference.repo}@{str(reference.revision)[:7]}"
    return f"[{short}](https://huggingface.co/{reference.repo}/tree/{reference.revision})"


def _repos(recipe: Any) -> list[str]:
    """The models on the Hub that it was made of."""
    found = (parse(hub) for _, hub, _ in _inputs(recipe))
    return list(dict.fromkeys(reference.repo for reference in found if reference is not None))
