"""The conformance suite: LoRA passes it, and its front doors (call, pytest, command) tell what happened."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import adapterhub_lite as ah
from adapterhub_lite import ConfigError, Method, UnknownName, registry
from adapterhub_lite.cli import run as command
from adapterhub_lite.testing import (
    Check,
    CheckFailed,
    CheckSkipped,
    check_method,
    checks_for,
    parametrize_checks,
)
from adapterhub_lite.testing.check import check, run
from adapterhub_lite.testing.zoo import EXAMPLES, sibling

pytest_plugins = "pytester"

CONFIGURATIONS = [
    ah.method("lora"),
    ah.method("lora", rank=4, alpha=6, rslora=True),
    ah.method("lora", rank=5, lora_bias=True),
    ah.method("lora", rank=6, alpha=4, rank_pattern={"second": 3}, alpha_pattern={"first": 5, "third|second": 7.5}),
    ah.method("lora", rank=4, init_weights="pissa"),
    ah.method("lora", rank=3, alpha=7, init_weights="olora"),
    ah.method("lora", rank=4, init_weights="orthogonal"),
    ah.method("lora", rank=2, init_weights="gaussian", dropout=0.25),
    ah.method("lora", rank=1, init_weights="random"),
]


@parametrize_checks(*CONFIGURATIONS)
def test_lora_conforms(method: Method, check: Check) -> None:
    check(method)


@parametrize_checks(
    ah.method("lora", rank=4, alpha=7, init_weights="pissa", lora_bias=True),
)
def test_lora_conforms_where_its_own_tensors_are_not_stored(method: Method, check: Check) -> None:
    check(method)


# What a forward that forgets the scaling fails: whatever compares it with the delta.
BROKEN = {
    "merge_equals_forward",
    "two_adapters_add_up",
    "chains_lose_nothing",
    "batches_are_their_rows",
    "adds_delta_in_training",
}
RULES_IT_LACKS = {
    "shared_depends_on_shapes": "defines no shared()",
    "shared_is_kept_once": "defines no shared()",
    "merge_goes_by_rows": "defines no rows()",
    "before_is_pure": "defines no before()",
    "before_finds_the_input": "defines no before()",
    "step_rules_change_own_tensors": "defines neither before_step() nor after_step()",
    "training_resumes": "defines neither before_step() nor after_step()",
    "penalty_is_differentiable": "defines no penalty()",
    "refusals_say_why": "defines no refuses()",
}


def test_lora_is_skipped_only_where_it_says_so() -> None:
    for method in CONFIGURATIONS:
        skipped = {own.name: why for own in checks_for(method) if (why := own.skipped(method))}
        random = {} if method.identity_at_init else {"identity_at_init": "declares that identity_at_init is False"}
        drops = {} if method.adds_delta else {"adds_delta_in_training": "declares that adds_delta is False"}
        assert skipped == RULES_IT_LACKS | random | drops


# Kinds without an example here; the tests of their methods have such layers.
ELSEWHERE = {
    "attention",  # of a model of transformers
    "decoder",  # it is one
    "quantised_linear",  # no cast leaves it alone, and it computes in float32
}


def test_every_bundled_site_kind_has_an_example_of_awkward_shape() -> None:
    kinds = registry.registry().site_kinds()
    assert EXAMPLES.keys() == kinds.keys() - ELSEWHERE
    for example in EXAMPLES.values():
        model = example.model()
        sites = example.sites(model)
        assert len(sites) >= 2
        assert all(type(site) is kinds[example.kind] and site.shape[0] != site.shape[1] for site in sites.values())
        assert len({site.shape for site in sites.values()}) == len(sites)
        assert all(bool((p != 0).any()) for p in model.parameters())
        if example.kind.startswith("conv"):
            convs = [site.module for site in sites.values()]
            for special in (lambda c: c.groups > 1, lambda c: max(c.dilation) > 1, lambda c: max(c.stride) > 1):
                assert any(map(special, convs))
        if example.kind not in ("embedding", "transposed_linear", "block"):
            assert {site.bias is None for site in sites.values()} == {True, False}


def test_the_second_adapter_has_another_rank_where_there_is_one() -> None:
    ranks = [vars(sibling(ah.method("lora", rank=rank)))["rank"] for rank in (8, 1)]
    assert ranks == [7, 2]
    even = ah.method("lora", rank=4, init_weights="orthogonal")
    assert vars(sibling(even))["rank"] == 2


def test_the_suite_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    check_method(ah.method("lora", rank=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_is_no_method_to_check() -> None:
    with pytest.raises(ConfigError, match="give an instance"):
        parametrize_checks(type(CONFIGURATIONS[0]))  # type: ignore[arg-type]


# Outcomes -------------------------------------------------------------------------------------------


def _raises(method: Method) -> str:
    raise KeyError("a\nb")


def _fails(method: Method) -> str:
    raise CheckFailed("ΔW is off by 2", fix="halve it")


def _skips(method: Method) -> str:
    raise CheckSkipped("it never merges")


MIXED = [
    Check("measured", "", lambda method: "max |diff| 0"),
    Check("raises", "", _raises),
    Check("fails", "", _fails),
    Check("skips", "", _skips),
    Check("declines", "", _fails, (lambda method: "declares so",)),
]


def test_a_check_is_named_and_described_by_its_function() -> None:
    @check()
    def quick(method: Method) -> str:
        """One line.

        And more.
        """
        return ""

    assert (quick.name, quick.doc) == ("quick", "One line.")
    docs = [own.doc for own in checks_for(ah.method("lora"))]
    assert all(doc.endswith(".") for doc in docs)
    assert len(set(docs)) == len(docs)


def test_outcomes_tell_states_apart() -> None:
    outcomes = run(MIXED, ah.method("lora"))
    assert [(o.name, o.state) for o in outcomes] == [
        ("measured", "ok"),
        ("raises", "FAIL"),
        ("fails", "FAIL"),
        ("skips", "skip"),
        ("declines", "skip"),
    ]
    assert outcomes[1].detail == r"KeyError: 'a\nb'"  # one line, whatever was raised
    assert (outcomes[2].detail, outcomes[2].fix) == ("ΔW is off by 2", "halve it")
    assert outcomes[4].detail == "declares so"


def test_expected_failures_need_a_reason_a_name_and_to_happen() -> None:
    lora = ah.method("lora")
    outcomes = {o.name: o for o in run(MIXED, lora, {"fails": "known bug", "measured": "was a bug"})}
    assert (outcomes["fails"].state, outcomes["fails"].detail) == ("xfail", "known bug (ΔW is off by 2)")
    assert outcomes["measured"].state == "FAIL"
    assert "passed" in outcomes["measured"].detail
    with pytest.raises(UnknownName, match="did you mean 'merge_is_pure'"):
        check_method(lora, {"merge_is_pur": "a slip"})
    with pytest.raises(UnknownName, match="no reason"):
        run(MIXED, lora, {"fails": " "})


def test_check_method_prints_all_and_raises_for_one(capsys: pytest.CaptureFixture[str], unscaled: Method) -> None:
    with pytest.raises(CheckFailed, match="merge_equals_forward"):
        check_method(unscaled)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, text in enumerate(lines) if text.startswith("FAIL   merge_equals_forward "))
    assert "|diff|" in lines[at]
    assert lines[at + 1].startswith("       fix: ")
    fine = len(checks_for(unscaled)) - len(RULES_IT_LACKS) - len(BROKEN)
    assert sum(text.startswith("ok     ") for text in lines) == fine

    reasons = dict.fromkeys(BROKEN, "the paper's own code does so")
    check_method(unscaled, reasons)
    assert capsys.readouterr().out.count("xfail  ") == len(BROKEN)
    with pytest.raises(CheckFailed, match="merge_is_pure"):
        check_method(unscaled, {**reasons, "merge_is_pure": "not so"})


# pytest -----------------------------------------------------------------------------------------------


def test_parametrize_checks_in_a_plugin_s_own_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import adapterhub_lite as ah
        from adapterhub_lite.testing import parametrize_checks

        lora = ah.method("lora", rank=2, init_weights="random")

        expected = {"documented": "a stub", "merge_is_pure": "a slip"}

        class Terse(type(lora)):
            'No word on its options.'

        @parametrize_checks(Terse(rank=2, init_weights="random"), expected_failures=expected)
        def test_conforms(method, check):
            if check.name in ("options_survive_json", "identity_at_init", *expected):
                check(method)
        """
    )
    result = pytester.runpytest_inprocess(
        "-rxs", "-p", "no:cacheprovider", "-k", "json or identity or documented or merge_is_pure"
    )
    # Passing where a failure is expected is a failure.
    result.assert_outcomes(passed=1, skipped=1, xfailed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*Terse(rank=2,*)-merge_is_pure*", "XFAIL*Terse*-documented* a stub", "SKIPPED*identity_at_init is False"]
    )


