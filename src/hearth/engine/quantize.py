"""Weight-only quantisation of a linear layer: int8 per output channel, int4 per group of inputs.

The int4 codes are made so that they unpack to the int8 grid of their channel without floating point (gemm.h):
weight = scale[n] * (nibble * mul[n, g] + add[n, g] - 128). A group's step `mul` is thus 1 ... 17 steps of its
channel and its offset is a whole number of them; in exchange every group has an offset of its own, and the
product runs in integers. Step and offset are chosen to minimise the squared error.

Legend: N outputs, K inputs, G groups of a channel, S inputs of a group, R rows worked on at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUPS = (32, 64)
_MIDDLE = 128  # what the byte of a weight of zero holds
_LARGEST_MUL = 17  # 15 * 17 = 255
_CHUNK_ELEMENTS = 1 << 18  # worked on at a time: temporaries stay in the cache


@dataclass(frozen=True)
class Int8Weight:
    """weight = scale_N * codes_NK, codes -127 ... 127."""

    codes_NK: torch.Tensor  # int8
    scale_N: torch.Tensor  # float32

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes_NK.float() * self.scale_N[:, None]).to(dtype)


@dataclass(frozen=True)
class Int4Weight:
    """See the module. K is padded to a multiple of 64 with weights near zero; inputs there are 0."""

    nibbles_NK: torch.Tensor  # uint8, one nibble a byte
    mul_NG: torch.Tensor  # uint8
    add_NG: torch.Tensor  # uint8
    scale_N: torch.Tensor  # float32
    group: int
    num_inputs: int  # without the padding

    def step_and_zero(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [N, G] each, such that weight = step * nibble + zero."""
        scale_N1 = self.scale_N[:, None]
        return self.mul_NG * scale_N1, (self.add_NG.float() - _MIDDLE) * scale_N1

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        step_NG, zero_NG = self.step_and_zero()
        codes_NGS = self.nibbles_NK.view(len(self.nibbles_NK), -1, self.group)
        weight_NGS = torch.addcmul(zero_NG[:, :, None], codes_NGS.float(), step_NG[:, :, None])
        return weight_NGS.flatten(1)[:, : self.num_inputs].to(dtype)


@torch.no_grad()
def quantize_int8(weight_NK: torch.Tensor) -> Int8Weight:
    """Symmetric, one scale per output, so that the largest weight of a channel is exact up to rounding."""
    codes_NK = torch.empty_like(weight_NK, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale_N = torch.empty(len(weight_NK), device=weight_NK.device)
    for rows in _chunks(weight_NK):
        weight_RK = weight_NK[rows].float()
        top_R = weight_RK.abs().amax(1)
        scale_N[rows] = top_R / 127
        inverse_R = torch.where(top_R > 0, 127 / top_R, 0.0)
        codes_NK[rows] = (weight_RK * inverse_R[:, None]).round_().to(torch.int8)
    return Int8Weight(codes_NK, scale_N)


@torch.no_grad()
def quantize_int4(weight_NK: torch.Tensor, group: int = 64) -> Int4Weight:
    """Asymmetric, in groups of 32 or 64 inputs."""
    assert group in GROUPS
    N, K = weight_NK.shape
    depth = -(-K // 64) * 64
    nibbles_NK = torch.empty(N, depth, dtype=torch.uint8, device=weight_NK.device)
    mul_NG = nibbles_NK.new_empty(N, depth // group)
    add_NG = nibbles_NK.new_empty(N, depth // group)
    scale_N = torch.empty(N, device=weight_NK.device)
    for rows in _chunks(weight_NK):
        weight_RK = torch.nn.functional.pad(weight_NK[rows].float(), (0, depth - K))
        top_R = weight_RK.abs().amax(1)
        scale_N[rows] = top_R / 127
        inverse_R = torch.where(top_R > 0, 127 / top_R, 0.0)
        grid_RGS = (weight_RK * inverse_R[:, None]).view(len(weight_RK), -1, group)
        nibbles_RGS, mul_NG[rows], add_NG[rows] = _best_groups(grid_RGS)
        nibbles_NK[rows] = nibbles_RGS.flatten(1)
    return Int4Weight(nibbles_NK, mul_NG, add_NG, scale_N, group, K)


def _best_groups(grid_RGS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nibbles, mul and add of groups whose weights are given in steps of their channel, -127 ... 127.

    For each of a few steps around the one that just spans the group, the offset starts where both ends are
    clipped alike and is then moved to the mean that the nibbles leave over, twice.
    """
    low, high = grid_RGS.amin(-1, keepdim=True), grid_RGS.amax(-1, keepdim=True)
    spanning = ((high - low) / 15).ceil()
    best_error = torch.full_like(low, torch.inf)
    best_mul, best_add = torch.ones_like(low), torch.zeros_like(low)
    for shorter in range(4):
        mul = (spanning - shorter).clamp_(1, _LARGEST_MUL)
        add = ((low + high) / 2 - 7.5 * mul).round_()
        for refine in range(3):
            add = torch.minimum(add.clamp_(min=-_MIDDLE), 127 - 15 * mul)
            nibbles = ((grid_RGS - add) / mul).round_().clamp_(0, 15)
            left_over = grid_RGS - nibbles * mul - add
            error = left_over.square().sum(-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_mul, best_add = torch.where(better, mul, best_mul), torch.where(better, add, best_add)
            if refine < 2:
                add = (add + left_over.mean(-1, keepdim=True)).round_()
    nibbles = ((grid_RGS - best_add) / best_mul).round_().clamp_(0, 15)
    return (
        nibbles.to(torch.uint8),
        best_mul.squeeze(-1).to(torch.uint8),
        (best_add + _MIDDLE).squeeze(-1).to(torch.uint8),
    )


def _chunks(weight_NK: torch.Tensor) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // weight_NK.shape[1])
    return [slice(n, min(n + size, len(weight_NK))) for n in range(0, len(weight_NK), size)]
