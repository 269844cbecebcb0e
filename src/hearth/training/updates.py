"""From the gradients of a step to new weights: scaling, the norm, clipping, the optimizer, the average."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hearth.parallel.deepspeed import DeepSpeedModule
from hearth.training.checkpoint import OptimizerState
from hearth.training.clipping import clip_by_norm, scale, total_norm
from hearth.training.deepspeed_updates import DeepSpeedUpdates
from hearth.training.ema import WeightAverage
from hearth.training.optimizers import build_optimizer, set_learning_rate, trainable_parameters
from hearth.training.scaler import LossScaler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hearth.config.recipe import TrainSection
    from hearth.training.checkpoint import Stateful
    from hearth.training.optimizers.groups import Settings


class Updates:
    """What ``train.optimizer``, ``grad_clip``, ``precision: fp16`` and ``ema_decay`` ask for.

    ``average`` is None without ``ema_decay``, ``scaler`` None but in float16.
    """

    def __init__(
        self,
        model: nn.Module,
        section: TrainSection,
        *,
        precision: str,
        settings: Mapping[str, Settings] | None = None,
    ) -> None:
        self._model = model
        self._grad_clip = section.grad_clip
        self.optimizer = build_optimizer(model, section, settings)
        self.scaler = LossScaler() if precision == "fp16" else None
        self.average = WeightAverage(model, section.ema_decay) if section.ema_decay else None

    def parts(self) -> dict[str, Stateful]:
        """What of it a checkpoint must hold."""
        parts: dict[str, Stateful] = {"optimizer": OptimizerState(self.optimizer, self._model)}
        if self.scaler is not None:
            parts["scaler"] = self.scaler
        if self.average is not None:
            parts["average"] = self.average
        return parts

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within, the model has the averaged weights, where there is an average."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def gradients(self) -> list[Tensor]:
        """Those that there are, in the order of the weights."""
        weights = trainable_parameters(self._model).values()
        return [weight.grad for weight in weights if weight.grad is not None]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss."""
        (loss if self.scaler is None else loss * self.scaler.factor).backward()  # type: ignore[no-untyped-call]

    def scale(self, factor: float) -> None:
        """Multiply the gradients of the step."""
        scale(self.gradients(), factor)

    def norm(self) -> Tensor:
        """The norm of all gradients of the step, after the factor of float16 was taken out of them."""
        gradients = self.gradients()
        if self.scaler is not None:
            self.scaler.unscale(gradients)
        return total_norm(gradients)

    def overflow(self, loss: float, norm: float) -> str:
        """Why this step must be skipped, where float16 gradients overflowed; "" otherwise. Learns from it."""
        if self.scaler is None or not math.isfinite(loss):
            return ""
        overflowed = not math.isfinite(norm)
        if overflowed and not self.scaler.may_skip():
            return ""
        self.scaler.update(overflowed=overflowed)
        return f"float16 gradients overflowed; the loss is scaled by {self.scaler.factor:g} now" * overflowed

    def apply(self, rate: float, norm: Tensor) -> None:
        """Clip and change the weights. ``rate``: the scheduled learning rate."""
        if self._grad_clip:
            clip_by_norm(self.gradients(), self._grad_clip, norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()

    def discard(self) -> None:
        """Forget the gradients of the step."""
        self.optimizer.zero_grad(set_to_none=True)


def make_updates(
    module: nn.Module | None,
    model: nn.Module,
    section: TrainSection,
    *,
    precision: str,
    settings: Mapping[str, Settings],
    saved_weights: Callable[[], Mapping[str, Tensor]],
) -> Updates | DeepSpeedUpdates:
    """Whoever changes the weights of ``model``, which ``module`` has spread; None in a pipeline."""
    if isinstance(module, DeepSpeedModule):
        return DeepSpeedUpdates(
            module, section, precision=precision, settings=settings, saved_weights=saved_weights
        )
    return Updates(model, section, precision=precision, settings=settings)
