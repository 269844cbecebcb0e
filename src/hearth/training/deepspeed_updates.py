"""`Updates` for weights that DeepSpeed shares out: the same interface, DeepSpeed's work."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from torch import Tensor

from hearth.errors import ConfigError, IntegrityError
from hearth.parallel.deepspeed import DeepSpeedModule
from hearth.training.optimizers import build_optimizer, set_learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hearth.config.recipe import TrainSection
    from hearth.training.checkpoint import Stateful
    from hearth.training.optimizers.groups import Settings

_OBJECTIVES = ("pretrain", "sft")  # others run copies of the model, or run it outside of the engine


class DeepSpeedUpdates:
    """AdamW in float32, or in bf16 autocast, of weights that only DeepSpeed knows how to find.

    ``saved_weights`` returns what of the model a checkpoint holds. Raises ConfigError for what DeepSpeed
    cannot do here.
    """

    scaler = None
    average = None

    def __init__(
        self,
        module: DeepSpeedModule,
        section: TrainSection,
        *,
        precision: str,
        settings: Mapping[str, Settings],
        saved_weights: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        _require_supported(section, precision)
        self._module, self._saved_weights = module, saved_weights
        module.start(build_optimizer(module.model, section, settings), grad_clip=section.grad_clip)
        self.optimizer = module.optimizer

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint must hold, the weights among it."""
        return {"model": _Weights(self._module, self._saved_weights), "optimizer": _States(self._module)}

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """There is no average."""
        return contextlib.nullcontext()

    def gradients(self) -> list[Tensor]:
        """None that are whole."""
        return []

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss."""
        self._module.backward(loss)

    def scale(self, factor: float) -> None:
        """Multiply the gradients of the step."""
        self._module.scale(factor)

    def norm(self) -> Tensor:
        """The norm of all gradients of the step."""
        return self._module.norm()

    def overflow(self, _loss: float, _norm: float) -> str:
        """Never: float16 is refused."""
        return ""

    def apply(self, rate: float, _norm: Tensor) -> None:
        """Clip and change the weights. ``rate``: the scheduled learning rate."""
        set_learning_rate(self.optimizer.optimizer, rate)
        self._module.update()

    def discard(self) -> None:
        """Forget the gradients of the step."""
        self._module.discard()


class _Weights:
    def __init__(self, module: DeepSpeedModule, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._module, self._weights = module, weights

    def state_tensors(self) -> dict[str, Tensor]:
        return self._module.whole_weights(self._weights())

    def load_state_tensors(self, tensors: Mapping[str, Tensor], /) -> None:
        weights = self._weights()
        own = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}
        saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if own != saved:
            name = min(name for name, _ in own.items() ^ saved.items())
            raise IntegrityError(f"the checkpoint holds the weights of another model: {name} differs")
        self._module.load_weights(weights, tensors)


class _States:
    def __init__(self, module: DeepSpeedModule) -> None:
        self._module = module

    def state_tensors(self) -> dict[str, Tensor]:
        return self._module.whole_states()

    def load_state_tensors(self, tensors: Mapping[str, Tensor], /) -> None:
        self._module.load_states(tensors)


def _require_supported(section: TrainSection, precision: str) -> None:
    refused = {
        "optimizer": (section.optimizer, section.optimizer == "adamw", "adamw"),
        "objective": (section.objective, section.objective in _OBJECTIVES, " or ".join(_OBJECTIVES)),
        "precision": (precision, precision in ("fp32", "bf16"), "fp32 or bf16"),
        "ema_decay": (section.ema_decay, not section.ema_decay, "0"),
        "compile": (section.compile, not section.compile, "false"),
    }
    for key, (value, possible, allowed) in refused.items():
        if not possible:
            raise ConfigError(
                f"train.{key} {value} cannot be had with parallel.engine deepspeed",
                fix=f"use {allowed}, or parallel.engine: native",
            )
