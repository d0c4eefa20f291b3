"""What is kept within `inference()` is never older than the tensors: the oracle is DoRA's formula in float64."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adapterhub_lite_plugins.methods import dora as plugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, vmap

import adapterhub_lite as ah
from adapterhub_lite.live.kept import Kept

SCALING = 1.75
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def made() -> Any:
    """One layer with a DoRA whose tensors are all off their start."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24))
    adapters = ah.adapt(model)
    adapters.add("a", ah.method("dora", rank=4, alpha=4 * SCALING), "0")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=rng))
    return model


def expected(model: Any, x: Tensor = X) -> Tensor:
    """(m / ‖V‖) ⊙ V x + b, V = W + s B A, of the tensors as they are now."""
    layer = model[0]
    W, b, A, B, m = (
        t.detach().double() for t in (layer.weight, layer.bias, *(getattr(layer.adapters.a, n) for n in "ABm"))
    )
    V = W + SCALING * B @ A
    return (m / V.norm(dim=1)) * (x.double() @ V.T) + b


def right(model: Any, tol: float = 1e-5) -> None:
    """Called twice, the model gives what the formula does, within that tolerance of the largest output."""
    want = expected(model)
    for _ in range(2):
        got = model(X.to(model[0].weight.dtype)).double()
        assert (got - want).abs().max() < tol * want.abs().max()


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets longer whenever m / ‖V‖ is computed."""
    counted, own = list[int](), plugin.DoRA._scale

    def scale(self: Any, p: Any, site: Any) -> Tensor:
        counted.append(1)
        return own(self, p, site)

    monkeypatch.setattr(plugin.DoRA, "_scale", scale)
    return counted


def test_the_norm_is_computed_once_in_it_and_at_each_call_outside(norms: list[int]) -> None:
    model = made()
    adapters = ah.adapt(model)
    with torch.no_grad():
        right(model)
    assert len(norms) == 2
    with adapters.inference() as handle:
        assert handle is adapters
        assert not torch.is_grad_enabled()
        for n in (1, 3, 5):
            torch.testing.assert_close(model(X[:n]).double(), expected(model, X[:n]), rtol=1e-5, atol=1e-5)
        assert len(norms) == 3
    assert len(norms) == 4  # once more, to see whether it is the same
    assert torch.is_grad_enabled()
    assert model[0].adapters.a.kept is None
    with torch.no_grad():
        right(model)
    assert len(norms) == 6


# Changes that torch counts ------------------------------------------------------------------------------


def tensor(model: Any, name: str) -> nn.Parameter:
    found: nn.Parameter = model[0].weight if name == "W" else getattr(model[0].adapters.a, name)
    return found


def noise(t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(2)).to(t)


def in_place(model: Any, p: nn.Parameter, name: str) -> None:
    p.add_(noise(p))


def in_place_of_a_view(model: Any, p: nn.Parameter, name: str) -> None:
    p.detach()[1:3].mul_(3)


def in_inference_mode(model: Any, p: nn.Parameter, name: str) -> None:
    with torch.inference_mode():
        p.add_(noise(p))


def other_data(model: Any, p: nn.Parameter, name: str) -> None:
    p.data = p.data + noise(p)


def freed_and_made_again(model: Any, p: nn.Parameter, name: str) -> None:
    """As offloading does it; the new memory is likely to be at the old address."""
    values, p.data = p.data + noise(p), torch.empty(0)
    p.data = torch.empty_like(values)
    p.data.copy_(values)


def at_the_same_address(model: Any, p: nn.Parameter, name: str) -> None:
    """Memory of somebody else's, given back, written to, and lent anew."""
    values = (p.data + noise(p)).numpy()
    lent = p.data.numpy().copy()
    p.data = torch.from_numpy(lent)
    right(model)
    address, version = p.data_ptr(), p._version
    p.data = torch.empty(0)
    lent[:] = values
    p.data = torch.from_numpy(lent)
    assert (p.data_ptr(), p._version) == (address, version)


def other_layout(model: Any, p: nn.Parameter, name: str) -> None:
    """The same memory, read in another order."""
    p.data = p.data.as_strided(p.shape, tuple(reversed(p.stride()))) if name == "W" else p.data.flip(0)


def loaded(model: Any, p: nn.Parameter, name: str) -> None:
    model.load_state_dict({key: t + noise(t) for key, t in model.state_dict().items()})


def loaded_by_assigning(model: Any, p: nn.Parameter, name: str) -> None:
    model.load_state_dict({key: t + noise(t) for key, t in model.state_dict().items()}, assign=True)


def another_parameter_on_the_same_memory(model: Any, p: nn.Parameter, name: str) -> None:
    """Its version is that of the former one again."""
    owner, own = (model[0], "weight") if name == "W" else (model[0].adapters.a, name)
    twin = nn.Parameter(p.data, requires_grad=False)
    while twin._version < p._version:
        twin.add_(noise(p))
    assert twin._version == p._version
    twin.data.add_(noise(p))
    setattr(owner, own, twin)


def cast(model: Any, p: nn.Parameter, name: str) -> None:
    model.double()
    p.add_(noise(p))


