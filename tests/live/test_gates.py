"""Trained gates: what they compute, train and leave alone; UniPELT (Mao et al. 2022) against its formulas."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_composition import Net, close, inputs, net, output
from torch import Tensor, nn
from toy import VOCABULARY, base_bits, bits, llama, logits, tokens, trained

import adapterhub_lite as ah

N = 4  # virtual tokens


def unipelt(dtype: torch.dtype = torch.float64) -> tuple[Any, ah.Adapters]:
    """Gated LoRA at queries and values, gated prefixes, gated bottlenecks behind the feed-forward nets."""
    model = llama(dtype)
    adapters = ah.adapt(model)
    adapters.add("lora", ah.method("lora", rank=4, alpha=8), ["q_proj", "v_proj"])
    adapters.add("prefix", ah.method("prefix_tuning", num_virtual_tokens=N), "self_attn")
    adapters.add("bottleneck", ah.method("bottleneck", bottleneck_size=6), "mlp")
    g = adapters.add_gate("g_lora", of="lora")
    h = adapters.add_gate("g_prefix", of="prefix")
    k = adapters.add_gate("g_bottleneck", of="bottleneck", reads="output")
    adapters.activate(g * ah.use("lora") + h * ah.use("prefix") + k * ah.use("bottleneck"))
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=rng).to(p.dtype)
    return model, adapters


# The formulas, written plainly ------------------------------------------------------------------------------


def gate(part: Any, h: Tensor) -> Tensor:
    """The mean over a sample's tokens of σ(W h + b): (batch, 1, 1)."""
    return torch.sigmoid(h @ part.W.T + part.b).mean(dim=1, keepdim=True)


class GatedLinear(nn.Module):
    """W x + g · s B A x."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.own = layer.weight, layer.adapters

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.own.lora.A, self.own.lora.B
        y: Tensor = x @ self.weight.T + gate(self.own.g_lora, x) * (8 / 4) * (x @ A.T @ B.T)
        return y


class GatedBlock(nn.Module):
    """h + g · (U ReLU(D h + b) + c), h the output of the feed-forward net."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.own, self.linears = mlp.adapters, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        into, up, down = (layer.weight for layer in self.linears)
        h = (torch.nn.functional.silu(x @ into.T) * (x @ up.T)) @ down.T
        p = dict(self.own.bottleneck.named_parameters())
        u = torch.relu(h @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
        return h + gate(self.own.g_bottleneck, h) * u


class GatedAttention(nn.Module):
    """softmax(Q [g P_k; K]ᵀ / √d) [g P_v; V]: the input's positions are behind the prefix."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.own, self.config = attention.adapters, attention.config
        self.q, self.v = GatedLinear(attention.q_proj), GatedLinear(attention.v_proj)
        self.k, self.o = attention.k_proj.weight, attention.o_proj.weight

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        x, (batch, length, _) = hidden_states, hidden_states.shape
        size = self.config.head_dim

        def heads(t: Tensor) -> Tensor:
            return t.reshape(batch, -1, t.shape[-1] // size, size).transpose(1, 2)  # (batch, heads, tokens, size)

        theta = self.config.rope_parameters["rope_theta"]
        turn = torch.arange(0, size, 2, dtype=torch.float64) / size
        angles = (N + torch.arange(length))[:, None] / theta**turn
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

        def rotated(t: Tensor) -> Tensor:
            a, b = t.chunk(2, dim=-1)
            return t * cos + torch.cat([-b, a], dim=-1) * sin

        prefix = gate(self.own.g_prefix, x) * self.own.prefix.prefix  # (batch, N, 2 width)
        P_k, P_v = prefix.chunk(2, dim=-1)
        K = torch.cat([heads(P_k), rotated(heads(x @ self.k.T))], dim=2)
        V = torch.cat([heads(P_v), heads(self.v(x))], dim=2)
        K, V = (t.repeat_interleave(4 // 2, dim=1) for t in (K, V))
        scores = rotated(heads(self.q(x))) @ K.transpose(-2, -1) / size**0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores[..., N:] = scores[..., N:].masked_fill(hidden, float("-inf"))
        y = (scores.softmax(-1) @ V).transpose(1, 2).reshape(batch, length, -1)
        return y @ self.o.T, None


def plainly(model: Any) -> Any:
    """The base with the formulas in the place of what is adapted, and the adapters' tensors."""
    other = llama(torch.float64)
    for mine, layer in zip(model.model.layers, other.model.layers, strict=True):
        layer.self_attn, layer.mlp = GatedAttention(mine.self_attn), GatedBlock(mine.mlp)
    return other


def test_unipelt_is_its_formulas() -> None:
    model, adapters = unipelt()
    with torch.no_grad():
        want: Tensor = plainly(model)(input_ids=tokens(2, 7)).logits
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)  # transformers' rotations are float32
    for name, gated in (("lora", "g_lora"), ("prefix", "g_prefix"), ("bottleneck", "g_bottleneck")):
        with adapters.using(adapters.gates[gated] * ah.use(name)):
            assert (logits(model) - want).abs().max() > 1e-3
    adapters.activate(None)
    assert torch.equal(logits(model), logits(llama(torch.float64)))


