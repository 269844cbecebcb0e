"""Paged attention as Triton kernels, for GPUs.

One kernel attends for decoding and for chunks. A program takes a *tile*: a few neighbouring query tokens of
one sequence with all query heads of one KV head, so that each key and value is read once per KV head. Long
contexts of few sequences are cut into splits that run side by side and are merged by their log-sum-exp
(FlashDecoding; Dao and others, 2023); the softmax is online (FlashAttention-2; Dao, 2023, section 3.1).
Nothing here depends on numbers that the host knows: lengths are read on the device, so launches can be
captured in CUDA graphs.

With TRITON_INTERPRET=1 set before the import the kernels run on the CPU, slowly, for tests.

Legend: T query tokens of the step, N sequences, H query heads, K KV heads, G = H / K, D/E key and value dims,
S tokens in a block; names ending in P are padded to a power of two.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads annotations as its own: what is no constexpr has none.
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def store_kernel(
    new,  # [T, K, DIM], strided
    pool,  # [blocks, K, S, DIM]
    scales,  # [blocks, K, S] or anything if not SCALED
    slots,  # [T] block * S + offset; negative: padding, stored nowhere
    slot_stride,
    new_stride_t,
    new_stride_k,
    K: tl.constexpr,
    S: tl.constexpr,
    DIM: tl.constexpr,
    DIMP: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,  # what the scaled type can hold: 448 for e4m3, 127 for int8
    ROUNDS: tl.constexpr,  # int8 must be rounded by hand: the cast would cut
):
    """Write one head of one token into its slot, scaled to the range of the pool's type if SCALED."""
    t = tl.program_id(0)
    k = tl.program_id(1)
    slot = tl.load(slots + t * slot_stride).to(tl.int64)
    if slot >= 0:
        dim = tl.arange(0, DIMP)
        x = tl.load(new + t * new_stride_t + k * new_stride_k + dim, mask=dim < DIM, other=0.0)
        place = (slot // S * K + k) * S + slot % S
        if SCALED:
            x = x.to(tl.float32)
            # The second term is zero, or NaN if any number is NaN or infinite: then it must stay no number,
            # the engine's sign that a request went wrong.
            scale = tl.maximum(tl.max(tl.abs(x), 0) / LARGEST, 1e-12) + tl.sum(x * 0.0, 0)
            x = x / scale
            if ROUNDS:
                x = tl.floor(x + 0.5)
            x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
            tl.store(scales + place, scale)
        tl.store(pool + place * DIM + dim, x.to(pool.dtype.element_ty), mask=dim < DIM)


@triton.jit  # type: ignore[untyped-decorator]
def attend_kernel(
    query,  # [T, H, D], strided
    keys,  # [blocks, K, S, D]
    values,  # [blocks, K, S, E]
    key_scales,  # [blocks, K, S] or anything if not SCALED
    value_scales,
    sinks,  # [H] float32 or anything if not SINKS
    tables,  # [N, blocks of a sequence]
    tiles,  # [tiles, 4] sequence, first row in the step, rows, position of the first; -1: padding
    out,  # [T, H, E]
    partial,  # [tiles, QUERIES, H, SPLITS, E] float32 if SPLITS > 1
    partial_lse,  # [tiles, QUERIES, H, SPLITS] float32, base 2
    table_stride,
    tile_stride,
    query_stride_t,
    query_stride_h,
    scale,
    softcap,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    GP: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply matrices in float32: the interpreter takes bfloat16 for integers
):
    """Attend with one tile of queries over one split of its sequence's keys and values."""
    tile = tl.program_id(0)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    G: tl.constexpr = H // K
    sequence = tl.load(tiles + tile * tile_stride).to(tl.int64)
    first = tl.load(tiles + tile * tile_stride + 1).to(tl.int64)
    count = tl.load(tiles + tile * tile_stride + 2)
    start = tl.load(tiles + tile * tile_stride + 3)

    row = tl.arange(0, QUERIES * GP)
    token, head = row // GP, kv * G + row % GP
    is_row = (token < count) & (row % GP < G)
    dim, out_dim = tl.arange(0, DP), tl.arange(0, EP)
    query_at = (first + token) * query_stride_t + head * query_stride_h
    q = tl.load(
        query + query_at[:, None] + dim[None, :], mask=is_row[:, None] & (dim[None, :] < D), other=0.0
    )
    if UPCAST:
        q = q.to(tl.float32)
    position = start + token

    end = start + count
    begin = end * 0
    if WINDOW:
        begin = tl.maximum(0, start + 1 - window) // TILE * TILE
    span = tl.cdiv(tl.cdiv(end - begin, SPLITS), TILE) * TILE
    low = begin + split * span
    high = tl.minimum(end, low + span)

    best = tl.full([QUERIES * GP], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * GP], tl.float32)
    acc = tl.zeros([QUERIES * GP, EP], tl.float32)
    for at in range(low, high, TILE):
        seen = at + tl.arange(0, TILE)
        exists = seen < high
        block = tl.load(tables + sequence * table_stride + seen // S, mask=exists, other=0).to(tl.int64)
        place = (block * K + kv) * S + seen % S
        key = tl.load(
            keys + place[None, :] * D + dim[:, None], mask=exists[None, :] & (dim[:, None] < D), other=0.0
        )
        score = tl.dot(q, key.to(q.dtype), input_precision=PRECISION) * scale
        if SCALED:
            score = score * tl.load(key_scales + place, mask=exists, other=0.0)[None, :]
        if SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh
        visible = exists[None, :] & (seen[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (seen[None, :] > position[:, None] - window)
        score = tl.where(visible, score * LOG2E, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(score - shift[:, None])
        shrink = tl.exp2(best - shift)
        total = total * shrink + tl.sum(weight, 1)
        best = new_best
        value = tl.load(
            values + place[:, None] * E + out_dim[None, :],
            mask=exists[:, None] & (out_dim[None, :] < E),
            other=0.0,
        )
        if SCALED:
            weight = weight * tl.load(value_scales + place, mask=exists, other=0.0)[None, :]
        acc = acc * shrink[:, None] + tl.dot(weight.to(q.dtype), value.to(q.dtype), input_precision=PRECISION)

    is_out = is_row[:, None] & (out_dim[None, :] < E)
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=is_row, other=0.0) * LOG2E
            new_best = tl.maximum(best, sink)
            shrink = tl.exp2(best - new_best)
            total = total * shrink + tl.exp2(sink - new_best)
            acc = acc * shrink[:, None]
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_at = ((first + token) * H + head) * E
        tl.store(out + out_at[:, None] + out_dim[None, :], acc.to(out.dtype.element_ty), mask=is_out)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        lse = tl.where(total == 0.0, float("-inf"), best + tl.log2(tl.where(total == 0.0, 1.0, total)))
        part_at = ((tile * QUERIES + token).to(tl.int64) * H + head) * SPLITS + split
        tl.store(partial + part_at[:, None] * E + out_dim[None, :], acc, mask=is_out)
        tl.store(partial_lse + part_at, lse, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(
    partial,  # [tiles, QUERIES, H, SPLITS, E] float32
    partial_lse,  # [tiles, QUERIES, H, SPLITS] float32, base 2
    sinks,
    tiles,
    out,  # [T, H, E]
    tile_stride,
    H: tl.constexpr,
    QUERIES: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITSP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Join the splits of one query token and one head."""
    tile = tl.program_id(0) // QUERIES
    token = tl.program_id(0) % QUERIES
    head = tl.program_id(1)
    first = tl.load(tiles + tile * tile_stride + 1).to(tl.int64)
    count = tl.load(tiles + tile * tile_stride + 2)
    if token < count:
        split, dim = tl.arange(0, SPLITSP), tl.arange(0, EP)
        part_at = ((tile * QUERIES + token).to(tl.int64) * H + head) * SPLITS + split
        lse = tl.load(partial_lse + part_at, mask=split < SPLITS, other=float("-inf"))
        best = tl.max(lse, 0)
        if SINKS:
            sink = tl.load(sinks + head) * LOG2E
            best = tl.maximum(best, sink)
        shift = tl.where(best == float("-inf"), 0.0, best)
        weight = tl.exp2(lse - shift)
        total = tl.sum(weight, 0)
        if SINKS:
            total += tl.exp2(sink - shift)
        part = tl.load(
            partial + part_at[:, None] * E + dim[None, :],
            mask=(split[:, None] < SPLITS) & (dim[None, :] < E),
            other=0.0,
        )
        joined = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        out_at = ((first + token) * H + head) * E
        tl.store(out + out_at + dim, joined.to(out.dtype.element_ty), mask=dim < E)
