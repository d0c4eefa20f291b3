"""Several tensors side by side in one of a file: read and written part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterhub_lite import FileError
from adapterhub_lite.checkpoint import Checkpoint
from adapterhub_lite.columns import Joining, joined, split


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 3, 6)], ids=str)
def test_parts_are_the_columns_of_the_whole(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"before": torch.ones(3), "whole": whole}, tmp_path / "file")
    parts = split(Checkpoint.open(tmp_path / "file").tensors["whole"], 3)
    for part, want in zip(parts, whole.chunk(3, dim=-1), strict=True):
        assert part.shape == tuple(want.shape)
        assert part.numel == want.numel()
        assert part.nbytes == want.numel() * want.itemsize
        assert torch.equal(part.read(), want)
    assert joined(parts).shape == shape
    assert joined(parts).dtype == parts[0].dtype


def test_a_width_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 10), "b": torch.ones(())}, tmp_path / "file")
    for name in "ab":
        with pytest.raises(FileError, match=f"'{name}' has the shape .* not that of 3 side by side"):
            split(Checkpoint.open(tmp_path / "file").tensors[name], 3)


def test_a_whole_is_written_once_with_its_parts_in_order(tmp_path: Path) -> None:
    done: list[tuple[str, Tensor]] = []
    parts = {name: torch.full((2, i + 1), float(i)) for i, name in enumerate("abc")}
    joining = Joining(lambda name, tensor: done.append((name, tensor)), {"whole": ["a", "b", "c"], "other": ["a"]})
    for name in "cab":
        assert not done
        joining.add("whole", name, parts[name])
    joining.add("other", "a", parts["a"])
    assert [name for name, _ in done] == ["whole", "other"]
    assert torch.equal(done[0][1], torch.cat([parts["a"], parts["b"], parts["c"]], dim=1))
    save_file(dict(done), tmp_path / "file")
    assert load_file(tmp_path / "file")["whole"].shape == (2, 6)
