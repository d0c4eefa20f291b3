"""Adapters on live models: what they compute, what they leave alone, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from peers import (
    BERT,
    CONV,
    EMBEDDING,
    GPT2,
    LLAMA,
    PEERS,
    Peer,
    dense_delta,
    load_peft,
    native,
    output,
    write_adapter,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

every_peer = pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)


@dataclass(frozen=True, kw_only=True)
class Rescale(ah.Method):
    """Multiplies the output channels (https://arxiv.org/abs/2205.05638): no sum of weight changes."""

    name = "rescale"
    paper = "https://arxiv.org/abs/2205.05638"
    site_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def init(self, site: ah.Site, rng: torch.Generator) -> Mapping[str, nn.Parameter | Tensor]:
        return {"l": nn.Parameter(torch.ones(site.shape[0])), "frozen": torch.zeros(2, 3).T}

    def forward(self, p: ah.Params, x: Tensor, y: Tensor, site: ah.Site) -> Tensor:
        return site.scale_output(y, p["l"])

    def merge(self, p: ah.Params, weight: Tensor, bias: Tensor | None, site: ah.Site) -> tuple[Tensor, Tensor | None]:
        return p["l"][:, None] * weight, None if bias is None else p["l"] * bias


@dataclass(frozen=True, kw_only=True)
class Unmergeable(Rescale):
    """Refuses to merge at the layer called like its option."""

    name = "unmergeable"
    unmergeable: str = "2"

    def merge(self, p: ah.Params, weight: Tensor, bias: Tensor | None, site: ah.Site) -> tuple[Tensor, Tensor | None]:
        if site.name == self.unmergeable:
            raise ah.NotMergeable("no", where=site.name)
        return super().merge(p, weight, bias, site)


def lora(**options: Any) -> ah.Method:
    return ah.method("lora", **{"rank": 4, "alpha": 6, **options})


def two_layers() -> Any:
    """12 -> 20 -> 8, the second layer without a bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))


def fill(model: nn.Module, name: str, seed: int = 0) -> None:
    """Random values, none zero, for all tensors of an adapter."""
    rng = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if f".adapters.{name}." in key:
            p.data = (torch.randn(p.shape, generator=rng) * 0.3 + 0.01).to(p.dtype)


def adapted(peer: Peer, *, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """The peer's model with an adapter "a" that does something, and its handle."""
    model: Any = peer.build()
    adapters: Any = ah.adapt(model)
    adapters.add("a", lora(**options), peer.targets)
    fill(model, "a", seed)
    return model, adapters


def bits(model: nn.Module) -> dict[str, bytes]:
    return {k: t.contiguous().view(torch.uint8).numpy().tobytes() for k, t in model.state_dict().items()}


def base_bits(model: nn.Module) -> dict[str, bytes]:
    return {key: b for key, b in bits(model).items() if ".adapters." not in key}


def sites(model: nn.Module, name: str = "a") -> list[str]:
    found = [key.removesuffix(f".adapters.{name}") for key, _ in model.named_modules()]
    return [key for key, full in zip(found, dict(model.named_modules()), strict=True) if key != full]


def surface(model: nn.Module) -> Any:
    """All that is to be as before when adapters are gone."""
    hooks = [(len(m._forward_hooks), len(m._forward_hooks_with_kwargs)) for m in model.modules()]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    return bits(model), hooks, attributes, {k: p.requires_grad for k, p in model.named_parameters()}


def close(a: Tensor, b: Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# What is left alone ---------------------------------------------------------------------------------


@every_peer
def test_a_fresh_adapter_and_none_at_all_give_the_bases_output(peer: Peer) -> None:
    model: Any = peer.build()
    want, names, before = output(model, peer), [n for n, _ in model.named_modules()], bits(model)
    adapters = ah.adapt(model)
    adapters.add("a", lora(), peer.targets)
    assert adapters.active == {"a": 1.0}
    assert torch.equal(output(model, peer), want)
    fill(model, "a")
    assert (output(model, peer) - want).abs().max() > 1e-3
    adapters.activate(None)
    assert torch.equal(output(model, peer), want)
    assert [n for n, _ in model.named_modules() if ".adapters" not in n] == names
    assert base_bits(model) == before
    assert {key.rpartition(".adapters.")[0] for key in bits(model).keys() - before.keys()} == set(sites(model))
    assert len(sites(model)) >= len(peer.targets)


@every_peer
def test_removing_the_last_adapter_leaves_the_model_as_it_was(peer: Peer) -> None:
    model: Any = peer.build()
    next(model.parameters()).requires_grad_(False)
    before = surface(model)
    adapters = ah.adapt(model)
    assert not any(p.requires_grad for p in model.parameters())
    adapters.add("a", lora(), peer.targets)
    adapters.add("b", lora(), peer.targets[:1])
    adapters.merge()
    adapters.unmerge()
    adapters.remove("a")
    assert adapters.names == ("b",)
    assert set(sites(model, "b")) == {k.rpartition(".adapters.")[0] for k in bits(model).keys() - before[0].keys()}
    adapters.remove("b")
    assert surface(model) == before
    adapters.add("a", lora(), peer.targets)  # and it can be adapted anew, through the same handle
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)


def test_training_changes_the_adapter_and_nothing_else() -> None:
    model: Any = LLAMA.build().train()
    before = bits(model)
    adapters = ah.adapt(model)
    adapters.add("a", lora(), "all-linear")
    adapters.add("idle", lora(), "all-linear")
    idle = {k: b for k, b in bits(model).items() if ".adapters.idle." in k}
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=2e-2))
    ids = LLAMA.inputs()["input_ids"]
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    assert base_bits(model) == before
    assert {k: b for k, b in bits(model).items() if ".adapters.idle." in k} == idle
    for key, p in model.named_parameters():
        assert (p.grad is not None) == (".adapters.a." in key), key


