"""Files: what is saved in PEFT's layout comes back bit by bit, and is the same file every time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter
from ..protocol import Method, Params
from ..site import Site
from ..source import Stored, make_site, stored
from .capability import can_be_stored, has_delta, has_layout
from .check import check, require, within
from .zoo import Cell, bits, cells, changed, each_cell, examples, has_example, sibling

TINY = 1e-30  # a norm to divide by where ΔW is zero
ROUNDING = 1e-12  # of float64


@check(has_example, has_layout)
def pack_and_unpack_are_inverse(method: Method) -> str:
    """`pack` gives what `peft_keys` names, only rearranged; `unpack` gives the tensors back, bit by bit."""
    count = 0
    for cell in each_cell(method, dtype=torch.float32):
        own, families = bits(cell.own), cell.method.peft_keys()
        with torch.no_grad():
            packed = bits(cell.method.pack(cell.own))
            unpacked = bits(cell.method.unpack(Params(packed), cell.site))
            again = bits(cell.method.pack(Params(unpacked)))
        names = families[cell.site.kind if cell.site.kind in families else ""].keys()
        require(
            names - cell.method.peft_optional() <= packed.keys() <= names,
            f"pack gives {', '.join(packed)} of a {cell}, and peft_keys has {', '.join(names)}",
            fix="make them agree, or declare no peft_type: then the delta is what is saved",
        )
        require(not changed(own, bits(cell.own)), f"pack changed tensors of a {cell}", fix="compute out of place")
        numbers = torch.cat([t.double().abs().flatten() for t in own.values()])
        made = [name for name, t in packed.items() if not bool(torch.isin(t.double().abs(), numbers).all())]
        require(
            not made,
            f"pack computes {', '.join(made)} of a {cell}: a rounded file would not give it back",
            fix="rearrange the tensors, and no more than negate them; factors belong to the options",
        )
        lost = changed(*({k: t for k, t in found.items() if k in cell.trained} for found in (own, unpacked)))
        lost += sorted(own.keys() ^ unpacked.keys())
        require(not lost, f"unpack gives other {', '.join(lost)} of a {cell}", fix="let it undo what pack does")
        lost = changed(packed, again)
        require(not lost, f"{', '.join(lost)} of a {cell} is another if packed again", fix="let unpack undo pack")
        with torch.no_grad():
            same = torch.equal(cell.forward(Params({**cell.shared, **unpacked})), cell.forward())
        require(same, f"a {cell} computes something else with unpacked tensors", fix="let unpack undo what pack does")
        count += len(packed)
    return f"{count} tensors"


@check(has_example, can_be_stored)
def save_and_load(method: Method) -> str:
    """A saved adapter comes back with the same tensors, bit by bit, and the same delta at every site."""
    tensors = 0
    for example in examples(method):
        for own, dtype in zip((method, sibling(method)), (torch.float32, torch.bfloat16), strict=True):
            made = cells(own, example, dtype=dtype)
            with tempfile.TemporaryDirectory() as folder:
                error = _adapter(own, made).save(Path(folder, "adapter"))
                back = stored(Path(folder, "adapter"))
                require(
                    back.sites.keys() == made.keys(),
                    f"{', '.join(sorted(back.sites.keys() ^ made.keys()))} came or went on the way through a file",
                    fix="check peft_keys() and place()",
                )
                for name, cell in made.items():
                    tensors += _same_tensors(cell, back, name)
                    if has_delta(method) is None and not back.own.method.reads_weight:
                        _same_delta(cell, back, name, error.modules[name])
    return f"{tensors} tensors, bit-equal" if tensors else "as a low-rank sum, within the stated error"


@check(has_example, can_be_stored)
def files_are_reproducible(method: Method) -> str:
    """The same adapter written twice gives the same bytes."""
    size = 0
    for example in examples(method):
        adapter = _adapter(method, cells(method, example, dtype=torch.float32))
        with tempfile.TemporaryDirectory() as folder:
            contents = []
            for out in (Path(folder, "one"), Path(folder, "two")):
                adapter.save(out)
                contents.append({file.name: file.read_bytes() for file in sorted(out.iterdir())})
            one, two = contents
            differing = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
            require(
                not differing,
                f"{', '.join(differing)} differs when written again",
                fix="let to_peft() depend on the options alone",
            )
            size += sum(map(len, one.values()))
    return f"{size} bytes"


def _adapter(method: Method, made: Mapping[str, Cell]) -> Adapter:
    sites = {name: cell.site for name, cell in made.items()}
    shared = next(iter(made.values())).shared
    return Adapter.of(method, sites, {name: cell.own for name, cell in made.items()}, shared)


def _same_tensors(cell: Cell, back: Stored, name: str) -> int:
    """Compare the tensors if the file has the method's own; the number of them."""
    if cell.method.peft_type is None:
        return 0
    layout = {key for names in cell.method.peft_keys().values() for key in names}
    packed = cell.method.pack(cell.own)
    if not packed.keys() <= layout:
        return 0
    again = back.params(name, cell.site)
    lost = changed(bits(packed), back.saved(name))
    shared = {key: t for key, t in cell.shared.items() if key in cell.method.peft_shared()}  # others are made again
    for own in ({key: cell.own[key] for key in cell.trained}, shared):
        lost += changed(bits(own), {key: again[key] for key in own})
    require(
        not lost,
        f"{', '.join(lost)} of a {cell} in {next(iter(cell.own.values())).dtype} came back changed",
        fix="check peft_keys(), pack() and unpack(): every tensor needs a key of its own",
    )
    return len(packed)


def _same_delta(cell: Cell, back: Stored, name: str, stated: float) -> None:
    """ΔW and bias of the file against those of the tensors in memory; `stated` is the error that saving told."""
    want = _dense(cell.method, cell.p, cell.site)
    got = _dense(back.own.method.at(name), back.params(name), make_site(name, back.sites[name]))
    off = float((got - want).norm()) / max(float(want.norm()), TINY) if got.shape == want.shape else math.inf
    within(
        off,
        1.01 * stated + ROUNDING,
        f"another delta or bias from the file on a {cell}",
        fix="check to_peft() and from_peft(): every option that delta() reads must come back",
    )


def _dense(method: Method, params: Params, site: Site) -> Tensor:
    """ΔW in float64, and the change of the bias as one more column, (out, in + 1)."""
    p = Params({key: t.detach().double() if t.is_floating_point() else t for key, t in params.items()})
    W, bias = method.delta(p, site).dense(), method.delta_bias(p, site)
    return torch.cat([W, (W.new_zeros(len(W)) if bias is None else bias)[:, None]], dim=1)


CHECKS = (pack_and_unpack_are_inverse, save_and_load, files_are_reproducible)
