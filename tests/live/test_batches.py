"""Batches whose rows have compositions of their own: each row is what it is alone, forwards and backwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_composition import close, inputs, net, output, quickly, trees
from test_gates import gated
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy import fill, llama, tokens

import adapterhub_lite as ah
from adapterhub_lite.live import batches
from adapterhub_lite.live.files import held
from adapterhub_lite.live.tree import slots

MIXED: list[Any] = ["a", None, {"a": 0.5, "b": -1.5}, ah.chain("a", "c"), "e", "a", "d", ah.mean("a", "e"), "b"]


def rows(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 5, 12, generator=torch.Generator().manual_seed(2)).to(dtype)


def one_by_one(model: nn.Module, adapters: ah.Adapters, each: Sequence[Any], x: Tensor) -> Tensor:
    out = []
    for row, own in zip(x, each, strict=True):
        with adapters.using(own):
            out.append(output(model, row[None]))
    return torch.cat(out)


@quickly
@given(st.lists(trees("abcde"), min_size=1, max_size=6))
def test_a_batch_is_its_rows_one_by_one(each: list[Any]) -> None:
    model, adapters = net()
    x = rows(len(each))
    with adapters.using(each):
        close(output(model, x), one_by_one(model, adapters, each, x))


ranks = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@quickly
@given(ranks, st.data())
def test_low_rank_rows_by_every_kernel(ranks: list[int], data: st.DataObject) -> None:
    """y + Σ wᵢ sᵢ Bᵢ Aᵢ x, whichever way it is computed; for rows of vectors, of tokens and of more."""
    n = data.draw(st.integers(1, 6))
    few = st.dictionaries(st.integers(0, len(ranks) - 1), st.floats(-2, 2), max_size=3)
    uses = [tuple(row.items()) for row in data.draw(st.lists(few, min_size=n, max_size=n))]
    rng = torch.Generator().manual_seed(0)
    A = [torch.randn(r, 7, generator=rng, dtype=torch.float64) for r in ranks]
    B = [torch.randn(4, r, generator=rng, dtype=torch.float64) for r in ranks]
    scales = [0.5 + i for i in range(len(ranks))]
    plan = batches.planned(uses, ranks, scales, A[0])
    x, y = (torch.randn(n, 3, d, generator=rng, dtype=torch.float64) for d in (7, 4))
    want = torch.stack(
        [y[k] + sum((w * scales[i] * x[k] @ A[i].T @ B[i].T for i, w in row), y[k] * 0) for k, row in enumerate(uses)]
    )
    kernels: list[Callable[[list[Tensor]], Tensor]] = [
        lambda own: batches._together(plan, batches._made_together(own), x, y),
        lambda own: batches._by_row(plan, own, None, x, y),
        lambda own: batches._by_row(plan, [], batches._made_by_row(plan.buckets, own), x, y),
    ]
    for kernel in kernels:
        close(kernel([*A, *B]), want)
        with torch.inference_mode():  # without gradients, memory is used again
            close(kernel([*A, *B]), want)
        with torch.no_grad():
            kernel([*(2 * a for a in A), *B])
            close(kernel([*A, *B]), want)


def stacks(model: nn.Module) -> list[int]:
    """How many ways of multiplying each layer keeps its factors for."""
    programs = [slot.program for _, slot in slots(model)]
    return [len(own.stack.held.values) for own in programs if isinstance(own, batches.Batch) and own.stack is not None]


NAMES = ["a", None, {"a": 0.5, "b": -1.0}, "b", "a"]


def lora_net() -> tuple[Any, ah.Adapters]:
    model, adapters = net()
    for name in "bcde":
        adapters.remove(name)
    adapters.add("b", ah.method("lora", rank=2, init_weights="random"), "up")
    adapters.activate(None)
    return model, adapters


def test_within_inference_factors_are_put_side_by_side_once() -> None:
    model, adapters = lora_net()
    x = rows(len(NAMES))
    adapters.activate(NAMES)
    want, vectors = output(model, x), output(model, x[:, 0])
    with adapters.inference():
        close(output(model, x), want)
        assert stacks(model) == [1, 1]
        close(output(model, x), want)
        close(output(model, x[:, 0]), vectors)
        twin = pickle.loads(pickle.dumps(model))
        assert stacks(twin) == stacks(copy.deepcopy(model)) == [0, 0]
        close(output(twin, x), want)
        with adapters.using(["b", "a", "a", None, "a"]):
            others = output(model, x)
        close(output(model, x), want)
        with torch.enable_grad():
            assert model(x).requires_grad
    assert stacks(model) == [0, 0]
    adapters.activate(["b", "a", "a", None, "a"])
    close(output(model, x), others)


def test_a_change_within_inference_is_noticed() -> None:
    model, adapters = lora_net()
    other, others = lora_net()
    x = rows(len(NAMES))
    for own in (adapters, others):
        own.activate(NAMES)

    def changed() -> Tensor:
        other.load_state_dict(model.state_dict())
        return output(other, x)

    part: Any = model.up.adapters.a
    with adapters.inference():
        output(model, x)
        part.A.mul_(2.0)
        close(output(model, x), changed())
        part.A = nn.Parameter(torch.randn_like(part.A), requires_grad=False)
        close(output(model, x), changed())
        adapters.hotswap("b", 0.5 * ah.Adapter(((1.0, held(model, "b")),)))
        close(output(model, x), changed())
    assert stacks(model) == [0, 0]
    within = adapters.inference()
    within.__enter__()
    output(model, x)
    part.B.data.mul_(2.0)
    with pytest.raises(ah.AdapterError, match="up: a tensor was changed inside of inference"):
        within.__exit__(None, None, None)
    assert stacks(model) == [0, 0]
    close(output(model, x), changed())


def test_the_kernel_is_chosen_by_shape() -> None:
    seen = {}
    for n, adapters, length in ((8, 8, 1), (64, 8, 1), (64, 64, 1), (8, 8, 128), (32, 2, 4)):
        uses = [((k % adapters, 1.0),) for k in range(n)]
        plan = batches.planned(uses, [8] * adapters, [1.0] * adapters, torch.zeros(1))
        seen[n, adapters, length] = plan.together(length)
    assert seen == {
        (8, 8, 1): False,
        (64, 8, 1): True,
        (64, 64, 1): False,
        (8, 8, 128): False,
        (32, 2, 4): True,
    }


@pytest.mark.parametrize("training", [False, True])
def test_every_method_in_one_batch(training: bool) -> None:
    model, adapters = net()
    model.train(training)
    x = rows(len(MIXED))
    with adapters.using(MIXED):
        got = output(model, x)
    close(got, one_by_one(model, adapters, MIXED, x))
    adapters.activate(None)
    off = output(model, x)
    assert torch.equal(got[1], off[1])
    assert all((got[k] - off[k]).abs().max() > 1e-3 for k in range(len(MIXED)) if k != 1)
    with adapters.using([None] * len(MIXED)):
        assert torch.equal(output(model, x), off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("each", [["a", None, "a", "e", {"a": 0.5, "e": 0.5}], ["c", None, "d", "b", None]])
def test_rows_of_the_base_are_its_own_bits(each: list[Any], dtype: torch.dtype) -> None:
    model, adapters = net(dtype)
    x = rows(5, dtype)
    off = output(model, x)
    with adapters.using(each):
        got = output(model, x)
    assert got.dtype == dtype
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for k, own in enumerate(each):
        assert torch.equal(got[k].view(bits), off[k].view(bits)) == (own is None)
    close(got.double(), one_by_one(model, adapters, each, x).double(), 1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_go_to_the_adapters_of_each_row(training: bool) -> None:
    """Those of a batch are the sums of its rows' own, and of an adapter those of its rows alone."""
    each = ["a", None, {"a": 0.5, "b": -1.5}, "e", "c", "a"]
    model, adapters = net()
    model.train(training)
    x = rows(len(each))
    adapters.activate(each)
    assert set(adapters.active) == set("abce")
    model(x).square().sum().backward()
    got = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert {key for key, p in model.named_parameters() if p.requires_grad} == got.keys()
    assert not any(".d." in key for key in got)
    want: dict[str, Tensor] = {}
    for row, own in zip(x, each, strict=True):
        model.zero_grad()
        adapters.activate(own)
        y = model(row[None])
        if y.requires_grad:
            y.square().sum().backward()
        for key, p in model.named_parameters():
            if p.grad is not None:
                want[key] = want.get(key, 0) + p.grad
    assert got.keys() == want.keys()
    for key, grad in got.items():
        close(grad, want[key])
        assert (grad != 0).any()
    model.zero_grad()
    adapters.activate(each)
    model(x)[[0, 1, 5]].square().sum().backward()  # rows of "a" and of the base: nobody else learns
    others = [p.grad for key, p in model.named_parameters() if p.grad is not None and ".a." not in key]
    assert all((grad == 0).all() for grad in others)