COUNTED: list[Callable[[Any, nn.Parameter, str], None]] = [
    in_place,
    in_place_of_a_view,
    in_inference_mode,
    other_data,
    freed_and_made_again,
    at_the_same_address,
    other_layout,
    loaded,
    loaded_by_assigning,
    another_parameter_on_the_same_memory,
    cast,
]


@pytest.mark.parametrize("name", ["W", "A", "B", "m"])
@pytest.mark.parametrize("change", COUNTED, ids=lambda f: f.__name__)
def test_a_change_that_torch_counts_is_noticed(change: Any, name: str, norms: list[int]) -> None:
    model = made()
    with ah.adapt(model).inference():
        right(model)
        before = expected(model)
        change(model, tensor(model, name), name)
        assert (expected(model) - before).abs().max() > 1e-2
        right(model)
        assert len(norms) == (3 if change is at_the_same_address else 2)
    with torch.no_grad():
        right(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_to_half_precision_and_back(dtype: torch.dtype) -> None:
    model = made()
    with ah.adapt(model).inference():
        right(model)
        model.to(dtype)
        right(model, tol=0.05)
        model.float()
        right(model)


def test_merging_and_unmerging_in_it() -> None:
    model = made()
    adapters = ah.adapt(model)
    want = expected(model)
    with adapters.inference():
        right(model)
        adapters.merge()
        torch.testing.assert_close(model(X).double(), want, rtol=1e-5, atol=1e-5)
        model[0].weight.mul_(2)
        adapters.unmerge()
        right(model)
    adapters.merge()
    with adapters.inference():
        torch.testing.assert_close(model(X).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda groups: torch.optim.AdamW(groups, fused=True),
        lambda groups: torch.optim.AdamW(groups, foreach=True),
        lambda groups: torch.optim.SGD(groups, fused=True),
        lambda groups: torch.optim.SGD(groups, foreach=False),
    ],
    ids=["fused AdamW", "foreach AdamW", "fused SGD", "plain SGD"],
)
def test_training_between_two_evaluations_in_it(optimizer: Any) -> None:
    model = made()
    adapters = ah.adapt(model)
    made_by = optimizer(adapters.param_groups(lr=0.1))
    outputs = []
    with adapters.inference():
        for _ in range(3):
            right(model)
            outputs.append(model(X))
            with torch.enable_grad():
                made_by.zero_grad()
                model(X).square().mean().backward()
            made_by.step()
        right(model)
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(outputs))


def test_gradients_are_the_same_in_it(norms: list[int]) -> None:
    model = made()
    grads = []
    for scope in (torch.enable_grad(), ah.adapt(model).inference()):
        with scope:
            right(model)
            with torch.enable_grad():
                model.zero_grad()
                model(X).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 3
    for outside, inside in zip(*grads, strict=True):
        assert torch.equal(outside, inside)


# Changes that it does not -------------------------------------------------------------------------------


def through_data(model: Any, p: nn.Parameter) -> None:
    p.data[0] *= 3


def through_data_as_a_whole(model: Any, p: nn.Parameter) -> None:
    p.data += noise(p)


def through_numpy(model: Any, p: nn.Parameter) -> None:
    p.detach().numpy()[1] = 0.25


def through_the_storage(model: Any, p: nn.Parameter) -> None:
    p.untyped_storage().copy_(noise(p).untyped_storage())


def by_a_fused_optimizer(model: Any, p: nn.Parameter) -> None:
    p.requires_grad_(True).grad = noise(p)
    torch.optim.AdamW([p], lr=0.1, fused=True).step()


@pytest.mark.parametrize("name", ["W", "A", "B", "m"])
@pytest.mark.parametrize(
    "change",
    [through_data, through_data_as_a_whole, through_numpy, through_the_storage, by_a_fused_optimizer],
    ids=lambda f: f.__name__,
)
def test_a_change_that_torch_does_not_count_is_an_error_at_the_end(change: Any, name: str) -> None:
    model = made()
    version = tensor(model, name)._version

    def run() -> None:
        with ah.adapt(model).inference():
            right(model)
            change(model, tensor(model, name))
            assert tensor(model, name)._version == version  # or there would be no need for all this

    with pytest.raises(ah.AdapterError, match=r"^0: a tensor was changed inside of inference\(\)"):
        run()
    assert model[0].adapters.a.kept is None
    right(model)
    with ah.adapt(model).inference():
        right(model)


def test_outside_no_way_of_changing_a_tensor_matters() -> None:
    model = made()
    with torch.no_grad():
        for name in ("W", "A", "B", "m"):
            for change in (through_data, through_data_as_a_whole, through_numpy, through_the_storage):
                right(model)
                change(model, tensor(model, name))
                right(model)


def test_an_error_inside_is_the_one_that_is_raised() -> None:
    model = made()

    def run() -> None:
        with ah.adapt(model).inference():
            right(model)
            model[0].weight.data.zero_()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert model[0].adapters.a.kept is None
    assert torch.is_grad_enabled()


