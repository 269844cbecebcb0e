"""Paged attention for the CPU in numba: reads every key and value once per KV head, and gathers nothing.

Layout of the pool: [block, kv_head, token, dim], float32, bfloat16 seen as uint16, or int8 with scales. A
bfloat16 is the upper half of a float32, so widening is a 16-bit shift. The softmax is computed online, block
by block (Milakov and Gimelshein, arXiv 1805.02867), with the query heads of one KV head as rows of one tile.

Kernels are made per head size and per feature, so that loops have constant bounds and unused features cost
nothing; numba keeps the compiled code on disk (see `_cache`).

Legend: T query tokens of the step, N sequences, H query heads, K KV heads, G = H / K, D/E key and value dims,
B blocks of a sequence at most.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hearth.engine.caching import cache_folder

# Reassociation lets LLVM vectorise the sums; infinities stay legal because masks are -inf.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
_NEGATIVE = np.float32(-1e30)


def _prepare_cache() -> None:
    """Redirect numba to a folder of the user if compiled kernels cannot be kept beside this file."""
    if not os.environ.get("NUMBA_CACHE_DIR") and not os.access(Path(__file__).parent, os.W_OK):
        os.environ["NUMBA_CACHE_DIR"] = str(cache_folder("numba"))


_prepare_cache()
import numba  # noqa: E402 - numba reads its cache folder on import
import numba.extending  # noqa: E402


@numba.njit(inline="always", fastmath=_FASTMATH)
def _exp(x: Any) -> Any:
    """e^x for x <= 0 within 2 ulp, without branch or call, so that loops over it vectorise (Cephes expf)."""
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
def _widen_bf16(x: Any) -> Any:
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always", fastmath=_FASTMATH)
def _inverse_with_sink(top: Any, total: Any, sink: Any) -> Any:
    """1 / the softmax's sum; a sink is one more logit, which takes probability and gives nothing."""
    best = max(top, sink)
    shrink = _exp(top - best)
    return shrink / (total * shrink + _exp(sink - best))


def _widen(x: Any) -> Any:
    """The float32 of a number of the pool; what it does is decided by the type, in `_choose_widen`."""
    raise NotImplementedError("only for compiled code")


@numba.extending.overload(_widen, inline="always")
def _choose_widen(x: Any) -> Any:
    def same(x: Any) -> Any:
        return x

    def number(x: Any) -> Any:
        return np.float32(x)

    if x == numba.types.int8:
        return number
    return _widen_bf16.py_func if x == numba.types.uint16 else same


