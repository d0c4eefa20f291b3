"""The conformance suite on the bundled routers, with options that are not their defaults too; and from the command."""

from __future__ import annotations

from typing import Any

import adapterhub_lite as ah
from adapterhub_lite import Router
from adapterhub_lite.registry import registry
from adapterhub_lite.testing import Check, parametrize_checks

ROUTERS = (
    ah.router("arrow"),
    ah.router("arrow", top_k=1, temperature=0.5),
    ah.router("phatgoose"),
    ah.router("phatgoose", top_k=0),
    ah.router("cat"),
    ah.router("cat", softmax=False),
)


@parametrize_checks(*ROUTERS)
def test_conforms(method: Router, check: Check) -> None:
    check(method)


def test_every_bundled_router_is_tried() -> None:
    assert {router.name for router in ROUTERS} == registry().routers().keys()


THIRD = '''
from dataclasses import dataclass

from adapterhub_lite import Router, hookimpl


@dataclass(frozen=True, kw_only=True)
class Even(Router):
    """The same weight for all ways."""

    name = "even"
    paper = "https://example.org/even"

    def init(self, delta, width, rng):
        import torch

        return {"mark": torch.zeros(1)}

    def weights(self, ways, h):
        return h.new_full((*h.shape[:-1], len(ways)), 1 / len(ways))


@hookimpl
def routers():
    return [Even]
'''


def test_the_command_checks_routers_of_anybody(tmp_path: Any, adapter: Any) -> None:
    (tmp_path / "even.py").write_text(THIRD)
    done = adapter("--plugins-dir", tmp_path, "plugin", "check", "even", "--json")
    assert done.code == 0, done.out
    assert done.json["router"] == "even"
    assert "saved_and_loaded_as_it_is" in {own["name"] for own in done.json["checks"]}
    both = adapter("plugin", "check", "router.cat")
    assert both.code == 0
    assert "fixed_holds_for_every_input" in both.out
    assert "equal_adapters_are_one" in adapter("plugin", "check", "cat").out  # the rule of that name comes first
    nothing = adapter("plugin", "check", "arow")
    assert nothing.code == 2
    assert "there is no method, rule or router 'arow'" in nothing.err
    assert "did you mean 'arrow'" in nothing.err
