"""Tensors that several processes wrote in parts, read as wholes, in other parts, and in none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hearth.errors import IntegrityError
from hearth.training.checkpoint.sharded import PLACES, ShardedTensors, encode_places

WHOLE = torch.arange(48.0).view(6, 8)


@pytest.fixture
def tensors(tmp_path: Path) -> ShardedTensors:
    """Six rows by two processes, of two and four; another tensor is whole in the first one's file."""
    files = [tmp_path / f"model-{rank:05}-of-00002.safetensors" for rank in range(2)]
    for file, (first, last) in zip(files, [(0, 2), (2, 6)], strict=True):
        places = encode_places({"w": ((6, 8), (first, 0))})
        parts = {"w": WHOLE[first:last].clone(), **({"b": torch.ones(3)} if first == 0 else {})}
        save_file(parts, file, {PLACES: places})
    return ShardedTensors(files)


def box(*spans: tuple[int, int]) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in spans)


def test_wholes(tensors: ShardedTensors) -> None:
    assert tensors.shapes == {"w": (6, 8), "b": (3,)}
    assert torch.equal(tensors["w"], WHOLE)
    assert torch.equal(tensors["b"], torch.ones(3))


@pytest.mark.parametrize("spans", [((0, 2), (0, 8)), ((1, 5), (0, 8)), ((0, 6), (4, 8)), ((3, 4), (2, 5))])
def test_other_parts(tensors: ShardedTensors, spans: tuple[tuple[int, int], ...]) -> None:
    part = tensors.read("w", box(*spans))
    assert torch.equal(part, WHOLE[box(*spans)])
    # Fused optimizers walk through memory as it comes.
    assert part.is_contiguous()
    assert part.untyped_storage().nbytes() == part.nbytes


def test_a_process_may_have_nothing(tensors: ShardedTensors) -> None:
    for spans in (((6, 6), (0, 8)), ((2, 2), (0, 8))):
        part = tensors.read("w", box(*spans))
        assert part.shape == (0, 8)
        assert part.dtype == WHOLE.dtype


def test_a_part_that_no_file_has(tmp_path: Path) -> None:
    file = tmp_path / "model-00000-of-00002.safetensors"
    save_file({"w": WHOLE[:2].clone()}, file, {PLACES: encode_places({"w": ((6, 8), (0, 0))})})
    with pytest.raises(IntegrityError, match=r"has only 16 elements of w \[6, 8\]"):
        ShardedTensors([file])["w"]