def test_unipelts_gradients_are_those_of_the_formulas() -> None:
    model, _ = unipelt()
    ids = tokens(2, 7)
    model(input_ids=ids, labels=ids).loss.backward()
    mine = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    assert {key.split(".")[-2] for key in mine} == {
        "lora",
        "prefix",
        "bottleneck",
        "g_lora",
        "g_prefix",
        "g_bottleneck",
    }
    assert all((grad != 0).any() for grad in mine.values())
    model.zero_grad()
    plainly(model)(input_ids=ids, labels=ids).loss.backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(mine[key], p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unipelt_trains_and_leaves_the_base_alone(dtype: torch.dtype) -> None:
    model, adapters = unipelt(dtype)
    before, start, ids = base_bits(model), trained(model), tokens(4, 10)
    assert {p.dtype for p in start.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=1e-2))
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert base_bits(model) == before
    assert all(not torch.equal(start[key], p) for key, p in trained(model).items())


def test_unipelt_generates_and_masks_what_is_padded() -> None:
    model, _ = unipelt()
    x = tokens(2, 5)
    found = model.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=4, do_sample=False)
    assert found.shape == (2, 9)
    assert int(found.max()) < VOCABULARY


# Gates in general -------------------------------------------------------------------------------------------


def gated(**options: Any) -> tuple[Net, ah.Adapters, ah.Gate]:
    model, adapters = net()
    gate = adapters.add_gate("g", of=["a", "b", "c"], **options)
    for i, p in enumerate(p for key, p in model.named_parameters() if ".adapters.g." in key):
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
    return model, adapters, gate


def by_hand(model: Net, name: str, x: Tensor, v: Tensor, layer: str) -> Tensor:
    own: Any = model.get_submodule(layer).adapters
    g = torch.sigmoid((v if own.g.gate.reads == "output" else x) @ own.g.W.T + own.g.b)
    g = g.mean(dim=1, keepdim=True) if own.g.gate.per == "sample" else g
    A, B = own.get_submodule(name).A, own.get_submodule(name).B
    return v + g * (6 / 4) * (x @ A.T @ B.T)


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("reads", ["input", "output"])
def test_a_gate_is_its_formula(per: Any, reads: Any) -> None:
    model, adapters, g = gated(per=per, reads=reads)
    x = inputs()
    adapters.activate(g * ah.use("a"))
    with torch.no_grad():
        h = torch.tanh(by_hand(model, "a", x, x @ model.up.weight.T + model.up.bias, "up"))
        close(output(model, x), by_hand(model, "a", h, h @ model.down.weight.T, "down"))
    with adapters.using(0.5 * (g * ah.use("a")) + 0.5 * (g * ah.use("a"))):
        twice = output(model, x)
    close(twice, output(model, x))


