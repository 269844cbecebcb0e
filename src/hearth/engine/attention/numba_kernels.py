"""Paged attention for the CPU in numba: reads every key and value once per KV head, and gathers nothing.

Layout of the pool: [block, kv_head, token, dim], float32, or bfloat16 seen as uint16. A bfloat16 is the
upper half of a float32, so widening is a 16-bit shift. The softmax is computed online, block by block
(Milakov and Gimelshein, arXiv 1805.02867), with the query heads of one KV head as rows of one tile.

Kernels are made per head size and per feature, so that loops have constant bounds and unused features cost
nothing; numba keeps the compiled code on disk (see `_cache`).

Legend: T query tokens of the step, N sequences, H query heads, K KV heads, G = H / K, D/E key and value dims,
B blocks of a sequence at most.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Reassociation lets LLVM vectorise the sums; infinities stay legal because masks are -inf.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
_NEGATIVE = np.float32(-1e30)


def _prepare_cache() -> bool:
    """Whether compiled kernels can be kept on disk; redirects numba to a private folder if it must."""
    if os.environ.get("NUMBA_CACHE_DIR") or os.access(Path(__file__).parent, os.W_OK):
        return True
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "hearth" / "numba"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(folder)
    except (OSError, RuntimeError):
        # Read-only home, as in many containers: recompiling each time is the price of a private folder.
        folder = Path(tempfile.mkdtemp(prefix="hearth-numba-"))
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    return True


_prepare_cache()
import numba  # noqa: E402 - numba reads its cache folder on import


@numba.njit(inline="always", fastmath=_FASTMATH)
def _exp(x: Any) -> Any:
    """e^x for x <= 0 within 2 ulp, without a branch or a call, so that loops over it vectorise (Cephes expf)."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(inline="always")
def _widen_f32(x: Any) -> Any:
    return x


@numba.njit(inline="always")
def _widen_bf16(x: Any) -> Any:
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


@functools.cache
def make_kernel(
    dim: int,
    value_dim: int,
    group: int,
    block: int,
    tile: int,
    *,
    bf16: bool,
    softcap: bool,
    sinks: bool,
    parallel: bool,
) -> Callable[..., None]:
    """Compile the kernel for these constants; ``tile`` query tokens of a sequence share one pass over its KV."""
    rows = tile * group
    widen = _widen_bf16 if bf16 else _widen_f32
    D, E, G, S, R, PARALLEL = dim, value_dim, group, block, rows, parallel

    def kernel(
        query: Any,  # [T, H, D]
        key_pool: Any,  # [blocks, K, S, D]
        value_pool: Any,  # [blocks, K, S, E]
        out: Any,  # float32 [T, H, E]
        tables: Any,  # int32 [N, B]
        items: Any,  # int32 [num_items, 3]: sequence, first query token, number of query tokens <= tile
        lengths: Any,  # int32 [num_items]: context length up to and including the item's first query token
        scale: Any,
        cap: Any,
        window: Any,  # tokens that a query sees, itself included; 0 = all
        sink: Any,  # float32 [H] or [0]
    ) -> None:
        _ = PARALLEL  # numba's disk cache tells kernels apart by what they close over, not by their options
        num_kv_heads = key_pool.shape[1]
        for work in numba.prange(items.shape[0] * num_kv_heads):
            item = work // num_kv_heads
            h = work - item * num_kv_heads
            sequence = items[item, 0]
            first = items[item, 1]
            num_rows = items[item, 2] * G
            q = np.empty((R, D), np.float32)
            acc = np.zeros((R, E), np.float32)
            scores = np.empty((R, S), np.float32)
            top = np.full(R, _NEGATIVE, np.float32)
            total = np.zeros(R, np.float32)
            wide = np.empty(max(D, E), np.float32)
            for r in range(num_rows):
                t = first + r // G
                head = h * G + r % G
                for d in range(D):
                    q[r, d] = widen(query[t, head, d]) * scale
            length = lengths[item]
            last = length + items[item, 2] - 1  # context length of the item's last query token
            begin = 0
            if window > 0:
                begin = max(0, length - window)
            for b in range(begin // S, (last + S - 1) // S):
                page = tables[sequence, b]
                base = b * S
                count = min(S, last - base)
                for j in range(count):
                    for d in range(D):
                        wide[d] = widen(key_pool[page, h, j, d])
                    for r in range(num_rows):
                        s = np.float32(0.0)
                        for d in range(D):
                            s += q[r, d] * wide[d]
                        scores[r, j] = s
                for r in range(num_rows):
                    visible = length + r // G  # this row sees positions < visible
                    low = 0
                    if window > 0:
                        low = visible - window
                    best = top[r]
                    for j in range(count):
                        s = scores[r, j]
                        if softcap:
                            s = cap * np.float32(np.tanh(s / cap))
                        position = base + j
                        if position >= visible or position < low:
                            s = _NEGATIVE
                        scores[r, j] = s
                        best = max(best, s)
                    shrink = _exp(top[r] - best)
                    top[r] = best
                    part = np.float32(0.0)
                    for j in range(count):
                        p = np.float32(0.0)
                        if scores[r, j] > _NEGATIVE:
                            p = _exp(scores[r, j] - best)
                        scores[r, j] = p
                        part += p
                    total[r] = total[r] * shrink + part
                    for e in range(E):
                        acc[r, e] *= shrink
                for j in range(count):
                    for e in range(E):
                        wide[e] = widen(value_pool[page, h, j, e])
                    for r in range(num_rows):
                        p = scores[r, j]
                        for e in range(E):
                            acc[r, e] += p * wide[e]
            for r in range(num_rows):
                head = h * G + r % G
                denominator = total[r]
                if sinks:
                    # A sink is one more logit that takes probability and gives nothing.
                    s = sink[head]
                    best = max(top[r], s)
                    denominator = total[r] * _exp(top[r] - best) + _exp(s - best)
                    for e in range(E):
                        acc[r, e] *= _exp(top[r] - best)
                inverse = np.float32(1.0) / denominator
                for e in range(E):
                    out[first + r // G, head, e] = acc[r, e] * inverse

    compiled: Callable[..., None] = numba.njit(
        kernel, fastmath=_FASTMATH, parallel=parallel, nogil=True, cache=True, error_model="numpy"
    )
    return compiled


@functools.cache
def make_writer(*, parallel: bool) -> Callable[..., None]:
    """A kernel that puts the step's keys and values into their slots of the pool."""

    PARALLEL = parallel

    def write(key: Any, value: Any, key_pool: Any, value_pool: Any, slots: Any) -> None:
        _ = PARALLEL
        block = key_pool.shape[2]
        for t in numba.prange(key.shape[0]):
            page = slots[t] // block
            j = slots[t] - page * block
            for h in range(key.shape[1]):
                for d in range(key.shape[2]):
                    key_pool[page, h, j, d] = key[t, h, d]
                for d in range(value.shape[2]):
                    value_pool[page, h, j, d] = value[t, h, d]

    compiled: Callable[..., None] = numba.njit(write, parallel=parallel, nogil=True, cache=True)
    return compiled


def set_num_threads(num_threads: int) -> None:
    """Let the kernels use this many threads, as torch does."""
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