# Against PEFT -------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "patterns": {"rank_pattern": (3, 7), "alpha_pattern": (5, 2)},
}


def write(folder: Path, peer: Peer, seed: int = 3, **options: Any) -> Path:
    patterns = {k: dict(zip(peer.patterned, v, strict=True)) for k, v in options.items() if "_pattern" in k}
    return write_adapter(folder, peer, **{"rank": 6, "alpha": 9, "seed": seed, **options, **patterns})


@pytest.mark.parametrize("variant", VARIANTS)
@every_peer
def test_what_peft_wrote_computes_here_what_it_does_there(tmp_path: Path, peer: Peer, variant: str) -> None:
    folder = write(tmp_path / "x", peer, **VARIANTS[variant])
    model: Any = peer.build()
    base = output(model, peer)
    ah.adapt(model).load(folder, "a")
    want = output(load_peft(folder, peer), peer)
    assert (want - base).abs().max() > 1e-3
    close(output(model, peer), want)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"lora_bias": True}, {"patterned": True}], ids=str)
@every_peer
def test_what_is_saved_here_computes_in_peft_what_it_does_here(
    tmp_path: Path, peer: Peer, options: dict[str, Any]
) -> None:
    if "lora_bias" in options and peer not in (GPT2, BERT):
        pytest.skip("PEFT has no lora_bias for embeddings, and warns where the layer has no bias")
    if "patterned" in options:
        options = {"rank_pattern": {peer.patterned[0]: 3}, "alpha_pattern": {peer.patterned[0]: 11}}
    model, adapters = adapted(peer, **options)
    assert float(adapters.save("a", tmp_path / "out")) == 0
    close(output(load_peft(tmp_path / "out", peer), peer), output(model, peer))
    again: Any = peer.build()
    ah.adapt(again).load(tmp_path / "out", "a")
    assert bits(again) == bits(model)
    assert torch.equal(output(again, peer), output(model, peer))


def test_saving_names_the_base_but_no_path(tmp_path: Path) -> None:
    model, adapters = adapted(BERT)
    for stored, name in (("org/bert-tiny", "org/bert-tiny"), ("/home/me/bert-tiny", "bert-tiny"), ("", None)):
        model.config._name_or_path = stored
        adapters.save("a", tmp_path / "out", force=True)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name
    with pytest.raises(ah.OutputExists):
        adapters.save("a", tmp_path / "out")


def test_an_adapter_can_be_saved_in_half_precision(tmp_path: Path) -> None:
    _, adapters = adapted(BERT)
    error = float(adapters.save("a", tmp_path / "out", dtype=torch.bfloat16))
    assert 1e-4 < error < 1e-2
    assert {t.dtype for part in ah.load(tmp_path / "out").sites.values() for t in part.tensors.values()} == {"BF16"}


# Several at once, merging ---------------------------------------------------------------------------------


