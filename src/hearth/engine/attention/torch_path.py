"""Paged attention in plain torch: gather, then scaled dot product. Runs on any device; the reference.

Legend: T query tokens of the step, n query tokens of one sequence, N decoding sequences, L positions seen,
H query heads, K KV heads, D/E key and value dims, B blocks of a sequence, S tokens in a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hearth.engine.attention.step import StepContext

if TYPE_CHECKING:
    from hearth.engine.attention.layer import LayerSpec, Pool


class TorchLayer:
    """One layer's pool, read by gathering."""

    def __init__(self, spec: LayerSpec, pool: Pool, block_size: int) -> None:
        del block_size  # the pool's shape says it
        self.spec, self.pool = spec, pool

    def __call__(
        self,
        step: StepContext,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend: sequences with one query token as one batch, the
        others one by one; returns [T, H, E]."""
        spec, pool = self.spec, self.pool
        store(step, pool, key_TKD, value_TKE)
        out_THE = query_THD.new_empty(query_THD.shape[0], spec.num_heads, spec.value_dim)
        decoding = [i for i, count in enumerate(step.counts) if count == 1]
        if decoding:
            rows = torch.tensor([step.firsts[i] for i in decoding], device=query_THD.device)
            out_THE[rows] = _decode(step, spec, pool, query_THD[rows], decoding, sinks_H)
        for i, count in enumerate(step.counts):
            if count > 1:
                span = slice(step.firsts[i], step.firsts[i] + count)
                out_THE[span] = prefill(step, spec, pool, query_THD[span], i, sinks_H)
        return out_THE


def store(step: StepContext, pool: Pool, key_TKD: torch.Tensor, value_TKE: torch.Tensor) -> None:
    """Write the step's keys and values into their slots."""
    blocks_T, offsets_T = step.slots()
    for content, stored, scales in (
        (key_TKD, pool.keys, pool.key_scales),
        (value_TKE, pool.values, pool.value_scales),
    ):
        if scales is not None:
            content, scales[blocks_T, :, offsets_T] = quantise(content)
        stored[blocks_T, :, offsets_T] = content


def quantise(x_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [T, K, D] and float32 scales [T, K]: x = scale * q, symmetric, |q| <= 127."""
    x_TKD = x_TKD.float()
    largest_TK = x_TKD.abs().amax(dim=2)
    # What is no number must stay none: it is the engine's sign that a request went wrong.
    inverse_TK = torch.where(torch.isfinite(largest_TK) & (largest_TK > 0), 127 / largest_TK, 0.0)
    q_TKD = (x_TKD.nan_to_num() * inverse_TK[..., None]).round().to(torch.int8)
    return q_TKD, largest_TK / 127


def _gather(
    stored: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Blocks as numbers of ``dtype``: [*blocks.shape, K, S, D]."""
    if scales is None:
        return stored[blocks]
    return (stored[blocks] * scales[blocks].unsqueeze(-1)).to(dtype)


def _decode(
    step: StepContext,
    spec: LayerSpec,
    pool: Pool,
    query_NHD: torch.Tensor,
    decoding: list[int],
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    device = query_NHD.device

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        width = max(-(-(step.starts[i] + 1) // step.block_size) for i in decoding)
        tables = torch.from_numpy(step.tables_np[decoding, :width]).to(device).long()
        return tables, torch.tensor([step.starts[i] + 1 for i in decoding], device=device)

    shared: tuple[torch.Tensor, torch.Tensor] = step.cached("decode", make)
    tables_NB, lengths_N = shared
    positions_L = torch.arange(tables_NB.shape[1] * step.block_size, device=device)
    visible_NL = positions_L < lengths_N[:, None]
    if spec.window:
        visible_NL &= positions_L >= lengths_N[:, None] - spec.window
    keys_NKLD = _gather(pool.keys, pool.key_scales, tables_NB, query_NHD.dtype).transpose(1, 2).flatten(2, 3)
    values_NKLE = (
        _gather(pool.values, pool.value_scales, tables_NB, query_NHD.dtype).transpose(1, 2).flatten(2, 3)
    )
    # Behind a sequence lies what the blocks held before; were it NaN, a weight of zero would not silence it.
    behind_NL = (positions_L >= lengths_N[:, None])[:, None, :, None]
    keys_NKLD, values_NKLE = keys_NKLD.masked_fill(behind_NL, 0), values_NKLE.masked_fill(behind_NL, 0)
    out = dot_product(
        spec, query_NHD.unsqueeze(2), keys_NKLD, values_NKLE, visible_NL[:, None, None], sinks_H
    )
    return out.squeeze(2)


def prefill(
    step: StepContext,
    spec: LayerSpec,
    pool: Pool,
    query_nHD: torch.Tensor,
    sequence: int,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Several query tokens of one sequence over its gathered keys and values; returns [n, H, E]."""
    start, count = step.starts[sequence], step.counts[sequence]
    length = start + count
    # Blocks wholly before the first query's window are never seen.
    first_block = max(0, start + 1 - spec.window) // step.block_size if spec.window else 0
    origin = first_block * step.block_size

    def table() -> torch.Tensor:
        last = -(-length // step.block_size)
        return torch.tensor(step.block_ids[sequence][first_block:last], device=query_nHD.device)

    def mask() -> torch.Tensor:
        seen_L = torch.arange(origin, length, device=query_nHD.device)
        at_n = torch.arange(start, length, device=query_nHD.device)[:, None]
        visible = seen_L <= at_n
        return visible & (seen_L > at_n - spec.window) if spec.window else visible

    table_B: torch.Tensor = step.cached(("table", sequence, first_block), table)
    keys_KLD = (
        _gather(pool.keys, pool.key_scales, table_B, query_nHD.dtype)
        .transpose(0, 1)
        .flatten(1, 2)[:, : length - origin]
    )
    values_KLE = (
        _gather(pool.values, pool.value_scales, table_B, query_nHD.dtype)
        .transpose(0, 1)
        .flatten(1, 2)[:, : length - origin]
    )
    query_HnD = query_nHD.transpose(0, 1)
    plain_causal = start == 0 and (not spec.window or spec.window >= length)
    visible_nL = None
    if not plain_causal or spec.softcap or spec.sinks:
        visible_nL = step.cached(("mask", sequence, spec.window), mask)
    out = dot_product(spec, query_HnD[None], keys_KLD[None], values_KLE[None], visible_nL, sinks_H)
    return out[0].transpose(0, 1)


def dot_product(
    spec: LayerSpec,
    query: torch.Tensor,  # [N, H, n, D]
    key: torch.Tensor,  # [N, K, L, D]
    value: torch.Tensor,  # [N, K, L, E]
    visible: torch.Tensor | None,  # broadcastable to [N, H, n, L]; None = causal
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(cap(q k * scale)) v over what is visible; torch's fused kernels where they know the rules."""
    grouped = spec.num_heads != spec.num_kv_heads
    if not spec.softcap and not spec.sinks:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None,
            scale=spec.scale,
            enable_gqa=grouped,
        )
    assert visible is not None
    group = spec.num_heads // spec.num_kv_heads
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    scores = (query.float() @ key.float().transpose(2, 3)) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return (weights @ value.float()).to(query.dtype)