@functools.cache
def make_kernel(
    dim: int, value_dim: int, group: int, block: int, *, softcap: bool, sinks: bool, quantised: bool
) -> Callable[..., None]:
    """Compile the kernel for these constants.

    It releases the interpreter, so that threads can share its work. One unit of work is one KV head for one
    query token, and unit ``i * K + h`` is head ``h`` for token ``i``.

    What the kernel closes over must be plain numbers: numba finds compiled code on disk by their pickled
    value, and a compiled function pickles differently in every process.
    """
    D, E, G, S = dim, value_dim, group, block

    def kernel(
        query: Any,  # [T, H, D]
        key_pool: Any,  # [blocks, K, S, D]
        value_pool: Any,  # [blocks, K, S, E]
        key_scales: Any,  # float32 [blocks, K, S] of an int8 pool, or [0, 0, 0]
        value_scales: Any,
        out: Any,  # float32 [T, H, E]
        tables: Any,  # int32 [N, B]
        items: Any,  # int32 [num_items, 3]: sequence, query token, positions it may see, itself included
        begin: Any,  # the units of work to do: begin … end - 1
        end: Any,
        scale: Any,
        cap: Any,
        window: Any,  # tokens that a query sees, itself included; 0 = all
        sink: Any,  # float32 [H] or [0]
    ) -> None:
        num_kv_heads = key_pool.shape[1]
        q = np.empty((G, D), np.float32)
        acc = np.empty((G, E), np.float32)
        scores = np.empty((G, S), np.float32)
        top = np.empty(G, np.float32)
        total = np.empty(G, np.float32)
        wide = np.empty(max(D, E), np.float32)
        for unit in range(begin, end):
            item = unit // num_kv_heads
            h = unit - item * num_kv_heads
            sequence, t, length = items[item, 0], items[item, 1], items[item, 2]
            first = max(0, length - window) if window > 0 else 0
            for g in range(G):
                for d in range(D):
                    q[g, d] = _widen(query[t, h * G + g, d]) * scale
                for e in range(E):
                    acc[g, e] = 0.0
                top[g] = _NEGATIVE
                total[g] = 0.0
            for b in range(first // S, (length + S - 1) // S):
                page = tables[sequence, b]
                low = max(0, first - b * S)
                high = min(S, length - b * S)
                for j in range(low, high):
                    for d in range(D):
                        wide[d] = _widen(key_pool[page, h, j, d])
                    for g in range(G):
                        s = np.float32(0.0)
                        for d in range(D):
                            s += q[g, d] * wide[d]
                        if quantised:
                            s *= key_scales[page, h, j]
                        scores[g, j] = s
                for g in range(G):
                    best = top[g]
                    for j in range(low, high):
                        if softcap:
                            scores[g, j] = cap * np.float32(np.tanh(scores[g, j] / cap))
                        best = max(best, scores[g, j])
                    shrink = _exp(top[g] - best)
                    top[g] = best
                    part = np.float32(0.0)
                    for j in range(low, high):
                        p = _exp(scores[g, j] - best)
                        scores[g, j] = p
                        part += p
                    total[g] = total[g] * shrink + part
                    for e in range(E):
                        acc[g, e] *= shrink
                for j in range(low, high):
                    for e in range(E):
                        wide[e] = _widen(value_pool[page, h, j, e])
                    for g in range(G):
                        p = scores[g, j]
                        if quantised:
                            p *= value_scales[page, h, j]
                        for e in range(E):
                            acc[g, e] += p * wide[e]
            for g in range(G):
                head = h * G + g
                inverse = np.float32(1.0) / total[g]
                if sinks:
                    inverse = _inverse_with_sink(top[g], total[g], sink[head])
                for e in range(E):
                    out[t, head, e] = acc[g, e] * inverse

    compiled: Callable[..., None] = numba.njit(
        kernel, fastmath=_FASTMATH, nogil=True, cache=True, error_model="numpy"
    )
    return compiled


@numba.njit(nogil=True, cache=True)
def write_slots(key: Any, value: Any, key_pool: Any, value_pool: Any, slots: Any) -> None:
    """Put the step's keys [T, K, D] and values [T, K, E] into their slots of the pool."""
    block = key_pool.shape[2]
    for t in range(key.shape[0]):
        page = slots[t] // block
        j = slots[t] - page * block
        for h in range(key.shape[1]):
            for d in range(key.shape[2]):
                key_pool[page, h, j, d] = key[t, h, d]
            for d in range(value.shape[2]):
                value_pool[page, h, j, d] = value[t, h, d]


@numba.njit(nogil=True, cache=True)
def write_slots_int8(
    key: Any, value: Any, key_pool: Any, value_pool: Any, key_scales: Any, value_scales: Any, slots: Any
) -> None:
    """`write_slots` to an int8 pool with scales [blocks, K, S]."""
    block = key_pool.shape[2]
    for t in range(key.shape[0]):
        page = slots[t] // block
        j = slots[t] - page * block
        for h in range(key.shape[1]):
            key_scales[page, h, j] = _quantise(key[t, h], key_pool[page, h, j])
            value_scales[page, h, j] = _quantise(value[t, h], value_pool[page, h, j])


@numba.njit
def _quantise(x: Any, out: Any) -> Any:
    """Symmetric, |q| <= 127; returns the scale. A row with NaN or infinity gets a scale that is no number."""
    most = np.float32(0.0)
    sound = True
    for d in range(x.shape[0]):
        v = np.abs(_widen(x[d]))
        sound = sound and np.isfinite(v)
        most = max(most, v)
    inverse = np.float32(0.0)
    if sound and most > 0:
        inverse = np.float32(127.0) / most
    for d in range(x.shape[0]):
        out[d] = np.int8(np.rint(_widen(x[d]) * inverse)) if sound else np.int8(0)
    return most / np.float32(127.0) if sound else np.float32(np.nan)


@numba.njit(inline="always")
def _narrow(x: Any) -> Any:
    """The bfloat16, as uint16, nearest to a finite float32; ties to even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(nogil=True, cache=True, fastmath=_FASTMATH)
def rms_norm_f32(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """out[T, D] = x / sqrt(mean(x^2) + eps) * weight."""
    for t in range(x.shape[0]):
        total = np.float32(0.0)
        for d in range(x.shape[1]):
            total += x[t, d] * x[t, d]
        inverse = np.float32(1.0) / np.sqrt(np.float32(total / np.float32(x.shape[1]) + np.float32(eps)))
        for d in range(x.shape[1]):
            out[t, d] = x[t, d] * inverse * weight[d]


@numba.njit(nogil=True, cache=True, fastmath=_FASTMATH)
def rms_norm_bf16(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """The same on bfloat16 seen as uint16; like transformers it rounds before and after the weight."""
    for t in range(x.shape[0]):
        total = np.float32(0.0)
        for d in range(x.shape[1]):
            v = _widen_bf16(x[t, d])
            total += v * v
        inverse = np.float32(1.0) / np.sqrt(np.float32(total / np.float32(x.shape[1]) + np.float32(eps)))
        for d in range(x.shape[1]):
            normed = _widen_bf16(_narrow(_widen_bf16(x[t, d]) * inverse))
            out[t, d] = _narrow(normed * _widen_bf16(weight[d]))