@every_peer
def test_weighted_adapters_live_merged_and_as_a_sum_agree_with_float64(tmp_path: Path, peer: Peer) -> None:
    one, two = (write(tmp_path / n, peer, seed=i, rank=r) for i, (n, r) in enumerate((("1", 3), ("2", 5))))
    oracle = peer.build().double()
    for weight, folder in ((0.7, one), (-0.3, two)):
        for name, delta in dense_delta(folder).items():
            layer: Any = oracle.get_submodule(name)
            layer.weight.data += weight * native(delta, layer)
    want = output(oracle, peer)

    model: Any = peer.build().double()
    adapters = ah.adapt(model)
    adapters.load(one, "one")
    adapters.load(two, "two")
    assert adapters.active == {"one": 1.0}
    adapters.activate({"one": 0.7, "two": -0.3})
    close(output(model, peer), want, 1e-11)
    adapters.merge()
    close(output(model, peer), want, 1e-11)
    adapters.unmerge()
    close(output(model, peer), want, 1e-11)
    adapters.load(0.7 * ah.load(one) - 0.3 * ah.load(two), "sum")
    adapters.activate("sum")
    close(output(model, peer), want, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_peer
def test_a_merge_rounds_once_and_its_undoing_gives_the_bits_back(peer: Peer, dtype: torch.dtype) -> None:
    model: Any = peer.build().to(dtype)
    adapters = ah.adapt(model)
    for name in ("a", "b"):
        adapters.add(name, lora(rank=3 if name == "a" else 5), peer.targets)
        fill(model, name, seed=ord(name))
    adapters.activate({"a": 0.4, "b": 1.5})
    live, before = output(model, peer), bits(model)
    exact = {}
    for site in sites(model):
        slot = model.get_submodule(f"{site}.adapters")
        deltas = [(w, slot.get_submodule(n)) for n, w in (("a", 0.4), ("b", 1.5))]
        W = model.get_submodule(site).weight
        total = sum(w * p.method.delta(p.params(), p.site).scaled(1.0).dense().double() for w, p in deltas)
        exact[site] = W.double() + native(total, model.get_submodule(site))
    adapters.merge()
    for site, want in exact.items():
        layer = model.get_submodule(site)
        assert layer.weight.dtype == dtype
        assert layer.weight.is_contiguous()
        # Half a unit in the last place, and a little for the products' own rounding.
        bound = want.abs() * torch.finfo(dtype).eps * 0.5 + want.abs().max() * 1e-6
        assert ((layer.weight.double() - want).abs() <= bound).all(), site
    if dtype == torch.float32:
        close(output(model, peer), live)
    adapters.unmerge()
    assert bits(model) == before
    assert torch.equal(output(model, peer), live)


def test_a_method_that_is_no_sum_is_weighted_by_its_effect() -> None:
    model = two_layers()
    W, b = (t.detach().double() for t in (model[0].weight, model[0].bias))
    adapters = ah.adapt(model)
    for name in ("a", "b"):
        adapters.add(name, Rescale(), "0")
        fill(model, name, seed=ord(name))
    adapters.activate({"a": 0.5, "b": 2})
    l: Any = 1 + sum(  # noqa: E741
        w * (model.get_parameter(f"0.adapters.{n}.l").detach().double() - 1) for n, w in (("a", 0.5), ("b", 2.0))
    )
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    want = ((x.double() @ W.T + b) * l).float()
    close(model[0](x), want)
    adapters.merge()
    close(model[0](x), want)
    close(model[0].bias, (b * l).float(), 1e-7)


def test_a_bias_that_the_layer_lacks_comes_and_goes_with_the_merge() -> None:
    model, keys = two_layers(), list(two_layers().state_dict())
    adapters = ah.adapt(model)
    adapters.add("a", lora(lora_bias=True), "all-linear")
    fill(model, "a")
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    live = model(x)
    adapters.merge()
    close(model(x), live)
    assert isinstance(model[2].bias, nn.Parameter)
    assert not model[2].bias.requires_grad
    adapters.unmerge()
    assert model[2].bias is None
    assert torch.equal(model(x), live)
    assert [k for k in model.state_dict() if ".adapters." not in k] == keys


def test_generation_with_a_cache_is_that_of_the_merged_model() -> None:
    model, adapters = adapted(LLAMA)
    ids = LLAMA.inputs()["input_ids"]
    options: Any = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}

    def run(**more: Any) -> tuple[Tensor, Tensor]:
        result = model.generate(ids, **options, **more)
        return result.sequences, torch.stack(result.logits)

    tokens, logits = run()
    with adapters.using(None):
        assert not torch.equal(run()[0], tokens)
    uncached = run(use_cache=False)
    adapters.merge()
    for others in (uncached, run()):
        assert torch.equal(others[0], tokens)
        close(others[1], logits, 1e-4)


def test_a_merge_that_one_layer_refuses_changes_nothing() -> None:
    model = two_layers()
    adapters = ah.adapt(model)
    adapters.add("a", Unmergeable(), ["0", "2"])
    fill(model, "a")
    before = surface(model)
    with pytest.raises(ah.NotMergeable, match=r"^2: no$"):
        adapters.merge()
    assert surface(model) == before
    adapters.activate(None)
    adapters.activate("a")  # it does not think that it is merged


def test_a_merge_that_overflows_is_refused() -> None:
    model = two_layers().half()
    adapters = ah.adapt(model)
    adapters.add("a", lora(), "0")
    fill(model, "a")
    model.get_parameter("0.adapters.a.B").data *= 1e6
    before = surface(model)
    with pytest.raises(ah.NotMergeable, match=r"^0: the merged weight is not finite in torch\.float16"):
        adapters.merge()
    assert surface(model) == before


