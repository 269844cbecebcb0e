"""The paged kernels against plain attention written out in float64."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hearth.engine.attention import numba_path
from hearth.engine.attention.layer import LayerKV, LayerSpec
from hearth.engine.attention.numba_path import split
from hearth.engine.attention.step import StepContext
from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request

BLOCK = 8


def plain_attention(
    spec: LayerSpec,
    query_nHD: torch.Tensor,
    key_LKD: torch.Tensor,
    value_LKE: torch.Tensor,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Every rule spelled out, one head and one query at a time; returns [n, H, E]."""
    count, num_heads, _ = query_nHD.shape
    length = key_LKD.shape[0]
    out = torch.zeros(count, num_heads, spec.value_dim, dtype=torch.float64)
    for i, h in itertools.product(range(count), range(num_heads)):
        position = length - count + i
        first = max(0, position + 1 - spec.window) if spec.window else 0
        kv = h // (num_heads // spec.num_kv_heads)
        keys, values = (
            key_LKD[first : position + 1, kv].double(),
            value_LKE[first : position + 1, kv].double(),
        )
        scores = keys @ query_nHD[i, h].double() * spec.scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if sinks_H is not None:
            scores = torch.cat([scores, sinks_H[h : h + 1].double()])
        out[i, h] = torch.softmax(scores, 0)[: len(values)] @ values
    return out


SPECS = {
    "grouped": LayerSpec(6, 2, 16, 16, 0.25),
    "one head each": LayerSpec(3, 3, 12, 12, 0.3),
    "window": LayerSpec(4, 2, 16, 16, 0.25, window=5),
    "window of a block": LayerSpec(4, 1, 16, 16, 0.25, window=BLOCK),
    "softcap": LayerSpec(4, 2, 16, 16, 1.0, softcap=2.0),
    "sinks and window": LayerSpec(4, 2, 16, 16, 0.25, window=9, sinks=True),
    "value dim differs": LayerSpec(4, 2, 16, 24, 0.25),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_paged_attention_equals_plain_attention(name: str, numba: bool, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    generator = torch.Generator().manual_seed(1)
    rng = random.Random(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_blocks = 60
    step = StepContext(BLOCK, torch.device("cpu"))
    layer = LayerKV(spec, step, num_blocks, dtype, path="numba" if numba else "torch")
    layer.pool.keys.fill_(float("nan"))  # what was never written must never be read
    layer.pool.values.fill_(float("nan"))
    if not numba:
        layer.pool.keys.zero_()
        layer.pool.values.zero_()
    sinks = rand(spec.num_heads).float() if spec.sinks else None
    free = list(range(num_blocks))
    rng.shuffle(free)
    # Each sequence in two steps: some context, then a decode, a short chunk, a long chunk.
    lengths = [(0, 1), (5, 1), (8, 1), (23, 1), (3, 4), (16, 5), (0, 13), (0, 40), (11, 30), (40, 24)]
    blocks = [tuple(free.pop() for _ in range(-(-(a + b) // BLOCK))) for a, b in lengths]
    keys = [rand(a + b, spec.num_kv_heads, spec.key_dim) for a, b in lengths]
    values = [rand(a + b, spec.num_kv_heads, spec.value_dim) for a, b in lengths]
    requests = [Request(str(i), 0, [0] * (a + b), SamplingParams(), 1) for i, (a, b) in enumerate(lengths)]

    def run(part: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        rows, queries = [], []
        for i, (a, b) in enumerate(lengths):
            start, count = (0, a) if part == 0 else (a, b)
            if count:
                rows.append(PlanRow(requests[i], start, count, (0,) * count, blocks[i], 1, True))
                queries.append((i, rand(count, spec.num_heads, spec.key_dim)))
        step.fill(Plan(tuple(rows)))
        spans = [slice(row.start, row.end) for row in rows]
        out = layer.attend(
            torch.cat([q for _, q in queries]),
            torch.cat([keys[i][span] for (i, _), span in zip(queries, spans, strict=True)]),
            torch.cat([values[i][span] for (i, _), span in zip(queries, spans, strict=True)]),
            sinks,
        )
        pieces = out.split([len(q) for _, q in queries])
        return [(i, q, piece) for (i, q), piece in zip(queries, pieces, strict=True)]

    for part in (0, 1):
        for i, query, got in run(part):
            end = lengths[i][0] + (lengths[i][1] if part else 0)
            expected = plain_attention(spec, query, keys[i][:end], values[i][:end], sinks)
            tolerance = 2e-6 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_work_is_cut_into_runs_that_cover_it(num_threads: int) -> None:
    costs = np.random.default_rng(0).integers(1, 5000, 37)
    parts = split(costs, num_threads)
    assert [i for begin, end in parts for i in range(begin, end)] == list(range(37))
    assert len(parts) == num_threads
    assert max(costs[a:b].sum() for a, b in parts) <= costs.sum() / num_threads + 5000
    assert split(np.array([100, 100]), num_threads) == [(0, 2)]  # too little to wake anyone
    assert split(np.zeros(0, int), num_threads) == []


def test_threads_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["grouped"]
    outs = []
    for worth in (1, 10**9):
        monkeypatch.setattr(numba_path, "_WORTH_A_THREAD", worth)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        step = StepContext(BLOCK, torch.device("cpu"))
        layer = LayerKV(spec, step, 8, torch.float32, path="numba")
        generator = torch.Generator().manual_seed(0)
        rows = []
        for i, length in enumerate((9, 3, 14)):
            request = Request(str(i), 0, [0] * length, SamplingParams(), 1)
            rows.append(PlanRow(request, 0, length, (0,) * length, (2 * i, 2 * i + 1), 1, True))
        step.fill(Plan(tuple(rows)))
        shapes = ((26, 6, 16), (26, 2, 16), (26, 2, 16))
        outs.append(layer.attend(*(torch.randn(shape, generator=generator) for shape in shapes), None))
    assert torch.equal(*outs)


USE_KERNELS = """
import numpy as np
from hearth.engine.attention.numba_kernels import make_kernel
for dtype in (np.float32, np.uint16):
    kernel = make_kernel(4, 4, 1, 2, softcap=False, sinks=False, quantised=False)
    query, pool, out = np.zeros((1, 1, 4), dtype), np.zeros((1, 1, 2, 4), dtype), np.zeros((1, 1, 4), "f4")
    table, items, one = np.zeros((1, 1), "i4"), np.array([[0, 0, 1]], "i4"), np.float32(1)
    none = np.zeros((0, 0, 0), "f4")
    kernel(query, pool, pool, none, none, out, table, items, 0, 1, one, one, 0, np.zeros(0, "f4"))
print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def test_compiled_kernels_are_found_by_the_next_process(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", USE_KERNELS], env=environment, capture_output=True, text=True, check=True
        )
        found.append((done.stdout.split(), len(list(tmp_path.rglob("*.nbc")))))
    assert found == [(["0", "2"], 2), (["2", "0"], 2)]