def test_gradcheck() -> None:
    model, adapters = net()
    x = rows(4)[:, :2]
    adapters.activate(["a", "e", {"a": 0.5, "b": -1.5}, ah.chain("e", "c")])
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def loss(*tensors: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, dict(zip(trained, tensors, strict=True)), (x,))
        return y.square().mean()

    torch.autograd.gradcheck(loss, tuple(trained.values()), fast_mode=True)


def test_dropout_is_that_of_each_adapter_in_training() -> None:
    """With dropout, a method's forward is more than its delta in training, and is what is called."""
    model, adapters = net()
    adapters.add("f", ah.method("lora", rank=2, alpha=4, dropout=0.999, init_weights="random"), "all-linear")
    model.eval()
    x = rows(3)
    each = ["f", "a", "f"]
    adapters.activate(each)
    close(output(model, x), one_by_one(model, adapters, each, x))
    model.train()
    adapters.activate(each)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        got = output(model, x)
    adapters.activate([None, "a", None])
    off = output(model, x)
    close(got[1], off[1])
    assert int((got[[0, 2]] == off[[0, 2]]).all(-1).sum()) > 5  # of ten tokens most are dropped
    model.eval()
    adapters.activate(each)
    assert (output(model, x)[0] - got[0]).abs().max() > 1e-2


