"""Write the golden file of what the authors of `pico`, `svc` and `ctm` compute: `python make_authors.py DIR`.

    pip install torch==2.13.0 tensorly==0.9.0

DIR has checkouts of github.com/yixuantt/Pico (1f1db1e), github.com/lyymuwu/SVC (6ad2b31) and
github.com/ZhengbaoHe/compress-then-merge (6017d1e), by these names. Their functions are run one by one, for the files
import what only experiments need. Stored are the factors of three changes of one weight, in float64, and for each case
the merged change; some of the code computes in float32.
"""

from __future__ import annotations

import ast
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import tensorly
import torch
from safetensors.torch import save_file
from tensorly.decomposition import partial_tucker

HERE = Path(__file__).parent / "authors"
SHAPE, RANK, COUNT = (17, 14), 4, 3

# Name: the rule, and its options as the authors' code has them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pico": ("pico", {}),
    "svc": ("svc", {"alpha": 1 / COUNT, "scale": 1.0}),
    "svc-suppressive": ("svc", {"alpha": 1.0, "scale": 0.3}),
    "ctm": ("ctm", {"rank": 4, "beta": 0.0, "topK": 100}),
    "ctm-larger": ("ctm", {"rank": 6, "beta": 0.25, "topK": 25}),
}


def functions(file: Path, names: set[str], known: dict[str, Any]) -> types.SimpleNamespace:
    """These functions and methods of a file, without the rest of it."""
    found = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef) and n.name in names]
    assert {own.name for own in found} == names
    for own in found:
        own.decorator_list = []
    exec(compile(ast.Module(found, []), str(file), "exec"), known)
    return types.SimpleNamespace(**known)


def main() -> None:
    at = Path(sys.argv[1])
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    common = drawn(SHAPE[0], 2)
    Bs = [torch.cat([common + 0.5 * drawn(SHAPE[0], 2), drawn(SHAPE[0], RANK - 2)], 1) * (1 + i) for i in range(COUNT)]
    As = [drawn(RANK, SHAPE[1]) for _ in range(COUNT)]
    changes = [B @ A for B, A in zip(Bs, As, strict=True)]

    sys.path.insert(0, str(at / "Pico"))
    from pico.pico import PICO

    svc = functions(at / "SVC/merge_func.py", {"coef_cal_multi_ranks"}, {"torch": torch})
    known = {"torch": torch, "chunked_sum": None}
    names = {"topk_values_mask", "resolve_zero_signs", "resolve_sign", "disjoint_merge", "ties_merging"}
    ties = functions(at / "compress-then-merge/merging_functions.py", names, known)
    known = {
        "torch": torch, "time": time, "tl": tensorly, "partial_tucker": partial_tucker, "float32_dtype": torch.float64,
        "ties_merging": ties.ties_merging,
    }  # fmt: skip
    names = {"util_get_core_matrices", "get_low_rank_components_in_core_space", "_process_ties"}
    ctm = functions(at / "compress-then-merge/task_merger.py", names, known)

    def merged(rule: str, given: dict[str, Any]) -> torch.Tensor:
        if rule == "pico":
            pico = PICO()
            calibrated = pico.calibrate_layer(changes, Bs=Bs)
            return pico.compensate_energy(sum(calibrated) / COUNT, changes)
        if rule == "svc":
            Wm = given["scale"] * sum(changes)
            Um, Sm, Vh = torch.linalg.svd(Wm, full_matrices=False)
            k = int((Sm > 1e-9 * Sm[0]).sum())
            _, s = svc.coef_cal_multi_ranks(torch.stack(changes), Wm, Um, Sm, Vh.mT, k, alpha=given["alpha"])
            return Um[:, :k] @ torch.diag(Sm[:k] / s) @ Vh[:k]
        self = types.SimpleNamespace(device="cpu")
        self.util_get_core_matrices = types.MethodType(ctm.util_get_core_matrices, self)
        U, V, cores = ctm.get_low_rank_components_in_core_space(self, As, Bs, given["rank"], given["beta"])
        return U @ ctm._process_ties(self, cores, given["topK"]) @ V.mT

    stored = {f"B.{i}": B for i, B in enumerate(Bs)} | {f"A.{i}": A for i, A in enumerate(As)}
    for name, (rule, given) in CASES.items():
        stored[f"result.{name}"] = merged(rule, given).double()
    HERE.mkdir(exist_ok=True)
    about = {name: {"rule": rule, "parameters": given} for name, (rule, given) in CASES.items()}
    save_file(stored, HERE / "golden.safetensors", {"cases": json.dumps(about)})
    print(*sorted(stored), sep="\n")


if __name__ == "__main__":
    main()
