"""`adapter compile`: what a composition computes live, as one LoRA that PEFT reads too; the rest is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import LLAMA, load_peft, output
from torch import nn

import adapterhub_lite as ah
from adapterhub_lite import compose


def composed() -> tuple[Any, Any]:
    """Adapters of three methods on the peer's model, off their start."""
    model: Any = LLAMA.build()  # type: ignore[operator]
    adapters: Any = ah.adapt(model)
    adapters.add("a", ah.method("lora", rank=4, alpha=6), LLAMA.targets)
    adapters.add("b", ah.method("lora_fa", rank=3, rslora=True), ["q_proj"], seed=1)
    adapters.add("c", ah.method("vera", rank=5), LLAMA.targets)
    adapters.add("d", ah.method("ia3"), ["q_proj"])
    adapters.add("e", ah.method("bottleneck"), ["mlp"])
    rng = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        if "adapters" in key.split("."):
            p.data += 0.2 * torch.randn(p.shape, generator=rng).to(p)
    return model, adapters


A, B, C = ah.use("a"), ah.use("b"), ah.use("c")
LINEAR = {
    "one": A,
    "sum": 0.7 * A - 1.5 * B + C,
    "mean": ah.mean("a", "b", None),
    "chain": ah.chain("a", 0.5 * B, "a"),
    "nested": 0.5 * ah.chain(A - B, ah.mean(C, 2 * A)) + B,
    "cancelled": A + B - A,
}


@pytest.mark.parametrize("tree", LINEAR.values(), ids=LINEAR)
def test_one_lora_computes_what_the_composition_does(tree: Any, tmp_path: Path, adapter: Any) -> None:
    model, adapters = composed()
    adapters.activate(tree)
    want = output(model, LLAMA)
    adapters.save_composition(tmp_path / "composed")
    done = adapter("compile", tmp_path / "composed", "-o", tmp_path / "out", "--json")
    assert done.code == 0
    report = done.json
    assert report["method"] == ("lora_fa" if tree is LINEAR["cancelled"] else "lora")  # one alone stays what it is
    assert report["error"] < 1e-6
    weights = {name: w for name, w in compose.lowered(tree).items() if w}
    assert {own["ref"]: own["weight"] for own in report["adapters"]} == pytest.approx(weights)
    for got in (output(load_peft(tmp_path / "out", LLAMA), LLAMA), _loaded(tmp_path / "out")):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _loaded(folder: Path) -> Any:
    other: nn.Module = LLAMA.build()  # type: ignore[operator]
    ah.adapt(other).load(folder, "all")
    return output(other, LLAMA)


def test_truncated_it_says_how_far(tmp_path: Path, adapter: Any) -> None:
    _, adapters = composed()
    adapters.activate(LINEAR["nested"])
    adapters.save_composition(tmp_path / "composed")
    done = adapter("compile", tmp_path / "composed", "-o", tmp_path / "out", "--rank", 2)
    assert done.code == 0
    assert "rank 2" in done.out
    assert "relative error 0." in done.out
    adapter("compile", tmp_path / "composed", "-o", tmp_path / "out").refused("exists", "--force")
    assert adapter("compile", tmp_path / "composed", "-o", tmp_path / "out", "--force", "-q").code == 0
    assert adapter("compile", tmp_path / "composed", "-o", "x", "--rank", 2, "--max-error", 0.1).code == 2


REFUSED: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "gate": (lambda adapters: adapters.add_gate("g", of="a") * A, ("the gate 'g' weighs by the input",)),
    "route": (lambda adapters: ah.route(adapters.add_gate("g", of="a", outputs=1), A), ("the gate 'g'",)),
    "ia3": (lambda adapters: A + 0.5 * ah.use("d"), ("'ia3'", "depends on the base weights")),
    "bottleneck": (lambda adapters: ah.chain("a", "e"), ("'bottleneck'", "is no change of weights")),
    "nothing": (lambda adapters: A - A + 0 * B, ("come to zero",)),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_the_rest_is_refused_by_name(make: Any, words: tuple[str, ...], tmp_path: Path, adapter: Any) -> None:
    _, adapters = composed()
    adapters.activate(make(adapters))
    adapters.save_composition(tmp_path / "composed")
    adapter("compile", tmp_path / "composed", "-o", tmp_path / "out").refused(*words)
    assert not (tmp_path / "out").exists()


def test_what_is_no_composition_is_refused(tmp_path: Path, adapter: Any) -> None:
    adapter("compile", tmp_path / "none", "-o", tmp_path / "out").refused("composition.json", "is missing")
    (tmp_path / "composition.json").write_text("{}")
    adapter("compile", tmp_path, "-o", tmp_path / "out").refused("other entries than a composition")
