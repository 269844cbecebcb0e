"""The Triton kernels against plain attention in float64: on a GPU if there is one, else interpreted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hearth.engine.attention import triton_path
from hearth.engine.attention.layer import LayerSpec
from hearth.engine.attention.triton_path import cut, num_splits

pytest.importorskip("triton", reason="triton is not installed")
SPECS = {
    "grouped": LayerSpec(6, 2, 16, 16, 0.25),
    "one head each": LayerSpec(3, 3, 12, 12, 0.3),
    "window": LayerSpec(4, 2, 16, 16, 0.25, window=5),
    "softcap": LayerSpec(4, 2, 16, 16, 1.0, softcap=2.0),
    "sinks and window": LayerSpec(4, 2, 16, 16, 0.25, window=9, sinks=True),
    "sinks, softcap, other value dim": LayerSpec(4, 2, 24, 16, 0.25, softcap=3.0, sinks=True),
    "many heads of one": LayerSpec(20, 1, 16, 16, 0.25),
}
# (tokens stored before, tokens of the step). Few and short: the interpreter is slow.
LENGTHS = [(0, 1), (5, 1), (8, 1), (70, 1), (3, 4), (16, 5), (0, 13), (11, 30)]
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "lengths": LENGTHS,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}


def worst(batch: Any) -> float:
    """The largest error of any sequence in either step."""
    return max(error for part in (0, 1) for error in batch.errors(part).values())


@pytest.mark.parametrize("name", SPECS)
def test_paged_attention_equals_plain_attention(name: str, batch_of: Any) -> None:
    assert worst(batch_of(SPECS[name], "triton", torch.float32, **SETTINGS)) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, batch_of: Any) -> None:
    assert worst(batch_of(SPECS["sinks and window"], "triton", dtype, **SETTINGS)) < 2e-2


@pytest.mark.parametrize(("kv_dtype", "error"), [("fp8", 500.0), ("int8", 1.0)])
def test_stored_in_eight_bits_with_scales(kv_dtype: str, error: float, batch_of: Any) -> None:
    """Values of some thousands, far beyond e4m3, against what the stored numbers mean: only the arithmetic
    differs, and the rounding to e4m3, which the interpreter cuts: by up to an eighth of a value."""
    batch = batch_of(SPECS["grouped"], "triton", torch.float32, kv_dtype=kv_dtype, **SETTINGS)
    batch.values = [value * 1000 for value in batch.values]
    assert worst(batch) < error


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_a_number_that_is_none_stays_none(batch_of: Any) -> None:
    batch = batch_of(SPECS["grouped"], "triton", torch.float32, kv_dtype="int8", **SETTINGS)
    batch.values[1][2, 0, 3] = float("inf")  # of the context of the second sequence, first KV head
    everyone = list(range(len(LENGTHS)))
    batch.run(0, everyone)
    out = {i: got for i, (_, got) in batch.run(1, everyone).items()}
    assert not torch.isfinite(out[1][:, :3]).any()
    assert torch.isfinite(out[1][:, 3:]).all()
    assert all(torch.isfinite(got).all() for i, got in out.items() if i != 1)


@pytest.mark.parametrize("splits", [1, 2, 32])
def test_the_number_of_splits_changes_nothing(
    splits: int, monkeypatch: pytest.MonkeyPatch, batch_of: Any
) -> None:
    """Also more splits than there is context."""
    monkeypatch.setattr(triton_path, "num_splits", lambda *_: splits)
    assert worst(batch_of(SPECS["sinks and window"], "triton", torch.float32, **SETTINGS)) < 3e-6


def test_tiles_cover_every_token_once() -> None:
    counts = np.array([1, 16, 17, 3, 40])
    firsts = np.cumsum(counts) - counts
    starts = np.array([9, 0, 5, 100, 7])
    tiles = cut(np.arange(5), firsts, counts, starts, 16)
    covered = [(s, first + i, start + i) for s, first, n, start in tiles.tolist() for i in range(n)]
    assert covered == [
        (s, firsts[s] + i, starts[s] + i) for s, count in enumerate(counts) for i in range(count)
    ]
    assert tiles[:, 2].max() == 16


def test_splits_fill_the_processors_with_few_sequences_and_stop_with_many() -> None:
    assert num_splits(1, 8, 132) == 32
    assert num_splits(32, 8, 132) == 2
    assert num_splits(256, 8, 132) == 1
    for tiles in range(1, 300):
        splits = num_splits(tiles, 4, 132)
        assert splits & (splits - 1) == 0
        assert splits <= 2 * num_splits(tiles + 1, 4, 132)