def test_merging_into_a_tied_weight_is_refused_and_names_both() -> None:
    model: Any = GPT2.build()
    assert model.lm_head.weight is model.transformer.wte.weight
    adapters = ah.adapt(model)
    adapters.add("a", lora(), ["wte", "c_attn"])
    fill(model, "a")
    before = surface(model)
    with pytest.raises(ah.NotMergeable, match=r"^transformer\.wte: its weight is also that of 'lm_head'"):
        adapters.merge()
    assert surface(model) == before


def test_a_merged_weight_keeps_its_memory_format() -> None:
    model: Any = CONV.build()
    model.conv2d.to(memory_format=torch.channels_last)
    adapters = ah.adapt(model)
    adapters.add("a", lora(), "conv2d")
    stride = model.conv2d.weight.stride()
    assert stride != model.conv2d.weight.contiguous().stride()
    adapters.merge()
    assert model.conv2d.weight.stride() == stride


def test_merging_again_starts_from_the_weights_as_they_are_then() -> None:
    model = two_layers()
    adapters = ah.adapt(model)
    adapters.add("a", lora(), "all-linear")
    adapters.add("b", lora(), "0")
    adapters.merge()
    adapters.unmerge()
    model[2].weight.data = 2 * model[2].weight.data
    before = bits(model)
    adapters.activate("b")
    adapters.merge()
    adapters.unmerge()
    assert bits(model) == before


def test_a_model_that_was_cast_while_merged_gets_its_own_weights_back() -> None:
    model, adapters = adapted(BERT)
    want = base_bits(copy.deepcopy(model).bfloat16())
    adapters.merge()
    model.bfloat16()
    adapters.unmerge()
    assert base_bits(model) == want


