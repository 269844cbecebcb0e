"""One pass over the bytes: what is written, what is hashed, and that no byte of it changes unseen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from hearth.errors import IntegrityError
from hearth.training.checkpoint.files import (
    MANIFEST,
    FileFacts,
    Manifest,
    WriteCancelledError,
    encode_manifest,
    read_manifest,
    write_bytes,
    write_tensors,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def of_every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"plain.{dtype}": (torch.randn(3, 5) * 4).to(dtype) for dtype in DTYPES}
    tensors["transposed"] = torch.randn(4, 6).T
    tensors["every second"] = torch.arange(10)[::2]
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 7)
    tensors["nan and infinity"] = torch.tensor([float("nan"), float("inf"), -0.0])
    return tensors


def test_the_file_is_what_the_library_reads_and_writes(
    tmp_path: Path, of_every_kind: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "x.safetensors"
    facts = write_tensors(path, of_every_kind)
    raw = path.read_bytes()
    assert facts == FileFacts(hashlib.sha256(raw).hexdigest(), len(raw))
    loaded = load_file(path)
    assert set(loaded) == set(of_every_kind)
    for name, tensor in of_every_kind.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(loaded[name]) == bits(tensor), name
    same = {name: tensor for name, tensor in of_every_kind.items() if tensor.dtype == torch.float32}
    write_tensors(path, same)
    assert path.read_bytes() == save({name: tensor.contiguous() for name, tensor in same.items()})


def test_hash_over_many_chunks(tmp_path: Path) -> None:
    facts = write_tensors(tmp_path / "x", {"w": torch.randn(3_000_000)})  # three chunks, the last not full
    raw = (tmp_path / "x").read_bytes()
    assert facts == FileFacts(hashlib.sha256(raw).hexdigest(), len(raw))


def test_giving_up_between_two_chunks(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(WriteCancelledError):
        write_tensors(tmp_path / "x", {"w": torch.randn(3_000_000)}, lambda: next(asked))
    assert 0 < (tmp_path / "x").stat().st_size < 12_000_000


def test_no_byte_of_the_manifest_changes_unseen(tmp_path: Path) -> None:
    manifest = Manifest(
        12, {"model.safetensors": FileFacts("ab" * 32, 4096)}, {"eval_loss": 2.3456789012345678}
    )
    path = tmp_path / MANIFEST
    write_bytes(path, encode_manifest(manifest))
    assert read_manifest(tmp_path) == manifest
    raw = path.read_bytes()
    for position in range(len(raw)):
        for bit in (0, 5):  # bit 5 turns lower into upper case, and a line feed into an asterisk
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(IntegrityError):
                read_manifest(tmp_path)
    for damaged_raw in (raw[:-1], raw + b" ", b"", b"{}", b"[]", b"null"):
        path.write_bytes(damaged_raw)
        with pytest.raises(IntegrityError):
            read_manifest(tmp_path)


def test_a_format_of_another_time_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"format": 1, "step": 3, "files": {}}')
    with pytest.raises(IntegrityError, match="has format 1, not 2"):
        read_manifest(tmp_path)