def test_a_route_weighs_its_ways_by_a_softmax() -> None:
    model, adapters, g = gated(outputs=3, per="token")
    x = inputs()
    adapters.activate(ah.route(g, "a", None, ah.chain("b", "c")))
    with torch.no_grad():
        y = x @ model.up.weight.T + model.up.bias
        own: Any = model.up.adapters
        w = (x @ own.g.W.T + own.g.b).softmax(-1)
        f_a = y + 6 / 4 * (x @ own.a.A.T @ own.a.B.T)
        f_b = own.c.l.flatten() * (y + 5 / 3 * (x @ own.b.A.T @ own.b.B.T + own.b.bias))
        close(output(model.up, x), w[..., :1] * f_a + w[..., 1:2] * y + w[..., 2:] * f_b)
    with adapters.using(ah.route(g, "a", "a", "a")):
        one = output(model, x)
    with adapters.using("a"):
        close(one, output(model, x))


def test_gates_are_trained_counted_and_copied() -> None:
    model, adapters, g = gated()
    off = adapters.summary()
    adapters.activate(g * ah.use("a"))
    on = adapters.summary()
    assert on.trained == 4 * (12 + 20 + 20 + 8) + (12 + 1) + (20 + 1)
    assert on.trained + on.frozen == off.trained + off.frozen
    assert on.base == 12 * 20 + 20 + 20 * 8
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    ids = sorted(id(p) for group in adapters.param_groups(1e-3) for p in group["params"])
    assert ids == sorted(id(p) for p in trained.values())
    x = inputs()
    model(x).square().sum().backward()
    assert all((p.grad != 0).any() for p in trained.values())
    want = output(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, x), want)
        ah.adapt(twin).activate(None)
        assert ah.adapt(twin).gates == {"g": g}
    other, others, _ = gated()
    others.activate(g * ah.use("a"))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, x), want)
    assert not any("adapters" in key for key in adapters.base_state_dict())


