"""``train.reinforce.rewards``: which they are, and their weighted sum over answers."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from hearth.config.objectives import RewardSection
from hearth.errors import ConfigError, HearthError, TrainingError
from hearth.training.rollouts import verifiable
from hearth.training.rollouts.answers import Answer

ENTRY_POINTS = "hearth.rewards"
REWARDS: Mapping[str, Callable[..., Sequence[float]]] = {
    "exact_answer": verifiable.exact_answer,
    "matches": verifiable.matches,
    "contains": verifiable.contains,
    "length": verifiable.length,
    "format": verifiable.has_format,
}
_SHOWN = 300  # characters of a prompt or a completion in a message

RewardFunction = Callable[[Sequence[Answer]], Sequence[float]]


@dataclass(frozen=True)
class Reward:
    """A number for every answer; ``weight``: its factor in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0


class Rewards:
    """Several rewards and their weighted sum."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = list(rewards)

    def __call__(self, answers: Sequence[Answer]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum rewards_S in float64, and each reward by its name.

        Raises TrainingError, naming reward, prompt and completion, where a reward raises or gives something
        that is not a finite number for every answer.
        """
        found = {each.name: _judge(each, answers) for each in self.rewards}
        total_S = torch.zeros(len(answers), dtype=torch.float64)
        for each in self.rewards:
            total_S += each.weight * found[each.name]
        return total_S, found


def make_rewards(
    sections: Sequence[RewardSection], load_model: Callable[[str, Mapping[str, Any]], RewardFunction]
) -> Rewards:
    """The rewards of a recipe. ``load_model`` opens a learned one. Raises ConfigError for what cannot be."""
    if not sections:
        raise ConfigError(
            "train.reinforce.rewards is empty: nothing says what makes an answer good",
            fix=f"add one, such as `- name: exact_answer`; there are {', '.join(reward_names())}",
        )
    made: list[Reward] = []
    for section in sections:
        if section.model is not None:
            function, name = load_model(section.model, section.options), "model"
        else:
            assert section.name is not None
            function, name = _bound(section.name, section.options), section.name.replace(":", ".")
        same = sum(each.name.partition("#")[0] == name for each in made)
        made.append(Reward(f"{name}#{same + 1}" if same else name, function, section.weight))
    return Rewards(made)


def reward_names() -> list[str]:
    """Every reward with a name, ours first."""
    return list(dict.fromkeys([*REWARDS, *(point.name for point in entry_points(group=ENTRY_POINTS))]))


def find_reward(name: str) -> Callable[..., Sequence[float]]:
    """The function behind a name: one of ours, an entry point of ``hearth.rewards``, or ``module:function``.

    Raises ConfigError when there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    if ":" in name:
        found: Any = _imported(name)
    else:
        points = entry_points(group=ENTRY_POINTS, name=name)
        if not points:
            near = difflib.get_close_matches(name, reward_names(), n=1)
            raise ConfigError(
                f"the reward {name!r} is unknown",
                fix=f"did you mean {near[0]}?"
                if near
                else f"use one of {', '.join(reward_names())}, or module:function",
            )
        found = next(iter(points)).load()
    if not callable(found):
        raise ConfigError(f"the reward {name!r} is a {type(found).__name__}, not a function")
    function: Callable[..., Sequence[float]] = found
    return function


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise ConfigError(
            f"the reward {name!r}: importing {module} fails with {type(error).__name__}: {error}",
            fix="install the package, or put its folder into PYTHONPATH",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"the reward {name!r}: {module} has no {attribute}")
        found = getattr(found, part)
    return found


def _bound(name: str, options: Mapping[str, Any]) -> RewardFunction:
    function = find_reward(name)
    try:
        inspect.signature(function).bind([], **options)
    except TypeError as error:
        known = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        raise ConfigError(
            f"the reward {name!r} does not take the options {dict(options)}: {error}",
            fix=f"its options are {', '.join(known)}" if known else "leave them out",
        ) from error
    bound: RewardFunction = functools.partial(function, **options)
    if name in REWARDS:
        bound([])  # ours look at their options first
    return bound


def _judge(reward: Reward, answers: Sequence[Answer]) -> Tensor:
    """A finite number for every answer, as float64; TrainingError for anything else."""
    try:
        found = list(reward.function(answers))
    except Exception as error:
        culprit = _culprit(reward, answers)
        what = error.message if isinstance(error, HearthError) else f"{type(error).__name__}: {error}"
        raise TrainingError(
            f"the reward {reward.name!r} failed: {what}{_described(culprit)}",
            fix=getattr(error, "fix", None) or "correct the reward function; nothing was learnt in this step",
        ) from error
    if len(found) != len(answers):
        raise TrainingError(
            f"the reward {reward.name!r} gave {len(found)} numbers for {len(answers)} answers"
            f"{_described(answers[0] if answers else None)}",
            fix="return one number for every answer, in their order",
        )
    values = []
    for answer, value in zip(answers, found, strict=True):
        number = _number(value)
        if number is None:
            raise TrainingError(
                f"the reward {reward.name!r} gave {value!r}, which is no finite number{_described(answer)}",
                fix="return a finite number for every answer, such as 0.0 where it cannot be judged",
            )
        values.append(number)
    return torch.tensor(values, dtype=torch.float64)


def _number(value: object) -> float | None:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    if not isinstance(value, numbers.Real):
        return None
    return float(value) if math.isfinite(value) else None


def _culprit(reward: Reward, answers: Sequence[Answer]) -> Answer | None:
    """The first answer that makes the reward fail by itself, if one does."""
    for answer in answers:
        try:
            reward.function([answer])
        except Exception:  # noqa: BLE001 - whatever it raises, it is this answer
            return answer
    return None


def _described(answer: Answer | None) -> str:
    if answer is None:
        return ""
    return f"; prompt {_short(answer.prompt)!r}, completion {_short(answer.completion)!r}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
