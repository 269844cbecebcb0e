"""Which weights train, and with which rate and decay."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from hearth.config.objectives import ParameterGroupSection
from hearth.errors import ConfigError
from hearth.training.loss import unwrap


@dataclass(frozen=True)
class Settings:
    """What the optimizer does with one weight."""

    rate: float  # factor on the scheduled learning rate
    weight_decay: float
    hidden: bool  # a matrix between hidden layers: neither embedding nor output layer, norm or bias


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → weight for everything that trains, tied weights once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def match_rules(names: Sequence[str], rules: Sequence[ParameterGroupSection]) -> dict[str, int]:
    """Name of a weight → index of the first rule whose glob matches it; the others are absent.

    Raises ConfigError for a rule that decides nothing: a misspelled glob would otherwise train what it was
    to freeze.
    """
    found: dict[str, int] = {}
    for index, rule in enumerate(rules):
        matching = fnmatch.filter(names, rule.match)
        fresh = [name for name in matching if name not in found]
        key = f"train.parameter_groups[{index}].match {rule.match!r}"
        if not matching:
            raise ConfigError(f"{key} matches no weight", fix=_close(rule.match, names))
        if not fresh:
            raise ConfigError(
                f"{key} matches only weights that an earlier group has taken ({matching[0]}, …)",
                fix="the first match counts: put the narrower glob first",
            )
        found.update(dict.fromkeys(fresh, index))
    return found


def _close(pattern: str, names: Sequence[str]) -> str:
    literal = pattern.replace("*", "").strip(".")
    close = [name for name in names if literal and literal.lower() in name.lower()]
    close = close or get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
    return f"globs match whole names, such as {', '.join(close[:3])}"


def resolve_settings(
    model: nn.Module, rules: Sequence[ParameterGroupSection], *, weight_decay: float
) -> dict[str, Settings]:
    """What to do with each weight that trains. Freezes what the rules freeze.

    Without a rule of their own, matrices decay by ``weight_decay``; norms and biases do not decay.
    """
    weights = dict(model.named_parameters())
    matched = match_rules(list(weights), rules)
    for name, index in matched.items():
        if rules[index].freeze:
            weights[name].requires_grad_(False)
        elif not any(weights[n].requires_grad for n, i in matched.items() if i == index):
            raise ConfigError(
                f"train.parameter_groups[{index}].match {rules[index].match!r} matches only weights that do "
                f"not train ({name}, …)",
                fix="with an adapter only its own weights train: match those, such as `*.lora_B.*`",
            )
    outside = {id(weight) for weight in _input_and_output(model)}
    settings = {}
    for name, weight in trainable_parameters(model).items():
        rule = rules[matched[name]] if name in matched else None
        decay = weight_decay if weight.ndim >= 2 else 0.0
        if rule is not None and rule.weight_decay is not None:
            decay = rule.weight_decay
        rate = 1.0 if rule is None else rule.learning_rate_scale
        settings[name] = Settings(rate, decay, weight.ndim >= 2 and id(weight) not in outside)
    if not settings:
        raise ConfigError("no weight of the model trains", fix="unfreeze some, or add model.adapter")
    return settings


def _input_and_output(model: nn.Module) -> Iterable[Tensor]:
    """Weights of every embedding, and of the output layer."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
    get_head = getattr(unwrap(model), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    weight = getattr(head, "weight", None)  # another stage of a pipeline may have it
    if weight is not None:
        yield weight


def param_groups(model: nn.Module, settings: Mapping[str, Settings]) -> list[dict[str, Any]]:
    """Groups as torch.optim takes them, one for each combination of settings, in the order of the weights.

    Weights that are spread over different meshes are in different groups: fused kernels take them apart.
    """
    weights = trainable_parameters(model)
    groups: dict[tuple[Settings, int], dict[str, Any]] = {}
    for name, chosen in settings.items():
        if name not in weights:  # another stage of a pipeline has it
            continue
        group = groups.setdefault(
            (chosen, id(getattr(weights[name], "device_mesh", None))),
            {
                "params": [],
                "weight_decay": chosen.weight_decay,
                "rate": chosen.rate,
                "hidden": chosen.hidden,
            },
        )
        group["params"].append(weights[name])
    return list(groups.values())
