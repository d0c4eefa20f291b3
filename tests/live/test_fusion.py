"""AdapterFusion (Pfeiffer et al. 2021) against its formula; trained alone, saved, copied, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub_lite_plugins.methods.bottleneck import Bottleneck
from test_composition import close, inputs, net, output
from torch import Tensor, nn
from toy import base_bits, bits, llama, logits, tokens

import adapterhub_lite as ah


def fused() -> tuple[Any, ah.Adapters, ah.Fuse]:
    """Three bottlenecks of several sizes behind each feed-forward net, one of them in the first layer alone."""
    model = llama(torch.float64)
    adapters = ah.adapt(model)
    for i, (name, target) in enumerate({"a": "mlp", "b": "mlp", "c": "layers.0.mlp"}.items()):
        adapters.add(name, ah.method("bottleneck", bottleneck_size=3 + i), target, seed=i)
    fuse = adapters.add_fusion("f", ["a", "b", "c"])
    rng = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        if ".adapters." in key:
            p.data += 0.3 * torch.randn(p.shape, generator=rng).double()
    adapters.activate(fuse, train="gates")
    return model, adapters, fuse


class Plain(nn.Module):
    """The library's order: a linear layer with bias for queries, values before the weighted sum, then the residual."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.own, self.linears = mlp.adapters, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (layer.weight for layer in self.linears)
        h = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        ups = []
        for name in "abc":
            if hasattr(self.own, name):
                p = dict(self.own.get_submodule(name).named_parameters())
                ups.append(torch.relu(h @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"])
        f, u = self.own.f, torch.stack(ups, dim=2)  # (batch, tokens, ways, width)
        query = h @ f.Q.T + f.q
        scores = torch.einsum("btd,btnd->btn", query, u @ f.K.T + 0.7)  # a bias of keys changes nothing
        return torch.einsum("btn,btnd->btd", scores.softmax(-1), u @ f.V.T) + h


def plainly(model: Any) -> Any:
    other = llama(torch.float64)
    for mine, layer in zip(model.model.layers, other.model.layers, strict=True):
        layer.mlp = Plain(mine.mlp)
    return other


def test_fusion_is_its_formula_and_so_are_its_gradients() -> None:
    model, adapters, _ = fused()
    ids = tokens(2, 7)
    with torch.no_grad():
        want = plainly(model)(input_ids=ids).logits
    torch.testing.assert_close(logits(model), want, rtol=1e-6, atol=1e-7)  # transformers' rotations are float32
    with adapters.using(ah.mean("a", "b", "c")):
        assert (logits(model) - want).abs().max() > 1e-3
    model(input_ids=ids, labels=ids).loss.backward()
    mine = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    assert {key.split(".")[-1] for key in mine} == {"Q", "K", "q", "V"}
    assert all((grad != 0).any() for grad in mine.values())
    model.zero_grad()
    plainly(model)(input_ids=ids, labels=ids).loss.backward()
    for key, grad in mine.items():
        torch.testing.assert_close(grad, model.get_parameter(key).grad, rtol=1e-5, atol=1e-8)


def test_around_a_norm_it_is_in_front_of_the_norm() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)).double()
    nn.init.normal_(model[1].bias)
    adapters = ah.adapt(model)
    for i, name in enumerate("ab"):
        adapters.add(name, Bottleneck.pfeiffer(bottleneck_size=3 + i), "1", seed=i)
    adapters.activate(adapters.add_fusion("f", ["a", "b"]))
    rng = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        if ".adapters." in key:
            p.data += 0.3 * torch.randn(p.shape, generator=rng).double()
    x = torch.randn(2, 5, 6, generator=rng).double()
    with torch.no_grad():
        inner = nn.functional.linear(x, model[0].weight, model[0].bias)

        def norm(h: Tensor) -> Tensor:
            h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + model[1].eps).sqrt()
            return h * model[1].weight + model[1].bias

        h, own = norm(inner), model[1].adapters
        u = []
        for part in (own.a, own.b):
            p = dict(part.named_parameters())
            u.append(torch.relu(h @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"])
        scores = torch.stack([((h @ own.f.Q.T + own.f.q) * (t @ own.f.K.T)).sum(-1) for t in u], -1).softmax(-1)
        want = norm(inner + sum(scores[..., i : i + 1] * (t @ own.f.V.T) for i, t in enumerate(u)))
    close(output(model, x), want)


def test_a_fresh_one_is_nearly_the_mean_and_one_way_is_itself() -> None:
    model, adapters = net()
    x = inputs()
    adapters.activate(adapters.add_fusion("f", ["a", "b"]))
    for part in (model.up.adapters.f, model.down.adapters.f):  # type: ignore[union-attr]
        assert (part.V - torch.eye(part.width).double()).abs().max() < 2e-6  # type: ignore[operator, arg-type]
        part.Q.data.zero_()  # type: ignore[union-attr, operator]
    even = output(model, x)
    with adapters.using(ah.mean("a", "b")):
        close(even, output(model, x), 1e-3)
    adapters.activate(adapters.add_fusion("g", [ah.chain("a", "c")]))
    one = output(model, x)
    with adapters.using(ah.chain("a", "c")):
        close(one, output(model, x), 1e-3)
    with pytest.raises(ah.NotMergeable, match="up: the gate 'g' weighs by the input"):
        adapters.merge()


def test_it_is_trained_with_the_adapters_frozen_and_pulled_to_the_identity() -> None:
    model, adapters, _ = fused()
    width = model.config.hidden_size
    want = sum(0.01 * (torch.eye(width) - layer.mlp.adapters.f.V).square().sum() for layer in model.model.layers)
    torch.testing.assert_close(adapters.penalty(), want.float())
    before = base_bits(model)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=1e-2))
    ids, losses = tokens(4, 10), []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss + adapters.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert base_bits(model) == before
    for key, p in model.named_parameters():
        assert torch.equal(start[key], p) == (".adapters.f." not in key), key


