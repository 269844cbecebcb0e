"""AdamW whose moments take one byte a value each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hearth.training.optimizers.blockwise import BLOCK, dequantize, quantize

# Smaller weights (norms, biases) keep exact moments: they are few, and the most sensitive.
_SMALLEST = 4096
# Values worked on at a time, so that the unpacked moments of a large weight are never held at once.
_CHUNK = 1 << 20


class AdamW8bit(Optimizer):
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2022), in plain torch.

    Unlike the paper, the *root* of the second moment is stored: it spans half the powers of ten, so that a
    small value beside a large one is not rounded to zero, where the update would explode.
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
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_weight(_local(weight), _local(weight.grad), self.state[weight], group)

    def _step_weight(
        self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        if not state:
            state.update(empty_state(weight))
        state["step"] += 1
        step = int(state["step"])
        flat_weight, flat_grad = weight.view(-1), grad.reshape(-1)
        for start in range(0, weight.numel(), _CHUNK):
            values = slice(start, min(start + _CHUNK, weight.numel()))
            g = flat_grad[values].float()
            moment, root = _read(state, values)
            moment.lerp_(g, 1 - group["betas"][0])
            square = root.square_().lerp_(g.square(), 1 - group["betas"][1])
            root = square.sqrt_()
            _write(state, values, moment, root)
            denominator = root.div_(math.sqrt(1 - group["betas"][1] ** step)).add_(group["eps"])
            update = moment.div_(denominator)
            part = flat_weight[values]
            part.mul_(1 - group["lr"] * group["weight_decay"])
            part.add_(update.to(part.dtype), alpha=-group["lr"] / (1 - group["betas"][0] ** step))


def _local(tensor: Tensor) -> Tensor:
    """The part of a spread tensor (DTensor) that is here: moments never look across elements."""
    to_local = getattr(tensor, "to_local", None)
    local: Tensor = tensor if to_local is None else to_local()
    return local


def empty_state(weight: Tensor) -> dict[str, Tensor]:
    """The state before the first step."""
    step = torch.zeros((), dtype=torch.float32)
    if weight.numel() < _SMALLEST:
        exact = {name: torch.zeros(weight.numel(), device=weight.device) for name in ("exp_avg", "root")}
        return {"step": step, **exact}
    num_blocks = -(-weight.numel() // BLOCK)
    state = {"step": step}
    for name, signed in (("exp_avg", True), ("root", False)):
        state[name], _ = quantize(torch.zeros(weight.numel(), device=weight.device), signed=signed)
        state[f"{name}_scale"] = torch.zeros(num_blocks, device=weight.device)
    return state


def _read(state: dict[str, Tensor], values: slice) -> tuple[Tensor, Tensor]:
    if "root_scale" not in state:
        return state["exp_avg"][values].clone(), state["root"][values].clone()
    blocks = _blocks(values)
    moment = dequantize(state["exp_avg"][values], state["exp_avg_scale"][blocks], signed=True)
    root = dequantize(state["root"][values], state["root_scale"][blocks], signed=False)
    return moment, root


def _write(state: dict[str, Tensor], values: slice, moment: Tensor, root: Tensor) -> None:
    if "root_scale" not in state:
        state["exp_avg"][values], state["root"][values] = moment, root
        return
    blocks = _blocks(values)
    state["exp_avg"][values], state["exp_avg_scale"][blocks] = quantize(moment, signed=True)
    state["root"][values], state["root_scale"][blocks] = quantize(root, signed=False)


def _blocks(values: slice) -> slice:
    return slice(values.start // BLOCK, -(-values.stop // BLOCK))