def test_a_fresh_gate_depends_on_seed_and_layer_and_on_nothing_else() -> None:
    found = []
    for seed, others in ((0, False), (0, True), (1, False)):
        model, adapters = net()
        if others:
            adapters.add("z", ah.method("lora"), "up")
            torch.randn(3)
        before = torch.get_rng_state()
        adapters.add_gate("g", of="a", seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        found.append({key: p.detach().clone() for key, p in model.named_parameters() if ".adapters.g." in key})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not torch.equal(found[0]["up.adapters.g.W"], found[2]["up.adapters.g.W"])
    assert not torch.equal(found[0]["up.adapters.g.W"][:, :8], found[0]["down.adapters.g.W"][:, :8])
    assert (found[0]["up.adapters.g.b"] == 0).all()


def test_a_gate_goes_with_its_layers_and_by_name() -> None:
    model, adapters, g = gated()
    adapters.activate(g * ah.use("a"))
    with pytest.raises(ah.ConfigError, match="the gate 'g' is on; activate something else first"):
        adapters.remove("g")
    adapters.activate("a")
    adapters.remove("g")
    assert adapters.gates == {}
    adapters.add_gate("g", of="a")
    for name in adapters.names:
        adapters.remove(name)
    assert adapters.gates == {}
    assert bits(model).keys() == bits(Net()).keys()


def test_gates_that_are_refused() -> None:
    _, adapters, g = gated()
    two = adapters.add_gate("two", of="a", outputs=2)
    refusals: list[tuple[Any, str]] = [
        (lambda: adapters.add_gate("g", of="a"), "there is a gate 'g' already"),
        (lambda: adapters.add("g", ah.method("lora"), "up"), "there is a gate 'g' already"),
        (lambda: adapters.add_gate("a", of="a"), "there is an adapter 'a' already"),
        (lambda: adapters.add_gate("h", of="z"), "there is no adapter 'z'"),
        (lambda: adapters.add_gate("h.h", of="a"), "cannot be called"),
        (lambda: adapters.add_gate("h", of="a", per="word"), "per='word' is not one of"),  # type: ignore[arg-type]
        (lambda: adapters.activate(ah.route(two, "a", "e") + 0 * ah.use("b")), None),
        (lambda: adapters.activate(ah.route(two, "a", "d")), None),
        (lambda: adapters.activate(ah.Gate("two", outputs=1) * ah.use("a")), "the gate 'two' on the model is Gate"),
        (lambda: adapters.activate(ah.Gate("g", per="token") * ah.use("a")), "give it as add_gate did"),
    ]
    for call, what in refusals:
        if what is None:
            call()
            continue
        with pytest.raises(ah.AdapterError, match=what):
            call()
    adapters.add_gate("only_e", of="e")
    with pytest.raises(
        ah.ConfigError, match="down: the gate 'only_e' was not made for this layer, where it weighs 'a'"
    ):
        adapters.activate(ah.Gate("only_e") * ah.use("a"))
    adapters.activate(g * ah.use("a"))
    with pytest.raises(ah.NotMergeable, match="up: the gate 'g' weighs by the input"):
        adapters.merge()
    conv = nn.Sequential(nn.Conv1d(3, 4, 2))
    others = ah.adapt(conv)
    others.add("a", ah.method("lora", rank=2), "0")
    with pytest.raises(ah.ConfigError, match="0: a gate cannot read the input of a conv1d"):
        others.add_gate("g", of="a")
    assert others.gates == {}
    embedding = ah.adapt(nn.Sequential(nn.Embedding(5, 4)))
    embedding.add("a", ah.method("lora", rank=2), "0")
    with pytest.raises(ah.ConfigError, match="0: a gate cannot read the input of a embedding"):
        embedding.add_gate("g", of="a")
    h = embedding.add_gate("g", of="a", reads="output")
    embedding.activate(h * ah.use("a"))
    assert embedding.model(torch.tensor([[1, 2], [3, 4]])).shape == (2, 2, 4)


def test_what_a_prefix_can_be_weighed_by() -> None:
    model = llama()
    adapters = ah.adapt(model)
    adapters.add("prefix", ah.method("prefix_tuning", num_virtual_tokens=3), "self_attn")
    adapters.add("prompt", ah.method("prompt_tuning", num_virtual_tokens=3), "model")
    g = adapters.add_gate("g", of="prefix")
    token = adapters.add_gate("token", of="prefix", per="token")
    for tree, what in (
        (token * ah.use("prefix"), "be weighed by token"),
        (0.5 * (g * ah.use("prefix")), "have the weight 0.5"),
        (g * (ah.use("prefix") + 0.5 * ah.use("prefix")), "be part of more than a term"),
    ):
        with pytest.raises(ah.ConfigError, match=f"layers.0.self_attn: 'prefix' wraps the call .* {what}"):
            adapters.activate(tree)
    with pytest.raises(ah.ConfigError, match="model: a gate cannot read tokens"):
        adapters.add_gate("h", of="prompt")
    h = adapters.add_gate("h", of="prompt", reads="output")
    with pytest.raises(ah.ConfigError, match="model: 'prompt' wraps the call"):
        adapters.activate(h * ah.use("prompt"))
    adapters.activate(g * ah.use("prefix"))
    assert logits(model).isfinite().all()


def test_a_prefix_that_is_trained_through_a_network_is_weighed_too() -> None:
    model = llama()
    adapters = ah.adapt(model)
    method = ah.method("prefix_tuning", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=7)
    adapters.add("prefix", method, "self_attn")
    g = adapters.add_gate("g", of="prefix")
    adapters.activate(g * ah.use("prefix"))
    loss = model(input_ids=tokens(2, 7), labels=tokens(2, 7)).loss
    loss.backward()
    assert all((p.grad != 0).any() for p in model.parameters() if p.requires_grad)
    for part in (layer.self_attn.adapters.g for layer in model.model.layers):
        part.b.data += 50  # a gate that is open: the prefix as it is
    opened = logits(model)
    adapters.activate("prefix")
    torch.testing.assert_close(opened, logits(model), rtol=1e-5, atol=1e-5)
