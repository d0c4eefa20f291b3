"""One line on what the likeness of two adapters means for merging them. docs/diff.md gives the reasons.

It speaks of weights. How a merge does at a task, only the task can tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compare import Likeness

AGAINST = -0.1  # cosine: at equal sizes a tenth of ‖A‖² + ‖B‖² cancels in the sum
ALIKE = 0.5  # cosine: at equal sizes the sum is 1.7 times as long as either, where unrelated ones make 1.4
RELATED = 0.1
SHARED = 0.25  # overlap of spaces, as a share of the way from chance to 1
LARGER = 4.0  # ratio of norms: the smaller one is 6 % of the squared norm of an unrelated sum

ELSEWHERE = "what a merge does to a task, only the task can tell: measure it"


def advice(found: Likeness, norm_a: float, norm_b: float, a: str, b: str, both: int) -> str:
    """What to think of before merging `a` and `b`, with the reason; `both` is the number of modules in common."""
    said = _relation(found, norm_a, norm_b, a, b, both)
    small, large = sorted(((norm_a, a), (norm_b, b)))
    if small[0] and large[0] >= LARGER * small[0]:
        said += f"; {large[1]} is {large[0] / small[0]:.3g} times as large as {small[1]}: equal weights favour it"
    return said


def _relation(found: Likeness, norm_a: float, norm_b: float, a: str, b: str, both: int) -> str:
    if found.same is not None:
        how = "bit by bit" if found.same == "bits" else "in every number"
        return f"the same {how}: merging them changes the scale only"
    if found.cosine is None:
        zero = " and ".join(name for name, norm in ((a, norm_a), (b, norm_b)) if not norm)
        return f"{zero} changes no weight: there is nothing to interfere"
    if not both:
        return "no module in common: their sum has each in its own layers, and they meet in activations only"
    angle = f"cosine {found.cosine:.2f}".replace("-0.00", "0.00")
    if found.cosine <= AGAINST:
        return f"they pull against each other ({angle}): a sum cancels part of both; try a smaller weight for one"
    if found.cosine >= ALIKE:
        return f"they largely agree ({angle}): weights that add up to 1 keep the size, 1 and 1 double the common part"
    there = _shared(found)
    if found.cosine >= RELATED:
        return f"they agree in part ({angle}): a sum makes the common part larger than either had it" + (
            f"; beside that they use the same {there}: they may interfere there" if there else ""
        )
    if there:
        return f"nearly orthogonal ({angle}), but in the same {there}: they may interfere there"
    return f"nearly orthogonal ({angle}), in directions of their own: a sum keeps both; no interference is seen"


def _shared(found: Likeness) -> str:
    """The sides on which the two use the same directions, and how far."""
    sides = (
        ("input", found.overlap_in, found.chance_in, ", as adapters from one seed do"),
        ("output", found.overlap_out, found.chance_out, ""),
    )
    return " and ".join(
        f"{what} directions (overlap {overlap:.2f}, by chance {chance:.2f}{why})"
        for what, overlap, chance, why in sides
        if overlap is not None and chance is not None and overlap - chance >= SHARED * (1 - chance) > 0
    )
