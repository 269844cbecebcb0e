"""Muon for hidden matrices and AdamW for everything else, as one optimizer.

Shape suffixes: E experts (absent for a plain matrix), R rows, C columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

# Coefficients of the quintic iteration, momentum and steps: Jordan 2024, "Muon: an optimizer for hidden
# layers in neural networks".
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_MOMENTUM = 0.95
_EPSILON = 1e-7
# Root mean square of an AdamW update (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
_ADAMW_RMS = 0.2


def orthogonalize(matrix_ERC: Tensor) -> Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ, for a matrix or a stack of them, in bfloat16.

    Newton-Schulz iteration; the singular values of the result lie between about 0.7 and 1.2.
    """
    tall = matrix_ERC.shape[-2] > matrix_ERC.shape[-1]
    x = matrix_ERC.to(torch.bfloat16)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(_STEPS):
        gram = x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=_B, alpha=_C)
        x = add_product(x, polynomial, x, beta=_A)
    return x.mT if tall else x


class MuonWithAdamW(Optimizer):
    """Groups with ``hidden`` true go to Muon, the others to torch's fused AdamW; one state, one list.

    torch.optim.Muon takes matrices only; the experts of a mixture are stacks of them, which are
    orthogonalised one by one here. A weight that is spread over devices (DTensor) is gathered for it.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "hidden": False}
        super().__init__(params, defaults)
        others = [group for group in self.param_groups if not group["hidden"]]
        self._adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=True) if others else None
        if self._adamw is not None:
            # The same dictionaries, so that a rate set here is the rate used there, and one state to save.
            self._adamw.param_groups = [_filled(group, self._adamw.defaults) for group in others]
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            if group["hidden"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._step_matrix(weight, group)
        if self._adamw is not None:
            self._adamw.step()

    def _step_matrix(self, weight: Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"]
        momentum.lerp_(weight.grad, 1 - _MOMENTUM)
        update = _orthogonalized(weight.grad.lerp(momentum, _MOMENTUM))  # Nesterov
        scale = _ADAMW_RMS * math.sqrt(max(weight.shape[-2:]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-group["lr"] * scale)


def _filled(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    for key, value in defaults.items():
        group.setdefault(key, value)
    return group


def _orthogonalized(update: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(update, DTensor):
        return orthogonalize(update)
    whole = orthogonalize(update.full_tensor())
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
