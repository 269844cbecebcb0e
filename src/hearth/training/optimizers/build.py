"""The optimizer that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Adafactor, AdamW, Optimizer

from hearth.config.recipe import TrainSection
from hearth.errors import ConfigError
from hearth.training.optimizers.adamw8bit import AdamW8bit
from hearth.training.optimizers.groups import Settings, param_groups, resolve_settings
from hearth.training.optimizers.lion import Lion
from hearth.training.optimizers.muon import MuonWithAdamW

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "adamw8bit")


def build_optimizer(
    model: nn.Module, section: TrainSection, settings: Mapping[str, Settings] | None = None
) -> Optimizer:
    """The optimizer of ``train.optimizer`` over the weights that train; freezes what the groups freeze.

    adamw: decoupled weight decay (Loshchilov & Hutter 2019), torch's fused kernel.
    adafactor: factored second moments (Shazeer & Stern 2018) as in torch: the learning rate is relative to
    the root mean square of a weight (at least 1e-3), so it is larger than AdamW's.
    lion: sign of an interpolated momentum (Chen et al. 2023, who use rates 3 to 10 times below AdamW's).
    muon: orthogonalised momentum for the matrices between hidden layers (Jordan 2024), scaled to the size
    of an AdamW update (Liu et al. 2025, section 2.2) so that one rate serves both; AdamW for the others.
    adamw8bit: AdamW with block-wise 8-bit moments (Dettmers et al. 2022).

    ``settings``: what `resolve_settings` found in the whole model, where ``model`` is a part of it.
    Raises ConfigError for an unknown name, for groups that match nothing, and when no weight trains.
    """
    if settings is None:
        settings = resolve_settings(model, section.parameter_groups, weight_decay=section.weight_decay)
    groups = param_groups(model, settings)
    rate, betas, eps = section.learning_rate, (section.beta1, section.beta2), section.epsilon
    match section.optimizer:
        case "adamw":
            return AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)
        case "adafactor":
            return Adafactor(groups, lr=rate)
        case "lion":
            return Lion(groups, lr=rate, betas=betas)
        case "muon":
            return MuonWithAdamW(groups, lr=rate, betas=betas, eps=eps)
        case "adamw8bit":
            return AdamW8bit(groups, lr=rate, betas=betas, eps=eps)
    raise ConfigError(
        f"train.optimizer {section.optimizer!r} is unknown", fix=f"use one of {', '.join(OPTIMIZERS)}"
    )


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the scheduled rate in every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)