def test_no_pytest_is_needed() -> None:
    source = """
        import sys
        sys.modules["pytest"] = None  # any import of it fails
        import adapterhub_lite as ah
        from adapterhub_lite.testing import checks_for, check_method
        assert len(checks_for(ah.method("lora"))) > 20
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(source)], check=True)


# The command --------------------------------------------------------------------------------------------

PLUGIN = '''
from dataclasses import dataclass
from adapterhub_lite import Method, hookimpl
from adapterhub_lite_plugins.methods.lora import LoRA

class Sound(LoRA):
    """LoRA on linear layers: rank, alpha, rslora, dropout, init_weights, lora_bias, rank_pattern, alpha_pattern."""
    name = "sound"
    site_kinds = frozenset({"linear"})

class Unscaled(Sound):
    """LoRA without its rank, alpha, rslora, dropout, init_weights, lora_bias, rank_pattern, alpha_pattern."""
    name = "unscaled"
    def forward(self, p, x, y, site):
        return y + x @ p["A"].mT @ p["B"].mT

@dataclass(frozen=True, kw_only=True)
class Demanding(Method):
    """Has an option without a default."""
    name = "demanding"
    paper = "https://arxiv.org/abs/2106.09685"
    site_kinds = frozenset({"linear"})
    rank: int

@hookimpl
def methods():
    return [Sound, Unscaled, Demanding]
'''


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[list[str]]:
    """The arguments that make the command see the plugin file above."""
    (tmp_path / "trial.py").write_text(PLUGIN)
    registry.reset()
    yield ["--plugins-dir", str(tmp_path)]
    registry.reset()


@pytest.fixture
def unscaled(plugins: list[str]) -> Method:
    registry.use_plugins_dir(plugins[1])
    return ah.method("unscaled")


def test_command_passes_a_sound_method(plugins: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*plugins, "plugin", "check", "sound"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plugin trial from ")
    assert "trial.py" in lines[0]
    assert "method sound" in lines[0]
    states = {name: state for state, name, *_ in map(str.split, lines[1:-1])}
    assert list(states) == [own.name for own in checks_for(ah.method("sound"))]
    assert {name for name, state in states.items() if state == "skip"} == RULES_IT_LACKS.keys()
    assert set(states.values()) == {"ok", "skip"}
    skipped = len(RULES_IT_LACKS)
    assert lines[-1] == f"{len(states) - skipped} ok, 0 failed, {skipped} skipped"


def test_command_fails_a_broken_method(plugins: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*plugins, "plugin", "check", "unscaled", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["method"], report["passed"], report["plugin"]["name"]) == ("unscaled", False, "trial")
    assert report["options"]["rank"] == 8
    failed = {own["name"]: own for own in report["checks"] if own["state"] == "FAIL"}
    # With the default options α/r is 1, and the mistake would not show.
    assert failed.keys() == BROKEN
    assert all(own["detail"] and own["fix"] for own in failed.values())


@pytest.mark.parametrize(
    ("name", "said"), [("sond", "did you mean 'sound'"), ("demanding", "cannot be made with its default options")]
)
def test_command_cannot_check_what_it_cannot_load(
    plugins: list[str], capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert command([*plugins, "plugin", "check", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
