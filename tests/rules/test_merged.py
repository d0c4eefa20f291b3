"""Rules applied to files: planned, truncated, measured, saved, and told of in the file."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from deltas import elect, largest
from peers import dense_delta
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterhub_lite as ah
from adapterhub_lite import Adapter, ConfigError, NotMergeable, Part, Place, Rule, algebra, krylov
from adapterhub_lite.combine import each
from adapterhub_lite.registry import registry

if TYPE_CHECKING:
    from conftest import Done, Handmade

    Command = Callable[..., Done]

LAYERS = {"net.layers.0.q": 2, "net.layers.0.k": 3, "net.layers.1.q": 2, "net.conv": 2}
PREFIX = "base_model.model."


@pytest.fixture
def abc(handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Adapter]:
    """Three adapters in the working directory; c leaves a layer alone and has one of its own."""
    monkeypatch.chdir(tmp_path)
    others = {"net.layers.0.q": 2, "net.layers.0.k": 3, "net.emb": 2, "net.conv": 2}
    for seed, (name, layers) in enumerate({"a": LAYERS, "b": LAYERS, "c": others}.items()):
        handmade(tmp_path / name, layers, seed=seed)
    return [ah.load(name) for name in "abc"]


def taken(abc: list[Adapter], rule: type[Rule]) -> list[Adapter]:
    """As many as the rule takes, of one rank if it must be."""
    return abc[: 2 if rule.same_rank else rule.takes or 3]


def dense(name: str) -> dict[str, Tensor]:
    """Each layer's change in the file; 0 where there is none."""
    shapes = {n: d.shape for own in "abc" for n, d in dense_delta(own).items()}
    found = dense_delta(name)
    return {n: found.get(n, torch.zeros(shape).double()) for n, shape in shapes.items()}