def test_it_is_saved_copied_and_goes(tmp_path: Path) -> None:
    model, adapters, fuse = fused()
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    adapters.save_composition(tmp_path / "out")
    other = llama(torch.float64)
    others = ah.adapt(other)
    assert others.load_composition(tmp_path / "out") == fuse
    assert torch.equal(logits(other), want)
    for name in "abc":
        others.remove(name)
    assert bits(other) == bits(llama(torch.float64))


def test_what_is_refused(tmp_path: Path) -> None:
    _, adapters, fuse = fused()
    other = adapters.add_gate("g", of=["a"], outputs=3)
    for call, what in (
        (lambda: adapters.add_fusion("f", ["a"]), "there is a gate 'f' already"),
        (lambda: adapters.add_fusion("h", ["a", None]), "the base adds nothing that could be fused"),
        (lambda: adapters.add_fusion("h", []), "a gate of 0 outputs"),
        (lambda: ah.Fuse(other, fuse.of), "is not a fusion"),
        (lambda: ah.Fuse(fuse.gate, fuse.of[:2]), "is of 3 ways, and here are 2"),
        (lambda: ah.Route(fuse.gate, fuse.of), "the fusion 'f' is no gate"),
        (lambda: fuse.gate * ah.use("a"), "the fusion 'f' is no weight of a term"),
        (lambda: ah.Gate("h", "sample", fuses=True), "a fusion reads the output, token by token"),
    ):
        with pytest.raises(ah.AdapterError, match=what):
            call()
    adapters.save_composition(tmp_path / "out")
    path = tmp_path / "out" / "composition.json"
    manifest = json.loads(path.read_text())
    manifest["composition"]["gate"]["fuses"] = 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ah.FileError, match="fuses=1 is not true or false"):
        ah.adapt(llama(torch.float64)).load_composition(tmp_path / "out")