def test_gates_weigh_rows() -> None:
    model, adapters, g = gated()
    each = [g * ah.use("a"), None, "b", g * ah.use("a") + 0.5 * ah.use("b")]
    x = rows(4)
    with adapters.using(each):
        close(output(model, x), one_by_one(model, adapters, each, x))


def language_model() -> tuple[Any, ah.Adapters]:
    model = llama(torch.float64)
    adapters = ah.adapt(model)
    adapters.add("sql", ah.method("lora", rank=4), "all-linear")
    adapters.add("french", ah.method("lora", rank=2), ["q_proj", "down_proj"])
    adapters.add("polite", ah.method("bottleneck", bottleneck_size=6), "mlp")
    adapters.add("ia3", ah.method("ia3", feedforward=("down_proj",)), ["k_proj", "down_proj"])
    adapters.add("norms", ah.method("ln_tuning"), "all")
    for seed, name in enumerate(adapters.names):
        fill(model, name, seed)
    return model, adapters


EACH: list[Any] = ["sql", None, "polite", {"sql": 0.5, "french": 0.5}, "ia3", "norms", "french"]


def test_a_language_model_generates_for_each_row_what_it_would_alone() -> None:
    model, adapters = language_model()
    x = tokens(len(EACH), 5)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with adapters.using(EACH):
        got = model.generate(input_ids=x, attention_mask=torch.ones_like(x), **options)
        again = model.generate(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False, **options)
    assert torch.equal(got, again)
    for k, own in enumerate(EACH):
        with adapters.using(own):
            alone = model.generate(input_ids=x[k : k + 1], attention_mask=torch.ones_like(x[:1]), **options)
        assert torch.equal(got[k], alone[0])
    assert len({tuple(row[5:].tolist()) for row in got}) > 3


