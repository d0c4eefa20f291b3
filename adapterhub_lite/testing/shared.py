"""Tensors that all layers of an adapter share: what they depend on, and that a model has them once."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ..protocol import Method
from ..seed import generator
from .attached import Fixture
from .capability import has_shared
from .check import check, require
from .zoo import bits, changed, examples, has_example


@check(has_example, has_shared)
def shared_depends_on_shapes(method: Method) -> str:
    """`shared` gives the same bits for the same shapes, whatever weights, order, or random state; all are frozen."""
    count = 0
    for example in examples(method):
        model = example.model(torch.float32)
        sites = list(example.sites(model, method).values())
        first = method.shared(sites)
        _check_tensors(first)
        for site in sites:
            clash = sorted(first.keys() & method.at(site.name).init(site, generator(0, site.name)).keys())
            require(not clash, f"{', '.join(clash)} is shared and {site.name}'s own", fix="give it another name")
        want = bits(first)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            again = method.shared(sites)
        held = {t.untyped_storage().data_ptr() for t in first.values()}
        require(
            not any(t.untyped_storage().data_ptr() in held for t in again.values()),
            "shared() gives the same memory twice",
            fix="keep nothing between calls: the model does, once",
        )
        _same(want, again, "are others the second time", fix="draw from a generator with a seed among the options")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        _same(want, method.shared(sites), "depend on the weights", fix="compute them from site.shape")
        _same(want, method.shared(sites[::-1]), "depend on the order of the sites", fix="ask for the largest shape")
        bare = [type(site)(site.name, site.weight_shape) for site in sites]
        _same(want, method.shared(bare), "differ where only shapes are known", fix="compute them from site.shape")
        count += len(first)
    return f"{count} tensors"


@check(has_example, has_shared)
def shared_is_kept_once(method: Method) -> str:
    """A live model has the shared tensors once for each adapter, and the rules use those, also of a copy."""
    count = 0
    for example in examples(method):
        f = Fixture(method, example, torch.float32)
        f.adapters.activate("a")
        want = f()
        # Behind the model's own slot; a layer's begins with the name of the layer.
        keys = sorted(name for name in f.tensors if name.startswith("adapters.a."))
        values = {name: f.tensors[name].detach().clone() for name in keys}
        trained = [name for name in keys if f.tensors[name].requires_grad]
        require(not trained, f"{f.kind}: the shared {', '.join(trained)} is trained", fix="share frozen tensors only")

        twin = copy.deepcopy(f.model)
        for name in keys:
            with torch.no_grad():
                twin.get_parameter(name).add_(1)
                moved: Tensor = twin(f.x)
                twin.get_parameter(name).sub_(1)
            require(
                not torch.equal(moved, want),
                f"{f.kind}: the output of a copy does not depend on its {name}",
                fix="look shared tensors up in p, at every call",
            )
        require(torch.equal(f(), want), f"{f.kind}: changing a copy changes the original", fix="share by lookup")

        other = Fixture(method, example, torch.float32)
        other.adapters.activate("a")
        with torch.no_grad():
            for t in other.tensors.values():
                t.zero_()
        other.model.load_state_dict(f.model.state_dict())
        require(
            torch.equal(other(), want), f"{f.kind}: a state dict does not bring the output back", fix="share by lookup"
        )
        lost = changed(values, {name: other.tensors[name] for name in keys})
        require(not lost, f"{f.kind}: {', '.join(lost)} came back changed", fix="leave shared tensors alone")

        twin.bfloat16()
        wide = [name for name, p in twin.named_parameters() if p.dtype == torch.float32]
        require(not wide, f"{f.kind}: {', '.join(wide)} stayed in float32", fix="share by lookup")
        count += len(keys)
    return f"{count} tensors"


def _check_tensors(shared: Mapping[str, Tensor]) -> None:
    require(bool(shared), "shared() gives nothing", fix="leave it out")
    for name, t in shared.items():
        require(isinstance(t, Tensor), f"{name!r} is a {type(t).__name__}, not a tensor", fix="give tensors")
        require(not t.requires_grad, f"the shared {name!r} is trained", fix="give a Tensor without gradients")
        require(bool(t.isfinite().all()), f"the shared {name!r} is not finite", fix="check how it is made")
        require(t.is_contiguous(), f"the shared {name!r} is not contiguous", fix="call .contiguous()")


def _same(want: Mapping[str, Tensor], got: Mapping[str, Tensor], what: str, *, fix: str) -> None:
    lost = changed(want, bits(got))
    require(not lost, f"the shared {', '.join(lost)} {what}", fix=fix)


CHECKS = (shared_depends_on_shapes, shared_is_kept_once)
