"""Linear layers whose three products are computed in float8.

Every tensor gets one scale, from its own largest magnitude in the very step (dynamic tensorwise scaling,
Micikevicius et al. 2022, "FP8 formats for deep learning"): activations and weights in e4m3, gradients in
e5m2, whose range is larger. Weights stay as they are, so checkpoints and exports do not change.

Shape suffixes: N tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hearth.errors import ConfigError
from hearth.training.loss import unwrap

# float8 products work on multiples of this.
_MULTIPLE = 16
# A router decides by small differences: its product stays in bfloat16, as in DeepSeek-V3 (2024, section 3.3).
ROUTERS = frozenset({"gate", "router"})


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in float8. Made by ``use_float8``, from a plain one in place."""

    def forward(self, input: Tensor) -> Tensor:
        """bfloat16 [.., O] of inputs [.., I]."""
        rows_NI = input.reshape(-1, self.in_features)
        apply: Any = _Float8Matmul.apply
        with torch.autocast(rows_NI.device.type, enabled=False):
            out_NO: Tensor = apply(rows_NI, self.weight)
            if self.bias is not None:
                out_NO = out_NO + self.bias.to(out_NO.dtype)
        return out_NO.view(*input.shape[:-1], self.out_features)


def use_float8(model: nn.Module) -> int:
    """Let the linear layers inside of the decoder layers multiply in float8; how many there are.

    Embeddings, the output layer and routers stay. Raises ConfigError when there is none to convert.
    """
    count = 0
    for layer in unwrap(model).modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for name, module in layer.named_modules():
            if type(module) is not nn.Linear or name.rpartition(".")[2] in ROUTERS:
                continue
            if module.in_features % _MULTIPLE or module.out_features % _MULTIPLE:
                continue
            module.__class__ = Float8Linear
            count += 1
    if not count:
        raise ConfigError(
            f"train.precision fp8: {type(unwrap(model)).__name__} has no linear layer in its decoder layers "
            f"whose sizes are multiples of {_MULTIPLE}",
            fix="use precision: bf16",
        )
    return count


class _Float8Matmul(torch.autograd.Function):
    """input · weightᵀ; both gradients are float8 products too."""

    @staticmethod
    def forward(ctx: Any, input_NI: Tensor, weight_OI: Tensor) -> Tensor:
        num_rows = input_NI.shape[0]
        # The number of tokens is what the weight's gradient sums over: a multiple there too, with zeros.
        input_NI = F.pad(input_NI, (0, 0, 0, -num_rows % _MULTIPLE))
        input8, input_scale = to_float8(input_NI, torch.float8_e4m3fn)
        weight8, weight_scale = to_float8(weight_OI, torch.float8_e4m3fn)
        ctx.save_for_backward(input8, input_scale, weight8, weight_scale)
        ctx.dtypes = input_NI.dtype, weight_OI.dtype
        return _product(input8, input_scale, weight8.t(), weight_scale, torch.bfloat16)[:num_rows]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        input8, input_scale, weight8, weight_scale = ctx.saved_tensors
        input_dtype, weight_dtype = ctx.dtypes
        num_rows = grads[0].shape[0]
        grad_NO = F.pad(grads[0], (0, 0, 0, input8.shape[0] - num_rows))
        grad8, grad_scale = to_float8(grad_NO, torch.float8_e5m2)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = _product(grad8, grad_scale, _columns(weight8), weight_scale, torch.bfloat16)
            grad_input = grad_input[:num_rows].to(input_dtype)
        if ctx.needs_input_grad[1]:
            rows8 = grad8.t().contiguous()
            grad_weight = _product(rows8, grad_scale, _columns(input8), input_scale, weight_dtype)
        return grad_input, grad_weight


def to_float8(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(float8 values, float32 scale) with values ≈ float8 · scale; the largest magnitude fills the range."""
    largest = torch.finfo(dtype).max
    scale = (values.abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (values.float() / scale).clamp(-largest, largest).to(dtype), scale


def _columns(matrix: Tensor) -> Tensor:
    """The same matrix, stored by columns, as the right factor of a float8 product must be."""
    return matrix.t().contiguous().t()


def _product(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    multiply: Any = torch._scaled_mm  # torch's name for it in every supported version
    result: Tensor = multiply(left, right, scale_a=left_scale, scale_b=right_scale, out_dtype=dtype)
    return result
