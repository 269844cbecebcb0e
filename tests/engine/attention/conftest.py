"""Ragged batches over shuffled blocks, and attention written out in float64 to compare with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hearth.engine.attention.layer import LayerKV, LayerSpec
from hearth.engine.attention.step import StepContext
from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request

# (tokens stored before, tokens of the step): decodes, short and long chunks, contexts that are cut in pieces.
LENGTHS = [
    (0, 1), (5, 1), (31, 1), (32, 1), (140, 1), (530, 1), (1027, 3), (3, 4),
    (16, 5), (0, 13), (0, 40), (11, 30), (40, 24), (250, 17), (0, 70), (515, 20),
]  # fmt: skip


def plain_attention(
    spec: LayerSpec,
    query_nHD: torch.Tensor,
    key_LKD: torch.Tensor,
    value_LKE: torch.Tensor,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Every rule spelled out in float64; returns [n, H, E]."""
    count, length, group = len(query_nHD), len(key_LKD), spec.num_heads // spec.num_kv_heads
    keys = key_LKD.double().repeat_interleave(group, 1).permute(1, 2, 0)
    scores = query_nHD.double().transpose(0, 1) @ keys * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    at_n, seen_L = torch.arange(length - count, length)[:, None], torch.arange(length)
    visible = seen_L <= at_n
    if spec.window:
        visible &= seen_L > at_n - spec.window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.double()[:, None, None].expand(-1, count, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, -1)[..., :length]
    return (weights @ value_LKE.double().repeat_interleave(group, 1).transpose(0, 1)).transpose(0, 1)


def stored_and_back(x_TKD: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """What a pool of 8-bit numbers with a scale for each token and head makes of x."""
    largest = 127.0 if stored is torch.int8 else torch.finfo(stored).max
    scale = x_TKD.double().abs().amax(-1, keepdim=True) / largest
    scaled = x_TKD.double() / scale
    return (scaled.round() if stored is torch.int8 else scaled.float().to(stored).double()) * scale


@dataclass
class Batch:
    """Sequences with their blocks, keys and values, and the layer that holds what was computed of them."""

    layer: LayerKV
    lengths: list[tuple[int, int]]
    blocks: list[tuple[int, ...]]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    sinks: torch.Tensor | None
    generator: torch.Generator
    dtype: torch.dtype

    def run(self, part: int, order: list[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Query and output of each sequence, for its stored tokens (part 0) or those of the step (1)."""
        spec, rows, queries = self.layer.spec, [], {}
        for i in order:
            start, count = (0, self.lengths[i][0]) if part == 0 else self.lengths[i]
            if count:
                request = Request(str(i), 0, [0], SamplingParams(), 1)
                rows.append(PlanRow(request, start, count, (0,) * count, self.blocks[i], 0, False))
                queries[i] = torch.randn(count, spec.num_heads, spec.key_dim, generator=self.generator).to(
                    self.dtype
                )
        spans = [slice(row.start, row.end) for row in rows]
        self.layer.step.fill(Plan(tuple(rows)))
        device = self.layer.step.device
        out = self.layer.attend(
            torch.cat(list(queries.values())).to(device),
            torch.cat([self.keys[i][span] for i, span in zip(queries, spans, strict=True)]).to(device),
            torch.cat([self.values[i][span] for i, span in zip(queries, spans, strict=True)]).to(device),
            None if self.sinks is None else self.sinks.to(device),
        )
        pieces = out.cpu().split([len(query) for query in queries.values()])
        return {i: (queries[i], piece) for i, piece in zip(queries, pieces, strict=True)}

    def errors(self, part: int, order: list[int] | None = None) -> dict[int, float]:
        """The largest absolute error of each sequence against float64 on what the pool means."""
        order = list(range(len(self.lengths))) if order is None else order
        worst = {}
        for i, (query, got) in self.run(part, order).items():
            end = self.lengths[i][0] + part * self.lengths[i][1]
            key, value = self.keys[i][:end], self.values[i][:end]
            if self.layer.pool.key_scales is not None:
                key, value = (stored_and_back(x, self.layer.pool.keys.dtype) for x in (key, value))
            expected = plain_attention(self.layer.spec, query, key, value, self.sinks)
            worst[i] = float((got.double() - expected).abs().max())
        return worst


def make_batch(
    spec: LayerSpec,
    path: str,
    dtype: torch.dtype,
    *,
    block_size: int = 32,
    kv_dtype: str = "auto",
    lengths: list[tuple[int, int]] | None = None,
    seed: int = 1,
    device: str = "cpu",
) -> Batch:
    lengths = LENGTHS if lengths is None else lengths
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    counts = [-(-(a + b) // block_size) for a, b in lengths]
    free = list(range(sum(counts) + 3))
    rng.shuffle(free)
    step = StepContext(block_size, torch.device(device))
    layer = LayerKV(spec, step, len(free), dtype, path=path, kv_dtype=kv_dtype)
    for part in layer.pool.parts:  # what was never written must never be read
        part.fill_(float("nan") if part.is_floating_point() else 77)
    return Batch(
        layer,
        lengths,
        [tuple(free.pop() for _ in range(count)) for count in counts],
        [rand(a + b, spec.num_kv_heads, spec.key_dim) for a, b in lengths],
        [rand(a + b, spec.num_kv_heads, spec.value_dim) for a, b in lengths],
        rand(spec.num_heads).float() if spec.sinks else None,
        generator,
        dtype,
    )


@pytest.fixture(scope="session")
def batch_of() -> Any:
    return make_batch
