"""Tensors in 8 bits: blocks with a scale each, and codes that are dense where values are small.

Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", sections 2 and 3. Shape suffixes:
N values (flat), K blocks, S values in a block.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


@functools.cache
def code_book(signed: bool) -> tuple[float, ...]:
    """The 256 values of dynamic tree quantization: per power of ten from 1e-6 to 1, evenly spaced fractions.

    Signed: 127 values on either side. Unsigned: 254 above zero. Both with 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = [0.1 + 0.9 * index / count for index in range(count + 1)]
        middles = [10.0 ** (exponent - 6) * (low + high) / 2 for low, high in itertools.pairwise(edges)]
        values += middles
        if signed:
            values += [-middle for middle in middles]
    assert len(values) == 256
    return tuple(sorted(values))


@functools.cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.tensor(code_book(signed), dtype=torch.float32, device=device)
    return codes, (codes[1:] + codes[:-1]) / 2


def quantize(values_N: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N], scale float32 [K]) of flat float32 values; the scale is the largest magnitude.

    An unsigned value above zero never becomes zero: it may be what another is divided by.
    """
    _, borders = _tables(signed, values_N.device)
    padding = -values_N.numel() % BLOCK
    blocks_KS = F.pad(values_N, (0, padding)).view(-1, BLOCK)
    scale_K = blocks_KS.abs().amax(1)
    shares_KS = blocks_KS / scale_K.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares_KS, borders, out_int32=True)
    if not signed:
        codes = codes.clamp_(min=1).masked_fill_(shares_KS == 0, 0)
    return codes.to(torch.uint8).view(-1)[: values_N.numel()], scale_K


def dequantize(codes_N: Tensor, scale_K: Tensor, *, signed: bool) -> Tensor:
    """The float32 values [N] that codes and scales stand for."""
    table, _ = _tables(signed, codes_N.device)
    values_N = table[codes_N.int()]
    return values_N.mul_(scale_K.repeat_interleave(BLOCK)[: codes_N.numel()])
