"""Rewards that a rule decides. Each takes answers and its options, and gives a number for every answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from hearth.errors import ConfigError, DataError
from hearth.training.rollouts.answers import Answer

_FINAL = re.compile(r"####\s*(.+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_THINKING = r"<think>.+?</think>\s*<answer>.+?</answer>"


def exact_answer(answers: Sequence[Answer], *, field: str = "answer") -> list[float]:
    """1 where the final answer is that of the column ``field``, else 0.

    A final answer is what follows the last ``####``, as in gsm8k; without one the last number of the text if
    the right answer is a number, else the whole text. Numbers are compared as numbers: 1,200 = $1200.00.
    """
    return [float(_final(each.completion, _right(each, field)) == _right(each, field)) for each in answers]


def matches(answers: Sequence[Answer], *, pattern: str) -> list[float]:
    """1 where the regular expression occurs in the answer, else 0; ``.`` stands for line ends too."""
    compiled = _compile(pattern)
    return [float(compiled.search(each.completion) is not None) for each in answers]


def contains(answers: Sequence[Answer], *, text: str | None = None, field: str | None = None) -> list[float]:
    """1 where ``text``, or the text of the column ``field``, occurs in the answer, else 0."""
    if (text is None) == (field is None):
        raise ConfigError("the reward contains needs text or field, one of them")
    return [float((str(_value(each, field)) if field else str(text)) in each.completion) for each in answers]


def length(answers: Sequence[Answer], *, target: int) -> list[float]:
    """1 at ``target`` tokens, less by the share that there are more or fewer, never below 0."""
    if not isinstance(target, int) or target < 1:
        raise ConfigError(
            f"the reward length has target {target!r}", fix="give a number of tokens, 1 or more"
        )
    return [max(0.0, 1.0 - abs(each.num_tokens - target) / target) for each in answers]


def has_format(answers: Sequence[Answer], *, pattern: str = _THINKING) -> list[float]:
    """1 where the whole answer, but for spaces around it, is of the form of the regular expression, else 0.

    The form that is asked for when nothing is said: ``<think>…</think> <answer>…</answer>``.
    """
    compiled = _compile(pattern)
    return [float(compiled.fullmatch(each.completion.strip()) is not None) for each in answers]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


def _value(answer: Answer, field: str) -> Any:
    if field not in answer.fields:
        columns = ", ".join(map(repr, answer.fields)) or "none"
        raise DataError(
            f"the prompt has no column {field!r}; its columns are {columns}",
            fix="set the reward's option field to the column that holds the right answer",
        )
    return answer.fields[field]


def _right(answer: Answer, field: str) -> Decimal | str:
    text = str(_value(answer, field))
    marked = _FINAL.findall(text)
    return normalised(marked[-1] if marked else text)


def _final(completion: str, right: Decimal | str) -> Decimal | str | None:
    marked = _FINAL.findall(completion)
    if marked:
        return normalised(marked[-1])
    if isinstance(right, str):
        return normalised(completion)
    numbers = _NUMBER.findall(completion)
    return normalised(numbers[-1]) if numbers else None


def normalised(text: str) -> Decimal | str:
    """A number as a number, without signs of currency, percent and thousands; other text in lower case."""
    bare = text.strip().lstrip("$€£ ").rstrip("$€£%. ").replace(",", "").removeprefix("+").strip()
    try:
        number = Decimal(bare)
    except InvalidOperation:
        return " ".join(text.split()).rstrip(".").lower()
    return number if number.is_finite() else bare.lower()
