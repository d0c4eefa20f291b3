"""What is in the picture of each method: `python docs/methods/pictures.py` draws them all, `NAME.svg` beside this file.

A new method needs one entry here, under its name, and its page `NAME.md`. The vocabulary is that of `draw.py`.
"""

from __future__ import annotations

from pathlib import Path

from draw import COMPUTED, FROZEN, KEPT, RANDOM, Flow, Function, Matrix, Picture, Scalar, Sum, Vector

W0 = Matrix("W₀", "d", "k", FROZEN)
A, B, s = Matrix("A", "r", "k"), Matrix("B", "d", "r"), Scalar("s")


def bottleneck(reads: str) -> Flow:
    """D, σ and U, for hidden states of that width."""
    down, up = Matrix("D", "m", reads), Matrix("U", "d", "m")
    return (down, Vector("+", "b_D", "m"), Function("σ"), KEPT, up, Vector("+", "b_U", "d"), s)


BLOCK = Matrix("block", "d", "k", FROZEN)
PICTURES = {
    "lora": Picture(
        "LoRA: two trained matrices beside the frozen weight",
        "h = W₀ x + s B A x",
        {"": (KEPT, Sum((W0,), (A, KEPT, B, s)))},
    ),
    "pissa": Picture(
        "PiSSA and OLoRA: a LoRA that starts at the weight's own directions, less what it starts with",
        "h = W₀ x + s (B A − B₀ A₀) x",
        {
            "": (
                KEPT,
                Sum(
                    (W0,),
                    (A, KEPT, B, s),
                    (Matrix("A₀", "r", "k", COMPUTED), KEPT, Matrix("B₀", "d", "r", COMPUTED), Scalar("−s")),
                ),
            )
        },
        note=("A₀ and B₀ are computed from W₀; A and B begin there.",),
    ),
    "lora_plus": Picture(
        "LoRA+: a LoRA whose B has a higher learning rate than its A",
        "h = W₀ x + s B A x,   η_B = λ η_A",
        {
            "": (
                KEPT,
                Sum((W0,), (Matrix("A", "r", "k", note="rate η"), KEPT, Matrix("B", "d", "r", note="rate λη"), s)),
            )
        },
    ),
    "lora_fa": Picture(
        "LoRA-FA: a LoRA whose A is random and frozen, so that x need not be kept",
        "h = W₀ x + s B A x",
        {"": (Sum((W0,), (Matrix("A", "r", "k", RANDOM), KEPT, B, s)),)},
    ),
    "vera": Picture(
        "VeRA: two trained vectors between random matrices that all layers share",
        "h = W₀ x + Λ_b B Λ_d A x",
        {
            "": (
                Sum(
                    (W0,),
                    (
                        Matrix("A", "r", "k", RANDOM, "shared"),
                        KEPT,
                        Vector("⊙", "Λ_d", "r"),
                        Matrix("B", "d", "r", RANDOM, "shared"),
                        Vector("⊙", "Λ_b", "d"),
                    ),
                ),
            )
        },
    ),
    "delta_lora": Picture(
        "Delta-LoRA: a LoRA, and what its product has changed by since step K",
        "h = W₀ x + s B A x + λ s (B A − B_K A_K) x",
        {
            "": (
                KEPT,
                Sum(
                    (W0,),
                    (A, KEPT, B, Scalar("s (1+λ)")),
                    (Matrix("A_K", "r", "k", COMPUTED), KEPT, Matrix("B_K", "d", "r", COMPUTED), Scalar("−λ s")),
                ),
            )
        },
        note=("A_K and B_K are copies from step K.", "The gradients of A and B are those of s B A alone."),
    ),
    "dora": Picture(
        "DoRA: a LoRA whose result has rows of a trained length",
        "h = (m / ‖V‖) ⊙ V x + b,   V = W₀ + s B A",
        {
            "": (
                KEPT,
                Sum((W0,), (A, KEPT, B, s)),
                KEPT,
                Vector("⊙", "1/‖V‖", "d", COMPUTED),
                Vector("⊙", "m", "d"),
                Vector("+", "b", "d", FROZEN),
            )
        },
    ),
    "bitfit": Picture(
        "BitFit: only the bias of a layer is trained",
        "h = W₀ x + b₀ + Δb",
        {"": (W0, Vector("+", "b₀", "d", FROZEN), Vector("+", "Δb", "d"))},
    ),
    "ln_tuning": Picture(
        "LayerNorm tuning: the scale and the bias of a norm are trained",
        "h = w ⊙ (x − μ) / σ + b",
        {"": (KEPT, Function("(x − μ) / σ"), Vector("⊙", "w", "d"), Vector("+", "b", "d"))},
        note=("A norm gives out as many numbers as it takes: d is k.",),
    ),
    "bottleneck": Picture(
        "Bottleneck adapters: a small net behind a block, beside it, or around a norm",
        "h + s U σ(D h)   or   y + s U σ(D x)   or   LN(z + s U σ(D LN(z)))",
        {
            "behind a block": (BLOCK, KEPT, Sum((), bottleneck("d"))),
            "beside it": (KEPT, Sum((BLOCK,), bottleneck("k"))),
            "around a norm, whose input is x": (
                Sum((), (Function("LN", FROZEN), KEPT, *bottleneck("d"))),
                KEPT,
                Function("LN", FROZEN),
            ),
        },
    ),
    "ia3": Picture(
        "IA3: a trained factor for each output of a layer, or for each input",
        "h = l ⊙ (W₀ x + b)   or   h = W₀ (l ⊙ x) + b",
        {
            "keys and values": (W0, Vector("+", "b", "d", FROZEN), KEPT, Vector("⊙", "l", "d")),
            "the second layer of a feed-forward block": (
                KEPT,
                Vector("⊙", "l", "k"),
                W0,
                Vector("+", "b", "d", FROZEN),
            ),
        },
    ),
    "prompt_tuning": Picture(
        "Prompt tuning: trained embeddings in front of those of the tokens",
        "h = L([P; E x])",
        {
            "": (
                Matrix("E", "d", "k", FROZEN, "tokens"),
                KEPT,
                Vector("‖", "P", "n × d", note="in front"),
                Matrix("L", "d", "d", FROZEN, "all layers"),
            )
        },
        note=("What comes out for P is dropped.",),
    ),
    "prefix_tuning": Picture(
        "Prefix tuning: trained keys and values in front of those of every attention layer",
        "h = softmax(Q [P_k; K]ᵀ / √d) [P_v; V]",
        {
            "": (
                Matrix("W_k", "d", "k", FROZEN, "and W_v"),
                Vector("‖", "P_k, P_v", "2 n × d", note="in front"),
                Function("attention"),
            )
        },
        note=("The queries are those of the base.", "The input keeps its positions."),
    ),
}

if __name__ == "__main__":
    for name, picture in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(picture.svg(), encoding="utf-8", newline="\n")