# Copies, casts, state dicts -------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@every_peer
def test_copies_are_whole_and_independent(peer: Peer, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, adapters = adapted(peer)
    adapters.add("b", lora(rank=2), peer.targets[:1], seed=5)
    fill(model, "b", seed=5)
    adapters.activate({"a": 0.5, "b": 1.0})
    want, before = output(model, peer), surface(model)
    twin = copied(model)
    assert bits(twin) == bits(model)
    assert torch.equal(output(twin, peer), want)
    others = ah.adapt(twin)
    assert (others.names, others.active) == (("a", "b"), {"a": 0.5, "b": 1.0})
    others.merge()
    close(output(twin, peer), want)
    others.unmerge()
    fill(twin, "b", seed=9)
    assert not torch.equal(output(twin, peer), want)
    for name in others.names:
        others.remove(name)
    assert surface(twin) == surface(peer.build())
    assert torch.equal(output(twin, peer), output(peer.build(), peer))
    assert torch.equal(output(model, peer), want)
    assert surface(model) == before


def test_a_merged_model_can_be_copied_and_the_copy_unmerged() -> None:
    model, adapters = adapted(BERT)
    before = bits(model)
    adapters.merge()
    twin = copy.deepcopy(model)
    ah.adapt(twin).unmerge()
    assert bits(twin) == before
    assert bits(model) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_peer
def test_adapters_compute_in_float32_on_a_half_precision_base(peer: Peer, dtype: torch.dtype) -> None:
    model: Any = peer.build().to(dtype)
    eps = torch.finfo(dtype).eps
    adapters = ah.adapt(model)
    adapters.add("a", lora(), peer.targets)
    fill(model, "a")
    assert {p.dtype for k, p in model.named_parameters() if ".adapters." in k} == {torch.float32}
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites(model):
        model.get_submodule(site).register_forward_hook(lambda m, x, y, site=site: calls.update({site: (x[0], y)}))
    for weights in ({"a": 1.0}, {"a": 0.5}):
        adapters.activate(weights)
        assert output(model, peer).dtype == dtype
        oracle = copy.deepcopy(model).double()
        for site, (x, y) in dict(calls).items():
            layer = oracle.get_submodule(site)
            want = layer(x.double() if x.is_floating_point() else x)
            ah.adapt(oracle).activate(None)
            base = layer(x.double() if x.is_floating_point() else x)
            ah.adapt(oracle).activate(weights)
            # One rounding of the base's output, one of the sum.
            assert ((y.double() - want).abs() <= 0.55 * eps * (base.abs() + want.abs()) + 1e-5).all(), site
            assert y.dtype == dtype


def test_a_small_change_of_a_large_output_is_rounded_once() -> None:
    """(y + Δ) − y in bfloat16 would lose Δ, and then any weight is too late."""
    model: Any = nn.Sequential(nn.Linear(12, 20)).bfloat16()
    model[0].bias.data.fill_(256.0)
    adapters = ah.adapt(model)
    adapters.add("a", lora(), "0")
    fill(model, "a")
    oracle = copy.deepcopy(model).double()
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    for handle in (adapters, ah.adapt(oracle)):
        handle.activate({"a": 16.0})
    want = oracle(x.double())
    assert ((model(x).double() - want).abs() <= 2 * torch.finfo(torch.bfloat16).eps * want.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_whole_model_can_be_cast(dtype: torch.dtype) -> None:
    model, _ = adapted(BERT)
    want = output(model, BERT)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    got = output(model, BERT)
    assert got.dtype == dtype
    close(got.float(), want, 1e-5 if dtype == torch.float64 else 0.15)


def test_tensors_that_load_state_dict_replaces_are_the_ones_that_count() -> None:
    model, other = two_layers(), two_layers()
    for m, seed in ((model, 1), (other, 2)):
        ah.adapt(m).add("a", Rescale(), "all-linear")
        fill(m, "a", seed)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(model(x), other(x))
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(model(x), other(x))
    ah.adapt(model).activate("a")
    on = {key for key, p in model.named_parameters() if p.requires_grad}
    assert on == {"0.adapters.a.l", "2.adapters.a.l"}


def test_an_adapter_in_memory_is_copied_and_every_tensor_is_contiguous() -> None:
    model: Any = two_layers()
    adapters = ah.adapt(model)
    adapters.add("a", lora(), "0")
    part = model.get_submodule("0.adapters.a")
    value = ah.Adapter.of(part.method, {"0": part.site}, {"0": part.params()})
    adapters.load(value, "b")
    before = bits(model)["0.adapters.a.A"]
    assert bits(model)["0.adapters.b.A"] == before
    fill(model, "b")
    model.get_parameter("0.adapters.b.A").data.zero_()
    assert bits(model)["0.adapters.a.A"] == before
    adapters.add("c", Rescale(), "0")
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_sum_in_memory_is_the_weighted_adapters() -> None:
    model = two_layers()
    adapters = ah.adapt(model)
    values = {}
    for name, rank in (("a", 4), ("b", 8)):  # of one scaling, which is no power of two
        adapters.add(name, lora(rank=rank, alpha=1.5 * rank, lora_bias=True), "all-linear")
        fill(model, name, seed=rank)
        parts = {n: model.get_submodule(f"{n}.adapters.{name}") for n in ("0", "2")}
        sites, params = {n: p.site for n, p in parts.items()}, {n: p.params() for n, p in parts.items()}
        values[name] = ah.Adapter.of(parts["0"].method, sites, params)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    for name, value, weights in (
        ("halves", values["a"] - 0.5 * values["b"], {"a": 1.0, "b": -0.5}),
        ("twice", 2 * values["a"], {"a": 2.0}),
    ):
        adapters.load(value, name)
        adapters.activate(weights)
        want = model(x)
        adapters.activate(name)
        close(model(x), want)


def test_layers_may_be_called_with_keywords() -> None:
    model, x = two_layers(), torch.ones(2, 12)
    ah.adapt(model).add("a", lora(), "0")
    fill(model, "a")
    assert torch.equal(model[0](input=x), model[0](x))
    assert not torch.equal(model[0](x), two_layers()[0](x))


def test_other_hooks_see_the_adapted_output() -> None:
    model, seen = two_layers(), list[Tensor]()
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    ah.adapt(model).add("a", lora(), "0")
    fill(model, "a")
    assert torch.equal(model[0](torch.ones(2, 12)), seen[0])


# Activation and training ----------------------------------------------------------------------------------


def test_only_active_adapters_are_trained() -> None:
    model = two_layers()
    adapters = ah.adapt(model)
    adapters.add("a", Rescale(), "all-linear")
    adapters.add("b", lora(), "all-linear")

    def on() -> set[str]:
        return {key.split(".")[2] + "." + key.split(".")[3] for key, p in model.named_parameters() if p.requires_grad}

    assert on() == {"a.l"}  # the first, and not what it freezes
    adapters.activate("b")
    assert on() == {"b.A", "b.B"}
    adapters.activate({"a": 1, "b": 0.0})
    assert adapters.active == {"a": 1.0}
    assert on() == {"a.l"}
    adapters.activate(None)
    assert on() == set()
    adapters.activate({"a": 2, "b": -1})
    assert on() == {"a.l", "b.A", "b.B"}
    groups = adapters.param_groups(lr=0.5)
    assert [g["lr"] for g in groups] == [0.5, 0.5]
    params = [id(p) for g in groups for p in g["params"]]
    assert len(params) == len(set(params))
    assert set(params) == {id(p) for p in model.parameters() if p.requires_grad}


def test_methods_group_the_parameters_of_all_layers_by_name() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Grouped(Rescale):
        name = "grouped"

        def groups(self, params: Mapping[str, Sequence[nn.Parameter]], lr: float) -> list[dict[str, Any]]:
            assert list(params) == ["l"]
            first, *rest = params["l"]
            return [{"params": iter([first]), "lr": 16 * lr}, {"params": rest[: self.kept], "lr": lr, "x": 1}]

        kept: int = 9

    model = two_layers()
    adapters = ah.adapt(model)
    adapters.add("a", Grouped(), "all-linear")
    high, low = adapters.param_groups(0.25)
    assert (high["lr"], low["lr"], low["x"]) == (4.0, 0.25, 1)
    assert high["params"] == [model.get_parameter("0.adapters.a.l")]
    assert low["params"][0] is model.get_parameter("2.adapters.a.l")
    adapters.add("b", Grouped(kept=0), "all-linear")
    adapters.activate("b")
    with pytest.raises(ah.PluginError, match="'grouped' does not give each parameter exactly once"):
        adapters.param_groups(0.25)


def test_using_restores_what_was_active_also_after_an_error() -> None:
    _, adapters = adapted(EMBEDDING)
    adapters.add("b", lora(), EMBEDDING.targets)
    adapters.activate({"a": 0.5, "b": 2})

    def fails() -> None:
        with adapters.using("b") as same:
            assert same.active == {"b": 1.0}
            with adapters.using(None):
                assert adapters.active == {}
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert adapters.active == {"a": 0.5, "b": 2.0}
    with adapters.using("a"):
        adapters.remove("b")
    assert adapters.active == {"a": 0.5}
    with pytest.raises(ah.UnknownName), adapters.using("b"):
        pytest.fail("it was entered")
    assert adapters.active == {"a": 0.5}


def test_a_second_handle_is_on_the_same_adapters() -> None:
    model, adapters = adapted(BERT)
    again = ah.adapt(model)
    again.add("b", lora(), "query")
    assert adapters.names == ("a", "b")
    assert repr(adapters) == repr(again) == "<Adapters on BertModel: a (1), b>"
    with again.using("b"):
        assert adapters.active == {"b": 1.0}
    again.remove("a")
    again.remove("b")
    assert all(p.requires_grad for p in model.parameters())


def test_initial_values_depend_on_seed_and_name_only() -> None:
    def tensors(targets: Any, seed: int, warmup: int) -> dict[str, bytes]:
        model: Any = LLAMA.build()
        torch.rand(warmup)
        state = torch.get_rng_state()
        ah.adapt(model).add("a", lora(), targets, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {key: b for key, b in bits(model).items() if key.endswith("q_proj.adapters.a.A")}

    first = tensors("q_proj", 0, 0)
    assert len(set(first.values())) == 2
    assert tensors(["v_proj", "q_proj"], 0, 7) == first
    assert not set(tensors("q_proj", 1, 0).values()) & set(first.values())


def test_dropout_is_for_training_only() -> None:
    model = two_layers()
    model.eval()
    ah.adapt(model).add("a", lora(dropout=0.5), "all-linear")
    fill(model, "a")
    x = torch.ones(3, 12)
    assert torch.equal(model(x), model(x))
    assert not any(m.training for m in model.modules())
    model.train()
    assert not torch.equal(model(x), model(x))


# Which layers ---------------------------------------------------------------------------------------------

ATTENTION = [f"{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]
MLP = [f"{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("targets", "exclude", "want"),
    [
        ("all-linear", (), ATTENTION + MLP),
        ("all-linear", "mlp", ATTENTION),
        ("all-linear", ["layers.0", "*.[kvo]_proj", "mlp"], ["1.self_attn.q_proj"]),
        ("q_proj", (), ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (["mlp.up_proj", "q_proj"], ["layers.1"], ["0.self_attn.q_proj", "0.mlp.up_proj"]),
        ("layers.1.mlp.*_proj", (), MLP[3:]),
        ("model.layers.*.k_proj", ["model.layers.0"], ["1.self_attn.k_proj"]),
        (["q_proj", "layers.0.self_attn.q_proj"], (), ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
    ],
    ids=str,
)
def test_targets(targets: Any, exclude: Any, want: list[str]) -> None:
    model: Any = LLAMA.build()
    ah.adapt(model).add("a", lora(), targets, exclude=exclude)
    assert set(sites(model)) == {f"model.layers.{name}" for name in want}


def test_the_output_head_is_adapted_when_it_is_named() -> None:
    model: Any = LLAMA.build()
    ah.adapt(model).add("a", lora(), ["all-linear", "lm_head"])
    assert "lm_head" in sites(model)
    model = GPT2.build()
    ah.adapt(model).add("a", lora(), "all-linear")
    assert {name.rpartition(".")[2] for name in sites(model)} == {"c_attn", "c_proj", "c_fc"}


def test_all_linear_leaves_out_what_is_never_called_and_what_it_does_not_know() -> None:
    conv1d: Any = Conv1D(5, 8)  # type: ignore[no-untyped-call]
    layers = {"mha": nn.MultiheadAttention(8, 2), "own": Scaled(8, 8), "fc": nn.Linear(8, 4), "gpt": conv1d}
    model = nn.ModuleDict(layers)
    adapters = ah.adapt(model)
    adapters.add("a", lora(), "all-linear")
    adapters.add("b", Rescale(), "all-linear")  # which does not adapt Conv1D
    assert (sites(model), sites(model, "b")) == (["fc", "gpt"], ["fc"])


# Refusals -------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Holder(nn.Module):
    """A block with one layer, `fc`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer


def normed_by_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer: nn.Module = nn.utils.weight_norm(nn.Linear(6, 4))
        return layer


def with_own_adapters() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.adapters = nn.Identity()
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "subclass": (lambda: Holder(Scaled(6, 4)), "fc", r"fc: no site kind knows what a Scaled computes; exclude it"),
    "container": (
        lambda: Holder(two_layers()),
        "fc",
        r"fc: is a container, which would take adapters for one of its own layers; target layers in it, say 'fc\.0'",
    ),
    "module list": (lambda: Holder(nn.ModuleList([nn.Linear(3, 2)])), "fc", "fc: is a container"),
    "block": (
        lambda: Holder(Holder(nn.Linear(3, 2))),
        ["fc"],
        r"^fc: no site kind knows what a Holder computes; target layers in it, say 'fc\.fc'",
    ),
    "attention": (
        lambda: Holder(nn.MultiheadAttention(8, 2)),
        "out_proj",
        r"fc\.out_proj: MultiheadAttention reads the weight of this layer and never calls it",
    ),
    "root attention": (lambda: nn.MultiheadAttention(8, 2), "out_proj", "out_proj: MultiheadAttention"),
    "parametrized": (lambda: Holder(parametrizations.weight_norm(nn.Linear(6, 4))), "fc", "fc: the weight is computed"),
    "weight_norm": (lambda: Holder(normed_by_hook()), "fc", "fc: the weight is computed"),
    "parametrized, all-linear": (
        lambda: Holder(parametrizations.orthogonal(nn.Linear(6, 4))),
        "all-linear",
        "fc: the weight is computed",
    ),
    "meta": (lambda: Holder(nn.Linear(6, 4, device="meta")), "fc", "fc: the weight has no values yet"),
    "kind": (
        lambda: Holder(nn.Conv1d(2, 3, 1)),
        "fc",
        "fc: method 'rescale' adapts no layer of kind 'conv1d', only linear",
    ),
    "own": (lambda: Holder(with_own_adapters()), "fc", "fc: the layer has an attribute 'adapters' of its own"),
    "root": (lambda: nn.Linear(6, 4), "all-linear", "the model is a single layer"),
    "typo": (
        lambda: Holder(two_layers()),
        "fcc.2",
        r"target 'fcc\.2' names no module; did you mean .*'fc\.2'.*\? \(rescale adapts: linear\)",
    ),
    "second of two": (
        lambda: Holder(nn.Linear(6, 4)),
        ["fc", "fcs"],
        "target 'fcs' names no module; did you mean 'fc'",
    ),
    "none": (lambda: Holder(nn.Linear(6, 4)), [], "no layer is left to adapt"),
    "no linear": (lambda: Holder(nn.Conv1d(2, 3, 1)), "all-linear", "target 'all-linear' names no module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_are_refused(case: str) -> None:
    build, targets, message = REFUSED[case]
    model = build()
    adapters = ah.adapt(model)
    with pytest.raises((ah.ConfigError, ah.UnknownName), match=message) as error:
        adapters.add("a", Rescale(), targets)
    assert "\n" not in str(error.value)
    assert adapters.names == ()
    assert not any("adapters.a" in key for key, _ in model.named_modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_models_without_shapes_are_refused() -> None:
    with pytest.raises(ah.ConfigError, match=r"^fc\.weight: the parameter has no shape yet"):
        ah.adapt(Holder(nn.LazyLinear(4)))


def test_excludes_that_are_refused() -> None:
    adapters = ah.adapt(two_layers())
    with pytest.raises(ah.UnknownName, match="exclude='3' names no module; known: 0, 1, 2"):
        adapters.add("a", lora(), "all-linear", exclude="3")
    with pytest.raises(ah.ConfigError, match="no layer is left"):
        adapters.add("a", lora(), "0", exclude=["[0-2]"])


def test_an_initialisation_that_fails_halfway_leaves_no_adapter() -> None:
    model = two_layers()
    adapters = ah.adapt(model)
    before = surface(model)
    with pytest.raises(ah.ConfigError, match=r"^2: rank 10 exceeds"):
        adapters.add("a", lora(rank=10, init_weights="pissa"), "all-linear")
    assert surface(model) == before


def test_names_that_are_refused() -> None:
    _, adapters = adapted(BERT)
    adapters.add("sql-dialects", lora(), "query")
    with pytest.raises(ah.ConfigError, match="there is an adapter 'a' already"):
        adapters.add("a", lora(), "query")
    for name in ("", "a.b", "forward", "program", "half"):
        with pytest.raises(ah.ConfigError, match="cannot be called"):
            adapters.add(name, lora(), "query")
    with pytest.raises(ah.ConfigError, match="is not a method with its options"):
        adapters.add("b", type(lora()), "query")
    refusals: list[Callable[[], object]] = [
        lambda: adapters.activate("sql_dialect"),
        lambda: adapters.activate({"a": 1, "sql_dialect": 1}),
        lambda: adapters.remove("sql_dialect"),
        lambda: adapters.save("sql_dialect", "nowhere"),
    ]
    for call in refusals:
        with pytest.raises(ah.UnknownName, match="no adapter 'sql_dialect' on the model; did you mean 'sql-dialects'"):
            call()
    for weight in (float("nan"), float("inf"), True, "1", None):
        with pytest.raises(ah.ConfigError, match=r"weight .* of 'a' is not a finite number"):
            adapters.activate({"a": weight})
    assert adapters.active == {"a": 1.0}


def test_what_is_refused_while_merged(tmp_path: Path) -> None:
    model, adapters = adapted(BERT)
    adapters.save("a", tmp_path / "a")
    with pytest.raises(ah.ConfigError, match="nothing is merged"):
        adapters.unmerge()
    adapters.activate(None)
    with pytest.raises(ah.ConfigError, match="no adapter is active"):
        adapters.merge()
    with pytest.raises(ah.ConfigError, match="nothing that is active can be trained"):
        adapters.param_groups(1e-3)
    adapters.activate("a")
    adapters.merge()
    before = bits(model)
    refusals: list[Callable[[], object]] = [
        adapters.merge,
        lambda: adapters.activate(None),
        lambda: adapters.using("a").__enter__(),
        lambda: adapters.add("b", lora(), "query"),
        lambda: adapters.load(tmp_path / "a", "b"),
        lambda: adapters.remove("a"),
    ]
    for call in refusals:
        with pytest.raises(ah.ConfigError, match="while adapters are merged into the weights; unmerge first"):
            call()
    assert bits(model) == before
    adapters.save("a", tmp_path / "merged")
    assert (tmp_path / "merged" / "adapter_model.safetensors").stat().st_size > 0


def test_an_adapter_that_needs_the_weights_is_not_saved_while_they_are_others(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Reading(Rescale):
        reads_weight = True

    adapters = ah.adapt(two_layers())
    adapters.add("a", Reading(), "0")
    adapters.merge()
    with pytest.raises(ah.ConfigError, match="cannot save 'a', whose method reads the weights, while"):
        adapters.save("a", tmp_path / "out")


def test_adapters_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "llama", LLAMA)
    narrow: Any = LLAMA.build()
    narrow.model.layers[1].mlp.up_proj = nn.Linear(64, 100, bias=False)
    short: Any = LLAMA.build()
    short.model.layers = short.model.layers[:1]
    conv: Any = LLAMA.build()
    conv.model.layers[0].self_attn.q_proj = nn.Conv1d(64, 64, 1)
    lookup: Any = LLAMA.build()
    lookup.model.layers[0].self_attn.q_proj = nn.Embedding(64, 64)
    renamed: Any = BERT.build()
    layer = r"a linear of shape \[{}\] at 'model\.layers\.{}', which is a {}"
    cases: list[tuple[nn.Module, str]] = [
        (narrow, layer.format("172, 64", r"1\.mlp\.up_proj", r"linear of shape \[100, 64\]")),
        (conv, layer.format("64, 64", r"0\.self_attn\.q_proj", r"conv1d of shape \[64, 64, 1\]")),
        (lookup, layer.format("64, 64", r"0\.self_attn\.q_proj", r"embedding of shape \[64, 64\]")),
        (
            short,
            r"'model\.layers\.1\.mlp\.down_proj' \(and 6 more\).*; did you mean 'model\.layers\.0\.mlp\.down_proj'",
        ),
        (renamed, r"\(and 13 more\), which the model does not have"),
    ]
    for model, message in cases:
        before = bits(model)
        with pytest.raises((ah.FileError, ah.UnknownName), match=message) as error:
            ah.adapt(model).load(folder, "a")
        assert str(error.value).startswith(str(folder))
        assert bits(model) == before


def test_kept_values_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", BERT, target_modules=["query"], modules_to_save=["pooler"])
    with pytest.raises(ah.FileError, match=r"whole values of the base beside the adapter, .*pooler"):
        ah.adapt(BERT.build()).load(folder, "a")


def test_adapters_live_on_one_root() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model, _ = adapted(CONV)
    with pytest.raises(ah.ConfigError, match=r"^module: this part of the model has been adapted by itself"):
        ah.adapt(Wrapper(model))
    model = nn.Sequential(two_layers())
    ah.adapt(model).add("a", lora(), "all-linear")
    with pytest.raises(ah.ConfigError, match=r"^0\.adapters: the model is part of one that was adapted"):
        ah.adapt(model[0])
