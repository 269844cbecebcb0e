"""What an answer that began like this will be worth: a scalar head on the policy's own decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hearth.training.loss import unwrap

_NAME = "value_head"


class ValueHead(nn.Module):
    """A weight for each feature and a bias, both zero at first: nothing is expected of any answer.

    The weight is a vector, not a linear layer's matrix, so that nobody takes the head for a layer of the
    model: no adapter, packing or Muon is for it.
    """

    def __init__(self, num_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))  # FSDP has no scalars

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Values of hidden states, values_N."""
        return (hidden_ND.to(self.weight.dtype) * self.weight).sum(-1) + self.bias


def with_value_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with a head that trains along and that no saved model has."""
    inner: Any = model
    if not hasattr(inner, _NAME):
        weight = next(model.parameters())
        size = int(model.config.get_text_config().hidden_size)
        inner.value_head = ValueHead(size, dtype=weight.dtype, device=weight.device)
        own = {f"{_NAME}.{name}" for name, _ in inner.value_head.named_parameters()}
        inner._keys_to_ignore_on_save = {*(inner._keys_to_ignore_on_save or ()), *own}
    return model


def value_head_of(model: nn.Module) -> ValueHead | None:
    """The head of a model, if it has one."""
    found = getattr(unwrap(model), _NAME, None)
    return found if isinstance(found, ValueHead) else None
