"""Lion: the sign of an interpolated momentum (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """One moment a weight instead of two; every element moves by the learning rate.

    c = β₁ m + (1 - β₁) g;  w ← w - lr (sign(c) + λ w);  m ← β₂ m + (1 - β₂) g.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                moment = state["exp_avg"]
                direction = moment.lerp(weight.grad, 1 - beta1).sign_()
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-group["lr"])
                moment.lerp_(weight.grad, 1 - beta2)
