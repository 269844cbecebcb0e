"""How the numba kernels share work and keep compiled code; what they compute is tested in test_paths."""

from __future__ import annotations

import os
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
    spec = LayerSpec(6, 2, 16, 16, 0.25)
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
