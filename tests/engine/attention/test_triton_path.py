"""The Triton kernels against plain attention in float64: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from hearth.engine.attention import triton_path
from hearth.engine.attention.layer import LayerSpec, Pool
from hearth.engine.attention.step import StepContext
from hearth.engine.attention.triton_path import TritonLayer, cut, num_splits
from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request

pytest.importorskip("triton", reason="triton is not installed")
BLOCK = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_attention(
    spec: LayerSpec, query_nHD: torch.Tensor, key_LKD: Any, value_LKE: Any, sinks_H: torch.Tensor | None
) -> torch.Tensor:
    """Every rule spelled out in float64; the queries are the last n positions. Returns [n, H, E]."""
    n, length = len(query_nHD), len(key_LKD)
    group = spec.num_heads // spec.num_kv_heads
    key_LHD, value_LHE = (x.double().repeat_interleave(group, dim=1) for x in (key_LKD, value_LKE))
    scores_HnL = torch.einsum("nhd,lhd->hnl", query_nHD.double(), key_LHD) * spec.scale
    if spec.softcap:
        scores_HnL = spec.softcap * torch.tanh(scores_HnL / spec.softcap)
    at_n, seen_L = torch.arange(length - n, length)[:, None], torch.arange(length)
    visible_nL = (seen_L <= at_n) & (seen_L > at_n - (spec.window or length))
    scores_HnL = scores_HnL.masked_fill(~visible_nL, -torch.inf)
    if sinks_H is not None:
        scores_HnL = torch.cat([scores_HnL, sinks_H.double()[:, None, None].expand(-1, n, 1)], dim=2)
    weights_HnL = torch.softmax(scores_HnL, dim=2)[..., :length]
    return torch.einsum("hnl,lhe->nhe", weights_HnL, value_LHE)


SPECS = {
    "grouped": LayerSpec(6, 2, 16, 16, 0.25),
    "one head each": LayerSpec(3, 3, 12, 12, 0.3),
    "window": LayerSpec(4, 2, 16, 16, 0.25, window=5),
    "softcap": LayerSpec(4, 2, 16, 16, 1.0, softcap=2.0),
    "sinks and window": LayerSpec(4, 2, 16, 16, 0.25, window=9, sinks=True),
    "sinks, softcap, other value dim": LayerSpec(4, 2, 24, 16, 0.25, softcap=3.0, sinks=True),
    "many heads of one": LayerSpec(20, 1, 16, 16, 0.25),
}
# Each sequence in two steps: some context, then a decode, a short chunk, a long chunk.
LENGTHS = [(0, 1), (5, 1), (8, 1), (70, 1), (3, 4), (16, 5), (0, 13), (11, 30)]


class Case:
    """A pool filled with NaN, sequences in shuffled blocks, and what they should see."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, stored: torch.dtype | None = None) -> None:
        self.spec = spec
        self.generator = torch.Generator().manual_seed(1)
        self.dtype = dtype
        self.step = StepContext(BLOCK, DEVICE)
        num_blocks, K = 60, spec.num_kv_heads

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            # What was never written must never be read; int8 has no NaN, but its scales have.
            filling = float("nan") if dtype.is_floating_point else 99
            return torch.full((num_blocks, K, BLOCK, *shape), filling, dtype=torch.float32).to(DEVICE, dtype)

        scales = [empty(dtype=torch.float32) for _ in range(2)] if stored else [None, None]
        self.pool = Pool(
            empty(spec.key_dim, dtype=stored or dtype), empty(spec.value_dim, dtype=stored or dtype), *scales
        )
        self.layer = TritonLayer(spec, self.pool, BLOCK)
        self.sinks = self.rand(spec.num_heads).float() if spec.sinks else None
        free = list(range(num_blocks))
        random.Random(1).shuffle(free)
        self.blocks = [tuple(free.pop() for _ in range(-(-(a + b) // BLOCK))) for a, b in LENGTHS]
        self.keys = [self.rand(a + b, K, spec.key_dim) for a, b in LENGTHS]
        self.values = [self.rand(a + b, K, spec.value_dim) for a, b in LENGTHS]

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def run(self, part: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One step: (what came out, what plain attention says) of each sequence."""
        rows, queries = [], []
        for i, (a, b) in enumerate(LENGTHS):
            start, count = (0, a) if part == 0 else (a, b)
            if count:
                request = Request(str(i), 0, [0] * (a + b), SamplingParams(), 1)
                rows.append(PlanRow(request, start, count, (0,) * count, self.blocks[i], 1, True))
                queries.append((i, self.rand(count, self.spec.num_heads, self.spec.key_dim)))
        self.step.fill(Plan(tuple(rows)))
        pairs = list(zip([i for i, _ in queries], [slice(row.start, row.end) for row in rows], strict=True))
        out = self.layer(
            self.step,
            torch.cat([query for _, query in queries]).to(DEVICE),
            torch.cat([self.keys[i][span] for i, span in pairs]).to(DEVICE),
            torch.cat([self.values[i][span] for i, span in pairs]).to(DEVICE),
            None if self.sinks is None else self.sinks.to(DEVICE),
        )
        got = out.cpu().double().split([len(query) for _, query in queries])
        expected = [
            plain_attention(self.spec, query, self.keys[i][: row.end], self.values[i][: row.end], self.sinks)
            for (i, query), row in zip(queries, rows, strict=True)
        ]
        return list(zip(got, expected, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_paged_attention_equals_plain_attention(name: str) -> None:
    case = Case(SPECS[name], torch.float32)
    for part in (0, 1):
        for got, expected in case.run(part):
            torch.testing.assert_close(got, expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    case = Case(SPECS["sinks and window"], dtype)
    for part in (0, 1):
        for got, expected in case.run(part):
            torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_stored_in_eight_bits_with_scales(stored: torch.dtype) -> None:
    """Each key and value is off by half a unit of the type at most: 1/16 of itself in e4m3, 1/254 of the
    largest of its head in int8."""
    case = Case(SPECS["grouped"], torch.float32, stored)
    case.values = [value * 100 for value in case.values]  # beyond what unscaled e4m3 could hold with accuracy
    errors = []
    for part in (0, 1):
        for got, expected in case.run(part):
            assert torch.isfinite(got).all()
            errors.append(((got - expected).norm() / expected.norm()).item())
    assert max(errors) < (0.08 if stored is torch.float8_e4m3fn else 0.02)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_a_number_that_is_none_stays_none() -> None:
    case = Case(SPECS["grouped"], torch.float32, torch.int8)
    case.values[1][2, 0, 3] = float("inf")  # of the context of the second sequence, first KV head
    case.run(0)
    (_, _), (broken, _), *others = case.run(1)
    assert not torch.isfinite(broken[:, :3]).any()
    assert torch.isfinite(broken[:, 3:]).all()
    assert all(torch.isfinite(got).all() for got, _ in others)


@pytest.mark.parametrize("splits", [1, 2, 32])
def test_the_number_of_splits_changes_nothing(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more splits than there is context."""
    monkeypatch.setattr(triton_path, "num_splits", lambda *_: splits)
    case = Case(SPECS["sinks and window"], torch.float32)
    for part in (0, 1):
        for got, expected in case.run(part):
            torch.testing.assert_close(got, expected, atol=3e-6, rtol=3e-6)


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
