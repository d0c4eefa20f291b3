"""The same merge by PEFT, as its documentation shows it: into the base in memory, then saved.

Uses PEFT's faster settings where it has them (low_cpu_mem_usage; no full matrices in the SVD).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load the base and the adapters, add the weighted adapter, save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--weights", type=float, nargs="+", required=True)
    parser.add_argument("--type", choices=["cat", "svd", "ties_svd", "dare_linear_svd"], required=True)
    parser.add_argument("--density", type=float, help="what is kept, for ties and dare")
    parser.add_argument("--rank", type=int, help="of the result, for those with svd")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    names = [f"a{i}" for i in range(len(options.adapters))]
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16)
    first, *others = options.adapters
    peft = PeftModel.from_pretrained(model, str(first), adapter_name=names[0], low_cpu_mem_usage=True)
    for name, folder in zip(names[1:], others, strict=True):
        peft.load_adapter(str(folder), adapter_name=name, low_cpu_mem_usage=True)
    svd = {"svd_rank": options.rank, "svd_full_matrices": False} if options.type.endswith("svd") else {}
    svd |= {"density": options.density} if options.density is not None else {}
    peft.add_weighted_adapter(names, options.weights, "merged", combination_type=options.type, **svd)
    peft.save_pretrained(str(options.out), selected_adapters=["merged"])


if __name__ == "__main__":
    main()
