"""A toy language model and its data, and the methods that go through every training stack.

To take a method through all of them, add a line to `METHODS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peers  # noqa: F401  # before transformers: no access to the Hub
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Sequence

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora", {"rank": 4, "alpha": 6}),
    ("lora", {"rank": 3, "alpha": 6, "init_weights": "pissa"}),  # frozen tensors beside the trained ones
    ("lora_plus", {"rank": 4, "ratio": 2.0}),
    ("lora_fa", {"rank": 4}),
    ("delta_lora", {"rank": 3, "start": 1}),
    ("vera", {"rank": 6}),
    ("dora", {"rank": 4}),
    ("ia3", {"feedforward": ("down_proj",)}),
    ("ln_tuning", {}),
    ("bottleneck", {"reduction_factor": 4, "placement": "parallel", "scaling": "learned", "non_linearity": "gelu"}),
    ("prompt_tuning", {"num_virtual_tokens": 5}),
    ("prefix_tuning", {"num_virtual_tokens": 3}),
)
RATES = {"prompt_tuning": 0.3, "prefix_tuning": 0.1}  # prompts begin at numbers of size 1
TARGETS: dict[str, Any] = {  # of methods that adapt no linear layer, by the kind that they do
    "block": ["self_attn", "mlp"],  # one gives a tuple, the other a tensor
    "decoder": ["model"],
    "attention": ["self_attn"],
    "norm": "all",
}
every_method = pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: "-".join([m[0], *(str(v) for v in m[1].values() if isinstance(v, str))])
)
VOCABULARY = 64


def llama(dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY) -> Any:
    """Two layers of width 32, grouped heads, always the same weights."""
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    widths: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 44}
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(
        **widths, **heads, **tokens, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config).eval()
        for p in model.parameters():  # the norms too; larger than at init, so that the model has something to say
            p.data += 0.15 * torch.randn(p.shape)
    return model.to(dtype)


def adapted(method: tuple[str, dict[str, Any]], dtype: torch.dtype = torch.float32) -> tuple[Any, ah.Adapters]:
    """The model with an adapter "a" as it starts."""
    name, options = method
    model = llama(dtype)
    adapters = ah.adapt(model)
    adapters.add("a", ah.method(name, **options), targets(method))
    return model, adapters


def targets(method: tuple[str, dict[str, Any]]) -> Any:
    """All linear layers, for a method that adapts any."""
    kinds = ah.method(method[0]).site_kinds
    return "all-linear" if "linear" in kinds else next(names for kind, names in TARGETS.items() if kind in kinds)


def merges(method: tuple[str, dict[str, Any]]) -> bool:
    cls = type(ah.method(method[0]))
    return cls.defines("delta") or cls.defines("merge")


def fill(model: nn.Module, name: str = "a", seed: int = 0) -> None:
    """Move what adapter `name` trains away from where it starts."""
    rng = torch.Generator().manual_seed(seed)
    active = ah.adapt(model).active
    ah.adapt(model).activate(name)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=rng).to(p)
    ah.adapt(model).activate(active)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Random ids, no special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=tokens(2, 7)).logits
        return y


def bits(model: nn.Module) -> dict[str, bytes]:
    return {k: t.contiguous().view(torch.uint8).numpy().tobytes() for k, t in model.state_dict().items()}


def base_bits(model: nn.Module) -> dict[str, bytes]:
    return {key: b for key, b in bits(model).items() if "adapters" not in key.split(".")}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained."""
    return {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}


def optimizer(adapters: ah.Adapters, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapters.param_groups(lr), **options)


def rate(method: tuple[str, dict[str, Any]]) -> float:
    return RATES.get(method[0], 1e-2)


def same(a: dict[str, Tensor], b: dict[str, Tensor], tol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=tol, atol=tol, msg=lambda m, key=key: f"{key}: {m}")


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Every trained tensor is another one now, or nothing was tested."""
    assert before.keys() == after.keys() != set()
    still: Sequence[str] = [key for key, tensor in before.items() if torch.equal(tensor, after[key])]
    assert not still, still
