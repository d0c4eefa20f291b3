"""An adapter folded into a base by PEFT, as its documentation shows it: load, merge_and_unload, save_pretrained."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load both, merge, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, str(options.adapter), low_cpu_mem_usage=True).merge_and_unload()
    merged.save_pretrained(options.out, max_shard_size="500MB")


if __name__ == "__main__":
    main()