def test_it_trains_several_adapters_at_once() -> None:
    model, adapters = language_model()
    each = ["sql", "french", "sql", "polite"]
    adapters.activate(each)
    ids = tokens(4, 10)
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=2e-2))
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_copies_casts_autocast_and_checkpointing() -> None:
    each = ["a", None, {"a": 0.5, "b": 0.5}, "c", "e"]
    model, adapters = net(torch.float32)
    adapters.activate(each)
    x = rows(5, torch.float32)
    want = output(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, x), want)
        ah.adapt(twin).activate(None)
    close(output(copy.deepcopy(model).double(), x.double()).float(), want, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        close(output(model, x).float(), want, 5e-2)
    model(x).square().sum().backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    again: Any = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)  # type: ignore[attr-defined]
    again.square().sum().backward()
    assert all(torch.equal(plain[key], p.grad) for key, p in model.named_parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, for any Function
def test_switching_among_batches_compiles_nothing_anew() -> None:
    model, adapters = net(torch.float32)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    x = rows(3, torch.float32)
    with torch.no_grad():
        for turn in range(2):
            for each in (["a", None, "e"], None, ["c", "a", "d"], ["a", "a", None]):
                adapters.activate(each)
                close(compiled(x), model(x), 1e-5)
            if turn == 0:
                first = count.frame_count
    assert count.frame_count == first


# What is refused --------------------------------------------------------------------------------------------


def test_wrong_names_and_lengths_are_errors() -> None:
    model, adapters = net()
    adapters.activate("a")
    want = output(model, inputs())
    for each, what in (
        (["a", "z", None], "there is no adapter 'z'"),
        ([], "a batch of nothing"),
        (["a", ["b"]], "rows of a batch are no part of a composition"),
        (["a", 3], "3 is no composition"),
    ):
        with pytest.raises(ah.AdapterError, match=what):
            adapters.activate(each)
        assert torch.equal(output(model, inputs()), want)
    with pytest.raises(ah.ConfigError, match="no part of a composition"):
        0.5 * ah.Rows((ah.use("a"),))  # type: ignore[operator]
    for each in (["a", "a"], ["a"] * 4, ["c", None]):
        adapters.activate(each)
        with pytest.raises(ah.AdapterError, match=f"up: gets a tensor .* where {len(each)} rows were told what to use"):
            output(model, inputs())
    adapters.activate(["a", None, "b"])
    with pytest.raises(ah.NotMergeable, match="up: each row of the batch has a composition of its own"):
        adapters.merge()
    with pytest.raises(ah.ConfigError, match="rows of a batch are no composition to keep"):
        adapters.save_composition("nowhere")


def test_a_prefix_is_in_all_rows_or_in_none() -> None:
    model = llama()
    adapters = ah.adapt(model)
    adapters.add("prefix", ah.method("prefix_tuning", num_virtual_tokens=3), "self_attn")
    adapters.add("lora", ah.method("lora"), "q_proj")
    with pytest.raises(ah.ConfigError, match=r"layers.0.self_attn: 'prefix' wraps the call of the layer, so it cannot"):
        adapters.activate(["prefix", None])
    fill(model, "lora")
    each = [ah.use("prefix") + ah.use("lora"), "prefix"]
    x = tokens(2, 5)
    with torch.no_grad(), adapters.using(each):
        got = model(input_ids=x).logits
    for k, own in enumerate(each):
        with torch.no_grad(), adapters.using(own):
            torch.testing.assert_close(got[k], model(input_ids=x[k : k + 1]).logits[0], rtol=1e-4, atol=1e-5)


def test_removing_an_adapter_leaves_the_base_in_its_rows() -> None:
    model, adapters = net()
    x = rows(3)
    adapters.activate(["a", "b", "c"])
    got = output(model, x)
    adapters.remove("b")
    close(output(model, x)[[0, 2]], got[[0, 2]])
    adapters.activate(None)
    off = output(model, x)
    adapters.activate(["a", None, "c"])
    assert torch.equal(output(model, x)[1], off[1])
