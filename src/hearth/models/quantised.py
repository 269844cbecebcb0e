"""Linear layers whose frozen weights are kept in 8 or 4 bits, for training an adapter on top of them.

Blocks of 64 values share a scale, their largest magnitude. nf4: the 16 values of 4-bit NormalFloat, and
scales in 8 bits themselves (QLoRA, Dettmers et al. 2023, section 3 and appendix E). int8: 255 even steps.
The weights are made again for every use, in the type that the product is computed in, and thrown away.

Shape suffixes: N tokens, I inputs and O outputs of a layer, W weights (flat), K blocks, S values in a block.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["int8", "nf4"]

BLOCK = 64
SCALE_BLOCK = 256  # scales that share a scale of their own
# Quantiles of the normal distribution, with an exact zero (QLoRA, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_INT8_STEPS = 127
_TINY = torch.finfo(torch.float32).tiny


@functools.cache
def _nf4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The two values of every byte [256, 2], and the borders between neighbouring values [15]."""
    values = torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1), (values[1:] + values[:-1]) / 2


def _in_blocks(values: Tensor, block: int) -> Tensor:
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _steps(values_KS: Tensor, scale_K: Tensor) -> Tensor:
    shares = values_KS / scale_K.clamp(min=_TINY)[:, None]
    return (shares * _INT8_STEPS).round_().to(torch.int8)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer made of a plain one. ``weight`` makes the weights anew, in float32.

    PEFT takes it for the ``nn.Linear`` that it is. Writing into ``weight`` changes nothing: it is a result.
    """

    codes: Tensor
    scales: Tensor
    scale_scales: Tensor
    mean_scale: Tensor

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._quantise(linear.weight.detach().float())
        self.train(linear.training)

    @property
    def num_weights(self) -> int:
        """Weights that the layer stands for."""
        return self.in_features * self.out_features

    def _quantise(self, weight_OI: Tensor) -> None:
        blocks_KS = _in_blocks(weight_OI, BLOCK)
        scale_K = blocks_KS.abs().amax(1)
        empty = scale_K.new_zeros(0)
        if self.kind == "int8":
            buffers = (_steps(blocks_KS, scale_K), scale_K, empty, empty)
        else:
            mean = scale_K.mean()
            groups = _in_blocks(scale_K - mean, SCALE_BLOCK)
            widths = groups.abs().amax(1)
            steps = _steps(groups, widths)
            scale_K = _scales_of(steps, widths, mean)[: len(scale_K)]
            # The nearest values for the scales as they will be read, not for those that were lost.
            _, borders = _nf4_tables(weight_OI.device)
            shares_KS = blocks_KS / scale_K.clamp(min=_TINY)[:, None]
            codes = torch.bucketize(shares_KS, borders, out_int32=True).to(torch.uint8)
            buffers = (codes[:, ::2] << 4 | codes[:, 1::2], steps.view(-1)[: len(scale_K)], widths, mean)
        for name, buffer in zip(("codes", "scales", "scale_scales", "mean_scale"), buffers, strict=True):
            self.register_buffer(name, buffer.contiguous())

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [O, I] that codes and scales stand for, in a type of its own."""
        if self.kind == "int8":
            values_KS, scale_K = self.codes.float(), self.scales / _INT8_STEPS
        else:
            pairs, _ = _nf4_tables(self.codes.device)
            values_KS = pairs[self.codes.int()].view(-1, BLOCK)
            groups = _in_blocks(self.scales, SCALE_BLOCK)
            scale_K = _scales_of(groups, self.scale_scales, self.mean_scale)[: len(values_KS)]
        flat = values_KS.mul_(scale_K.float()[:, None]).view(-1)[: self.num_weights]
        return flat.view(self.out_features, self.in_features).to(dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights [O, I] in float32, made anew."""
        return self.dequantised()

    def forward(self, input: Tensor) -> Tensor:
        """[.., O] of inputs [.., I], in autocast's type where it is on."""
        device = input.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        apply: Any = _FrozenMatmul.apply
        with torch.autocast(device, enabled=False):
            out: Tensor = apply(input.to(compute), self)
            return out if self.bias is None else out + self.bias.to(compute)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def _scales_of(steps: Tensor, widths: Tensor, mean: Tensor) -> Tensor:
    """Scales in float32, flat, padding at the end included."""
    return (steps.float() * (widths / _INT8_STEPS)[:, None] + mean).view(-1).clamp_(min=0.0)


class _FrozenMatmul(torch.autograd.Function):
    """input · weightᵀ. The weights are made again in the backward pass: nothing of them is kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.dequantised(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return grads[0] @ ctx.layer.dequantised(grads[0].dtype), None
