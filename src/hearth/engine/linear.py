"""Linear layers whose weights are rearranged once, at load, for the CPU's matrix units (oneDNN).

oneDNN wants weights in a blocked layout; `torch.nn.Linear` converts them in every call. Converted once they
run at memory speed with few rows and use AMX or AVX-512 fully with many.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class PackedLinear(nn.Module):
    """A linear layer from a packed weight. Of its ``weight`` only type and shape can be read."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        # On the meta device: asking for dtype or shape works, computing with it fails loudly.
        self.weight = torch.empty_like(weight_NK, device="meta")
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous(), None)
        self.bias = None if bias_N is None else bias_N.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed weights are possible and worth it here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


@torch.no_grad()
def pack_linears(model: nn.Module) -> int:
    """Replace every plain linear layer by a packed one, in place; return how many.

    One layer at a time: its original weight is dropped before the next is packed, so that the peak is the
    model plus one layer. A weight tied to the embedding stays there, and its packed copy is extra.
    """
    num_packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                packed = PackedLinear(child.weight, child.bias)
            elif type(child) is Conv1D:
                packed = PackedLinear(_tensor(child.weight).t(), _tensor(child.bias))
            else:
                continue
            setattr(module, name, packed)
            del child
            num_packed += 1
    return num_packed


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