# Copies, threads, other tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_take_nothing_with_them(twin_of: Any) -> None:
    model = made()
    with ah.adapt(model).inference():
        right(model)
        assert isinstance(model[0].adapters.a.kept, Kept)
        assert twin_of(model[0].adapters.a.kept) is None
        twin = copy.deepcopy(model) if twin_of is copy.copy else twin_of(model)
        assert twin[0].adapters.a.kept is None
        twin[0].weight.data.mul_(-2)
        right(twin)
        right(model)


def test_a_scope_in_a_scope() -> None:
    model = made()
    adapters = ah.adapt(model)
    with adapters.inference():
        right(model)
        with adapters.inference():
            right(model)
            model[0].weight.add_(1)
            right(model)
        right(model)
        adapters.add("b", ah.method("dora", rank=2), "0")  # it has come too late, and is computed as ever
        adapters.activate("b")
        model[0].adapters.b.m.data.mul_(2)
        doubled = model(X) - model[0].bias
        model[0].adapters.b.m.data.mul_(2)
        torch.testing.assert_close(model(X) - model[0].bias, 2 * doubled)
        adapters.remove("b")


def test_other_threads_with_gradients() -> None:
    model, failed = made(), list[BaseException]()

    def run() -> None:
        try:
            assert torch.is_grad_enabled()
            right(model)
            model(X).sum().backward()
        except BaseException as error:
            failed.append(error)

    with ah.adapt(model).inference():
        right(model)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        right(model)
    assert not failed
    assert tensor(model, "m").grad is not None


def test_two_adapters_and_their_weights() -> None:
    model = made()
    adapters = ah.adapt(model)
    adapters.add("b", ah.method("dora", rank=3), "0", seed=5)
    with torch.no_grad():
        for p in model[0].adapters.b.parameters():
            p.add_(noise(p))
    for weights in ("a", "b", {"a": 0.7, "b": -0.3}, "a"):
        adapters.activate(weights)
        with torch.no_grad():
            want = model(X)
        with adapters.inference():
            assert torch.equal(model(X), want)
            assert torch.equal(model(X), want)


def test_autocast_does_not_leave_its_values(norms: list[int]) -> None:
    model = made()
    want = {False: model(X).detach()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want[True] = model(X)
    with ah.adapt(model).inference():
        for on in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                assert torch.equal(model(X), want[on])
                assert torch.equal(model(X), want[on])


def test_inference_mode(norms: list[int]) -> None:
    model = made()
    with ah.adapt(model).inference():
        with torch.inference_mode():
            right(model)
        right(model)
        assert len(norms) == 1
        with torch.inference_mode():
            model[0].weight.add_(1)
            right(model)
        right(model)


def test_tensors_whose_versions_are_not_counted_are_computed_from_anew(norms: list[int]) -> None:
    model = made()
    with torch.inference_mode():
        model[0].weight = nn.Parameter(model[0].weight + 1, requires_grad=False)
    assert model[0].weight.is_inference()
    with ah.adapt(model).inference():
        right(model)
        with torch.inference_mode():
            model[0].weight.mul_(-3)
        right(model)
    assert len(norms) == 4


def test_functions_of_the_tensors_are_computed_from_anew() -> None:
    model = made()
    own = {key: t for key, t in model.state_dict().items() if "adapters" in key}
    values = {key: torch.stack([t, t + noise(t)]) for key, t in own.items()}
    want = []
    for i in range(2):
        twin = made()
        twin.load_state_dict({key: t[i] for key, t in values.items()}, strict=False)
        want.append(expected(twin))
    with ah.adapt(model).inference():
        right(model)
        for _ in range(2):
            got = vmap(lambda own: functional_call(model, own, X))(values)
            torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-4, atol=1e-4)
        right(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, for any Function
def test_a_compiled_model_computes_as_ever() -> None:
    model = made()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(X)
    with ah.adapt(model).inference():
        for name in ("W", "A", "B", "m"):
            for change in (through_data, lambda model, p: p.add_(noise(p))):
                change(model, tensor(model, name))
                want = expected(model)
                assert (compiled(X).double() - want).abs().max() < 1e-5 * want.abs().max()


@contextmanager
def one_process() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "sharded"])
def test_a_sharded_model_computes_as_ever(gathered: bool, norms: list[int]) -> None:
    model, plain = made(), made()
    with one_process() as mesh:
        fully_shard(model, mesh=mesh, reshard_after_forward=not gathered)
        with ah.adapt(model).inference():
            for _ in range(2):
                want = expected(plain)
                for _ in range(2):
                    torch.testing.assert_close(model(X).double(), want, rtol=1e-5, atol=1e-5)
                model.reshard()
                for part in (model, plain):
                    part[0].weight.add_(1)
        assert len(norms) == 4


def test_no_weight_is_kept_alive() -> None:
    model = made()
    with ah.adapt(model).inference():
        right(model)
        old = weakref.ref(model[0].weight.untyped_storage()), weakref.ref(tensor(model, "A"))
        model[0].weight.data = torch.zeros(24, 24)
        model[0].adapters.a.A = nn.Parameter(torch.ones(4, 24))
        gc.collect()
        assert [r() for r in old] == [None, None]
        right(model)