def same(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


# Results ----------------------------------------------------------------------------------------------


def test_ties_trims_over_all_layers_and_counts_what_an_adapter_leaves_alone_as_zeros(abc: list[Adapter]) -> None:
    weights, density = [0.5, 0.2, 0.3], 0.3
    merged = ah.merge(abc, "ties", weights=weights, density=density)
    parts = [dense(name) for name in "abc"]
    whole = [torch.cat([D.flatten() for D in own.values()]).numpy() for own in parts]
    kept = [largest(D, int(density * D.size)) for D in whole]
    at = 0
    for site, D in parts[0].items():
        n = D.numel()
        expected = elect([k[at : at + n].reshape(D.shape) for k in kept], weights)
        at += n
        torch.testing.assert_close(merged.delta(site).dense(), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    assert list(merged.sites) == sorted(parts[0])


@pytest.mark.parametrize("name", ["ties", "dare_linear", "tsv", "karcher", "knots", "mean"])
def test_the_order_in_which_adapters_are_given_changes_no_bit(abc: list[Adapter], name: str) -> None:
    weights = [0.5, 0.2, 0.3]
    first = ah.merge(abc, name, weights=weights).truncate(rank=3)
    first.save("first")
    for n, order in enumerate(list(itertools.permutations(range(3)))[1:]):
        ah.merge([abc[i] for i in order], name, weights=[weights[i] for i in order]).truncate(rank=3).save(f"o{n}")
        assert same(load_file("first/adapter_model.safetensors"), load_file(f"o{n}/adapter_model.safetensors"))


def test_masks_mind_the_numbers_and_neither_name_place_nor_other_layers(abc: list[Adapter], tmp_path: Path) -> None:
    tensors = load_file("a/adapter_model.safetensors")
    few = {key: t for key, t in tensors.items() if ".layers.0." in key}
    (tmp_path / "other").mkdir()
    save_file(few, tmp_path / "other/adapter_model.safetensors", {"format": "pt"})
    config = json.loads(Path("a/adapter_config.json").read_text())
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(config))
    one, two = (ah.merge([own], "dare_linear", density=0.5) for own in (abc[0], ah.load("other")))
    for site in two.sites:
        assert torch.equal(one.delta(site).dense(), two.delta(site).dense())
    assert not torch.equal(one.delta("net.layers.0.q").dense(), one.delta("net.layers.1.q").dense())


def test_equal_adapters_have_masks_of_their_own(abc: list[Adapter]) -> None:
    twice = ah.merge([abc[0], ah.load("a")], "dare_linear", density=0.5).delta("net.conv").dense()
    once = ah.merge([abc[0]], "dare_linear", density=0.5).delta("net.conv").dense()
    assert int((twice != 0).sum()) > int((once != 0).sum())


def test_threads_change_no_bit(abc: list[Adapter]) -> None:
    merged = ah.merge(abc, "dare_ties").source
    merged.prepare()
    alone = {site: merged.piece(site).delta.dense() for site in merged.sites}
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        together = dict(each(merged.sites, lambda site: merged.piece(site).delta.dense()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(alone[site], together[site]) for site in alone)


def test_a_merge_is_an_adapter_to_calculate_with(abc: list[Adapter]) -> None:
    a, b, c = abc
    inner = ah.merge([a, b], "slerp", weights=[0.7, 0.3])
    whole = ah.merge([inner - 0.5 * c, c], "mean", weights=[1.0, 3.0])
    site = "net.layers.0.k"
    expected = 0.25 * (inner.delta(site).dense() - 0.5 * dense("c")[site]) + 0.75 * dense("c")[site]
    torch.testing.assert_close(whole.delta(site).dense(), expected, rtol=1e-6, atol=1e-6)
    assert repr(inner) == "<Adapter 1 * slerp(a, b)>"
    error = (2.0 * whole).save("out")
    torch.testing.assert_close(dense_delta("out")[site], 2 * expected, rtol=1e-5, atol=1e-6)
    assert error.overall < 1e-6


def test_without_a_rule_it_is_the_sum(abc: list[Adapter]) -> None:
    found = ah.merge(abc, weights=[0.7, -0.3, 1.0])
    for site, D in dense("a").items():
        expected = 0.7 * D - 0.3 * dense("b")[site] + dense("c")[site]
        torch.testing.assert_close(found.delta(site).dense().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(registry().rules()))
def test_every_rule_is_saved_with_its_error_and_comes_back(abc: list[Adapter], name: str) -> None:
    cls = registry().rule(name)
    merged = ah.merge(taken(abc, cls), name).truncate(rank=2)
    error = merged.save("out")
    stored, exact = dense_delta("out"), merged.source.terms[0][1].of  # type: ignore[attr-defined]
    lost = size = 0.0
    for site in exact.sites:
        D = exact.piece(site).delta.dense().double()
        lost += float((D - stored.get(site, 0 * D)).square().sum())
        size += float(D.square().sum())
    assert error.overall == pytest.approx(math.sqrt(lost / size), rel=1e-4)
    assert 1e-9 < error.overall < 1


def test_an_error_that_was_asked_for_is_kept(abc: list[Adapter]) -> None:
    error = ah.merge(abc, "ties").truncate(max_error=0.2).save("out")
    assert 0 < error.overall <= 0.2


# Plans and refusals -----------------------------------------------------------------------------------


FULL = sorted(name for name, cls in registry().rules().items() if cls.full_rank)


@pytest.mark.parametrize("name", FULL)
def test_full_rank_without_truncation_is_refused_in_the_plan(abc: list[Adapter], name: str) -> None:
    merged = ah.merge(abc, name)
    for refused in (merged, 0.5 * merged + abc[0], ah.merge([merged, abc[0]], "mean")):
        with pytest.raises(NotMergeable, match=rf"'{name}' gives has full rank.*--rank N, --max-error E or --budget"):
            refused.plan()
        with pytest.raises(NotMergeable, match="full rank"):
            refused.save("out")
    assert not Path("out").exists()
    assert set(merged.truncate(rank=3).plan().ranks.values()) == {3}


def test_plans_have_the_ranks_that_are_written(abc: list[Adapter]) -> None:
    for name in sorted(registry().rules().keys() - set(FULL)):
        merged = ah.merge(taken(abc, registry().rule(name)), name)
        planned = merged.plan()
        merged.save(f"out-{name}")
        written = load_file(f"out-{name}/adapter_model.safetensors")
        for site, rank in planned.ranks.items():
            if site != "net.emb":
                assert written[f"{PREFIX}{site}.lora_A.weight"].shape[0] == rank, (name, site)


def test_a_rule_that_gives_another_shape_or_rank_is_refused_by_name(abc: list[Adapter]) -> None:
    class Wrong(Rule):
        """Nothing; https://example.org."""

        name, paper = "wrong", "https://example.org"

        def merge(self, parts: Any, place: Place, facts: Any) -> ah.Delta:
            return ah.Dense(torch.ones(2, 3))

    with pytest.raises(NotMergeable, match=r"net.conv: rule 'wrong' gave ΔW of shape \[2, 3\]"):
        ah.merge(abc, Wrong()).save("out")

    class TooMuch(Wrong):
        def merge(self, parts: Any, place: Place, facts: Any) -> ah.Delta:
            return ah.Dense(torch.ones(place.shape))

        def rank(self, ranks: Any, shape: Any) -> int:
            return 1

    with pytest.raises(NotMergeable, match="higher rank than the 1 it had said"):
        ah.merge(abc, TooMuch()).save("out")


@pytest.mark.parametrize(
    ("rule", "given", "said"),
    [
        ("ties", {"densty": 0.1}, "unknown option 'densty'; did you mean 'density'"),
        ("ties", {"density": 0}, "density=0 is not above 0 and at most 1"),
        ("ties", {"density": 1.5}, "not above 0 and at most 1"),
        ("ties", {"density": "0.1"}, "not a finite number"),
        ("ties", {"variant": "mergkit"}, "one of 'paper'"),
        ("dare_linear", {"seed": -1}, "at least 0"),
        ("slerp", {}, "merges 2 adapters, and was given 3"),
        ("mean", {"weights": [1, -1, 1]}, "shares of an average"),
        ("mean", {"weights": [0, 0, 0]}, "shares of an average"),
        ("sce", {"weights": [1, 2, 1]}, "finds its own weights"),
        ("sum", {"weights": [1, 2]}, "2 weights for 3 adapters"),
        ("sum", {"weights": [1, 2, math.nan]}, "the weights of c: the weight nan is not a finite number"),
        ("sum", {"weights": [1, 2, {"*": []}]}, "no numbers"),
        ("sum", {"weights": [1, 2, {"*.q": "x"}]}, r"c at '\*.q': the weight 'x'"),
        ("sum", {"weights": [1, 2, {"*.q": 1}]}, "no pattern of the weights matches 'net.conv'"),
        ("magnitude_prune", {"at": {"*": {"densty": 1}}}, "no option 'densty'; did you mean 'density'"),
        ("ties", {"at": {"*": {"density": 0.5}}}, "looks at all sites together"),
    ],
)
def test_wrong_options(abc: list[Adapter], rule: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ah.merge(abc, rule, **given)


def test_what_is_no_rule_or_no_adapters_is_refused(abc: list[Adapter]) -> None:
    with pytest.raises(ConfigError, match="give at least one adapter"):
        ah.merge([], "ties")
    with pytest.raises(ConfigError, match="is not a rule with its options"):
        ah.merge(abc, registry().rule("ties"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="options density beside a rule"):
        ah.merge(abc, registry().rule("ties")(), density=0.5)


def test_nothing_is_read_before_it_is_asked_for(abc: list[Adapter]) -> None:
    merged = ah.merge(abc, "ties")
    for name in "abc":
        Path(name, "adapter_model.safetensors").unlink()
    assert set(merged.truncate(rank=1).plan().ranks.values()) == {1}
    with pytest.raises(ah.FileError):
        merged.delta("net.conv")


# Per layer --------------------------------------------------------------------------------------------


def test_weights_by_pattern_and_along_the_layers(abc: list[Adapter]) -> None:
    a, b, _ = abc
    merged = ah.merge([a, b], "cat", weights=[{"*.q": 2.0, "*.conv": -1, "*": 0.5}, {"*": [0.0, 4.0]}])
    for site, (x, y) in {
        "net.layers.0.q": (2.0, 0.0),
        "net.layers.0.k": (0.5, 0.0),
        "net.layers.1.q": (2.0, 4.0),
        "net.conv": (-1.0, 0.0),
    }.items():
        torch.testing.assert_close(merged.delta(site).dense(), x * dense("a")[site] + y * dense("b")[site])
    merged.save("out")
    torch.testing.assert_close(dense_delta("out")["net.conv"], -dense("a")["net.conv"], rtol=1e-5, atol=1e-6)


def test_options_by_pattern(abc: list[Adapter]) -> None:
    merged = ah.merge(abc[:1], "magnitude_prune", density=0.5, at={"*.q": {"density": 0.1}, "*": {"density": 1.0}})
    for site, density in {"net.layers.0.q": 0.1, "net.conv": 1.0}.items():
        D = dense("a")[site]
        assert int((merged.delta(site).dense() != 0).sum()) == int(density * D.numel())


# What is told -----------------------------------------------------------------------------------------


def test_the_recipe_has_the_rule_its_options_and_version(abc: list[Adapter]) -> None:
    ah.merge(abc, "dare_ties", weights=[1, 2, {"*": [1.0, 2.0]}], seed=5).truncate(rank=2).save("out")
    with safe_open("out/adapter_model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["adapterhub_lite"])
    recipe = facts["recipe"]["terms"][0]["of"]["terms"][0]
    assert (recipe["rule"], recipe["version"]) == ("dare_ties", 1)
    assert recipe["options"] == {"density": 0.2, "scale": 1.0, "seed": 5, "variant": "paper"}
    assert [term["weight"] for term in recipe["terms"]] == [1, 2, [["*", [1.0, 2.0]]]]
    digest = hashlib.sha256(Path("a/adapter_model.safetensors").read_bytes()).hexdigest()
    assert recipe["terms"][0]["sha256"]["adapter_model.safetensors"] == digest
    assert registry().rule(recipe["rule"])(**recipe["options"]).seed == 5  # type: ignore[attr-defined]


def test_the_command(adapter: Command, abc: list[Adapter]) -> None:
    done = adapter("merge", "a", "b", "c", "--rule", "dare_linear", "--density", "0.5", "--seed", "3", "--rank", "2",
                   "-o", "out", "--json")  # fmt: skip
    assert done.code == 0, done
    assert done.json["rule"] == {"name": "dare_linear", "options": {"density": 0.5, "seed": 3, "variant": "paper"}}
    assert "1/3 each" in done.err
    ah.merge(abc, "dare_linear", density=0.5, seed=3).truncate(rank=2).save("ours")
    assert same(load_file("out/adapter_model.safetensors"), load_file("ours/adapter_model.safetensors"))
    said = adapter("info", "out")
    assert "dare_linear(0.3333333333333333 * a, " in said.out
    assert "density 0.5; seed 3; variant paper), rank" not in said.out
    assert adapter("merge", "a", "b", "--rule", "tsv", "-o", "tsv").err.startswith("weights: 1 each")
    adapter("merge", "a", "--rule", "ties", "-o", "out2").refused("'ties' gives has full rank", "--rank N")
    adapter("merge", "a", "--rule", "ties", "--dry-run").refused("'ties' gives has full rank", "--budget")


def test_the_rules_are_listed_with_their_options(adapter: Command) -> None:
    table = adapter("rules")
    assert table.code == 0
    for name, cls in registry().rules().items():
        assert name in table.out
        assert cls.paper in table.out
        one = adapter("rules", name)
        shown = adapter("rules", name, "--json").json
        helped = adapter("merge", "--rule", name, "--help").out
        for option, own in shown["options"].items():
            assert own["help"].endswith(".")
            assert own["help"] in one.out
            assert f"--{option}" in helped
    assert "entries that is kept" not in adapter("merge", "--help").out
    wrong = adapter("rules", "tis")
    assert wrong.code == 2
    assert "did you mean 'ties'" in wrong.err


# Beside the matrix ------------------------------------------------------------------------------------


class Halving(Rule):
    """The sum of halves; https://example.org."""

    name, paper = "halving", "https://example.org"

    def merge(self, parts: Any, place: Place, facts: Any) -> ah.Delta:
        from adapterhub_lite.algebra import total

        return total(part.delta.scaled(0.5) for part in parts)


def test_biases_are_summed_with_the_weights(
    handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = torch.Generator().manual_seed(0)
    biases = [torch.randn(13, generator=rng) for _ in "ab"]
    for name, bias in zip("ab", biases, strict=True):
        key = f"{PREFIX}net.layers.0.q.lora_B.bias"
        handmade(tmp_path / name, {"net.layers.0.q": 2}, tensors=lambda t, k=key, b=bias: t | {k: b}, lora_bias=True)
    parts = [ah.load(name) for name in "ab"]
    expected = [4.0 * b.double() for b in biases]  # alpha / r
    for rule, weights, x, y in (("mean", [1.0, 3.0], 0.25, 0.75), (Halving(), [2.0, -1.0], 2.0, -1.0)):
        piece = ah.merge(parts, rule, weights=weights).source.piece("net.layers.0.q")
        torch.testing.assert_close(piece.bias, x * expected[0] + y * expected[1])
    ah.merge(parts, "slerp").save("out")
    stored = load_file("out/adapter_model.safetensors")[f"{PREFIX}net.layers.0.q.lora_B.bias"]
    scale = json.loads(Path("out/adapter_config.json").read_text())
    found = stored.double() * scale["lora_alpha"] / scale["r"]
    torch.testing.assert_close(found, (expected[0] + expected[1]) / 2, rtol=1e-5, atol=1e-6)


def test_a_part_knows_its_weighted_change() -> None:
    part = Part(ah.Dense(torch.ones(2, 2)), 0.5)
    assert part.scaled.dense().tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("ask", [{"max_error": 0.3}, {"budget": 40_000}])
def test_ranks_of_large_matrices_are_chosen_without_decomposing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: dict[str, Any]
) -> None:
    shapes, rng = {"one": (600, 520), "two": (512, 640)}, torch.Generator().manual_seed(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        made = {}
        for site, (out, into) in shapes.items():
            made[f"{PREFIX}{site}.lora_A.weight"] = torch.randn(4, into, generator=rng)
            made[f"{PREFIX}{site}.lora_B.weight"] = torch.randn(out, 4, generator=rng)
        save_file(made, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [*shapes]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    merged = ah.merge([ah.load(tmp_path / name) for name in "ab"], "dare_linear", density=0.95)
    whole = {site: merged.delta(site).dense() for site in shapes}
    with monkeypatch.context() as patch:
        patch.setattr(algebra, "svd", None)
        patch.setattr(algebra, "spectrum", None)
        told = merged.truncate(**ask).save(tmp_path / "few")
    monkeypatch.setattr(krylov, "pays", lambda shape, rank: False)
    merged.truncate(**ask).save(tmp_path / "full")
    few, full = dense_delta(tmp_path / "few"), dense_delta(tmp_path / "full")
    for site in shapes:
        torch.testing.assert_close(few[site], full[site], rtol=0, atol=1e-5)
    lost = math.sqrt(sum(float((few[site] - D).norm()) ** 2 for site, D in whole.items()))
    error = lost / math.sqrt(sum(float(D.norm()) ** 2 for D in whole.values()))
    assert 0.2 < error <= ask.get("max_error", 1.0)
    assert told.overall == pytest.approx(error, rel=1e-5)
