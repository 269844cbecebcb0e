"""Linear layers whose weights are rearranged, and if wanted quantised, once, at load.

On a CPU the compiled kernels (`hearth.engine.native`) multiply bfloat16 inputs; where there are none, and
for float32, oneDNN does, whose weights are in a blocked layout too. Quantised weights without the compiled
kernels run on torch's own operators: correct anywhere, on a GPU too, but not fast.

Legend: M rows of input, N outputs, K inputs of the layer.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hearth.engine import native
from hearth.engine.memory import MappedFiles
from hearth.engine.native import gemm as native_gemm
from hearth.engine.native.gemm import MAX_INPUTS, NativeWeight, pack_bf16, pack_int4, pack_int8
from hearth.engine.quantize import Int4Weight, Int8Weight, quantize_int4, quantize_int8

# Rows up to which torch's int8 operator beats a product with the dequantised weight.
_FEW_ROWS = 16
# With other numbers of inputs torch 2.13's int8 operator reads past the end of bfloat16 rows.
_SAFE_INPUTS = 16
_GROUP = 64
# The attribute of a linear layer that must stay as it is, because the model reads its weight itself.
KEEP = "_hearth_keep_linears"


class Product(Protocol):
    """x [..., K] -> [..., N], bias included."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor: ...


class PackedLinear(nn.Module):
    """A linear layer from a packed weight. Of its ``weight`` only type and shape can be read.

    name: the layer's qualified name in the model.
    native: the weight as the compiled kernels take it; None if another product is in use.
    tied_to: the name of the parameter that its weight is too, in a model whose weights are tied; else empty.
    transposed: whether the model itself holds its weight as [K, N].
    """

    def __init__(
        self,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None,
        *,
        weights: str = "auto",
        use_native: bool = True,
        name: str = "",
        tied_to: str = "",
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        # On the meta device: asking for dtype or shape works, computing with it fails loudly.
        self.weight = torch.empty_like(weight_NK, device="meta")
        self.name, self.tied_to, self.transposed = name, tied_to, transposed
        self.device = weight_NK.device
        self._weights, self._use_native = weights, use_native
        self.repack(weight_NK, bias_N)

    def repack(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        """Take other values, as tensors of the layer's own type and device."""
        self.bias = None if bias_N is None else bias_N.detach()
        self.product = _choose_product(weight_NK.detach(), self.bias, self._weights, self._use_native)
        self.native = self.product if isinstance(self.product, NativeWeight) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.multiply(x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, product={type(self.product).__name__}"
        )


def _choose_product(
    weight_NK: torch.Tensor, bias_N: torch.Tensor | None, weights: str, use_native: bool
) -> Product:
    if (
        weight_NK.device.type == "cpu"
        and weight_NK.dtype is torch.bfloat16
        and use_native
        and native.library()
    ):
        if weights == "auto" or weight_NK.shape[1] > MAX_INPUTS:
            return pack_bf16(weight_NK, bias_N)
        if weights == "int8":
            return pack_int8(native_gemm.quantize_int8(weight_NK), bias_N)
        return pack_int4(native_gemm.quantize_int4(weight_NK, _GROUP), bias_N)
    if weights == "int8":
        return TorchInt8(quantize_int8(weight_NK), bias_N, weight_NK.dtype)
    if weights == "int4":
        return TorchInt4(quantize_int4(weight_NK, _GROUP), bias_N, weight_NK.dtype)
    return OneDnn(weight_NK, bias_N)


class OneDnn:
    """oneDNN's blocked layout."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), None)
        self.bias = bias_N

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


class TorchInt8:
    """torch's operator for a few rows on a CPU; else the weight is dequantised in every call."""

    def __init__(self, weight: Int8Weight, bias_N: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.quantized, self.bias, self.dtype = weight, bias_N, dtype
        self._scale_N = weight.scale_N.to(dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows > _FEW_ROWS or x.device.type != "cpu" or x.shape[-1] % _SAFE_INPUTS:
            return F.linear(x, self.quantized.dequantize(self.dtype), self.bias)
        x_MK = x.reshape(rows, x.shape[-1]).contiguous()
        out: torch.Tensor = torch._weight_int8pack_mm(x_MK, self.quantized.codes_NK, self._scale_N)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if self.bias is None else out + self.bias


class TorchInt4:
    """torch's operator on a CPU, for shapes that it takes; else the weight is dequantised in every call."""

    def __init__(self, weight: Int4Weight, bias_N: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.bias, self.dtype, self.group = bias_N, dtype, weight.group
        self.quantized: Int4Weight | None = weight
        N, depth = weight.nibbles_NK.shape
        self._depth = depth
        if weight.nibbles_NK.device.type == "cpu" and N % 16 == 0:
            codes_NK = weight.nibbles_NK.to(torch.int32)
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
            step_NG, zero_NG = weight.step_and_zero()  # torch has weight = step * (nibble - 8) + zero
            both_GN2 = torch.stack([step_NG, zero_NG + 8 * step_NG], dim=-1).transpose(0, 1)
            self._scales = both_GN2.to(dtype).contiguous()
            self.quantized = None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantized is not None:
            return F.linear(x, self.quantized.dequantize(self.dtype), self.bias)
        x_MK = F.pad(x.reshape(-1, x.shape[-1]), (0, self._depth - x.shape[-1])).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_MK, self._packed, self.group, self._scales
        )
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if self.bias is None else out + self.bias


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing weights as they are is possible and worth it here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


@torch.no_grad()
def pack_linears(model: nn.Module, *, weights: str = "auto", use_native: bool = True) -> int:
    """Replace every plain linear layer by a packed one, in place; return how many.

    weights: "auto" as stored, "int8" or "int4". The output layer is never below int8: it decides between
        tokens directly, and costs most.

    One layer at a time: its original weight is dropped before the next is packed, so that the peak is the
    model plus one layer. A weight tied to the embedding stays there, and its packed copy is extra. Experts
    whose weights are stacked in one parameter are no linear layers, and stay as they are.
    """
    places = [  # holds no layer: each must go when it is replaced
        (module, name, f"{path}.{name}" if path else name, child is _head(model))
        for path, module in model.named_modules()
        for name, child in module.named_children()
        if type(child) in (nn.Linear, Conv1D) and not getattr(child, KEEP, False)
    ]
    names = _names_elsewhere(model, {path for _, _, path, _ in places})
    files = MappedFiles()
    for module, name, path, is_head in places:
        kind = "int8" if is_head and weights == "int4" else weights
        original = getattr(module, name)
        tied_to = names.get(id(original.weight), "")
        packed = _pack(original, weights=kind, use_native=use_native, name=path, tied_to=tied_to)
        setattr(module, name, packed)
        files.release(original.weight)
        del original
    return len(places)


def _names_elsewhere(model: nn.Module, packed: set[str]) -> dict[int, str]:
    """The names of parameters that stay, by identity: a weight tied to one of them has its name."""
    return {
        id(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[0] not in packed
    }


def _head(model: nn.Module) -> object:
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _pack(
    layer: nn.Linear | Conv1D, *, weights: str, use_native: bool, name: str, tied_to: str
) -> PackedLinear:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    transposed = type(layer) is Conv1D
    return PackedLinear(
        weight.t() if transposed else weight,
        bias,
        weights=weights,
        use_native=use_native,
        name=name,
        tied_to=tied_to,
        transposed=transposed,
    )
