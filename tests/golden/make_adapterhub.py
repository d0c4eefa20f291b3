"""Write the golden files of AdapterHub's adapters, in an environment of their own: `python make_adapterhub.py`.

    pip install torch==2.13.0 adapters==1.3.0

`adapters` pins another transformers than the tests use, so its outputs are stored: for each case a folder with the
model's weights, the adapter as AdapterHub saves it, the input and the last hidden states, all in float32.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import AdapterConfig, DoubleSeqBnConfig, LoRAConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

HERE = Path(__file__).parent / "adapterhub"
WIDTH, INNER, HEADS, LAYERS, VOCABULARY = 12, 16, 2, 2, 23


def bert() -> Any:
    widths = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
    return BertModel(
        BertConfig(**widths, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=16),
        add_pooling_layer=False,
    )


def gpt2() -> Any:
    return GPT2Model(GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, vocab_size=VOCABULARY, n_positions=16))


def t5() -> Any:
    widths = {"d_model": WIDTH, "d_ff": INNER, "d_kv": 6, "num_heads": HEADS}
    return T5EncoderModel(T5Config(**widths, num_layers=LAYERS, vocab_size=VOCABULARY))


def llama() -> Any:
    widths = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
    return LlamaModel(LlamaConfig(**widths, num_hidden_layers=LAYERS, vocab_size=VOCABULARY))


CASES: dict[str, tuple[Any, AdapterConfig]] = {
    "bert-seq_bn": (bert, SeqBnConfig(reduction_factor=4)),
    "bert-double_seq_bn": (bert, DoubleSeqBnConfig(reduction_factor=4)),
    "bert-seq_bn-norms": (bert, SeqBnConfig(reduction_factor=3, ln_before=True, ln_after=True, scaling="learned")),
    "gpt2-seq_bn": (gpt2, SeqBnConfig(reduction_factor=4, non_linearity="gelu", original_ln_before=False)),
    "gpt2-seq_bn-layers": (gpt2, SeqBnConfig(reduction_factor=4)),
    "llama-double_seq_bn": (llama, DoubleSeqBnConfig(reduction_factor=4)),
    "llama-seq_bn": (llama, SeqBnConfig(reduction_factor=4)),
    "t5-par_bn": (t5, ParBnConfig(reduction_factor=4)),
    "t5-seq_bn": (t5, SeqBnConfig(reduction_factor=4)),
    "t5-double_seq_bn": (t5, DoubleSeqBnConfig(reduction_factor=4)),
    "bert-lora": (bert, LoRAConfig(r=3, alpha=5, intermediate_lora=True, output_lora=True)),
}


def main() -> None:
    for name, (make, config) in CASES.items():
        rng = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for p in model.parameters():  # larger than at the start, norms and biases too
                p.add_(0.2 * torch.randn(p.shape, generator=rng))
        base = {key: t.clone() for key, t in model.state_dict().items()}
        ids = torch.randint(1, VOCABULARY, (2, 5), generator=rng)
        with torch.no_grad():
            plain = model(ids).last_hidden_state
        adapters.init(model)
        model.add_adapter("a", config=config)
        model.set_active_adapters("a")
        with torch.no_grad():
            for key, p in model.named_parameters():
                if ".a." in key:
                    p.add_(0.2 * torch.randn(p.shape, generator=rng))
            output = model(ids).last_hidden_state
        assert (output - plain).abs().max() > 0.1
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model.save_adapter(str(folder), "a")  # its own safetensors writer fails where a norm is stored under two names
        pickled = folder / "pytorch_adapter.bin"
        saved = torch.load(pickled, weights_only=True)
        save_file({key: t.clone() for key, t in saved.items()}, folder / "adapter.safetensors")
        pickled.unlink()
        tied = {t.data_ptr(): key for key, t in reversed(base.items())}
        weights = {f"model.{key}": t for key, t in base.items() if tied[t.data_ptr()] == key}
        save_file({**weights, "ids": ids, "output": output, "plain": plain}, folder / "golden.safetensors")
        model.config.to_json_file(folder / "model_config.json")
        print(name, sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    main()
