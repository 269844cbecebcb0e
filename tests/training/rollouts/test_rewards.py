"""Verifiable rewards, the registry, and what becomes of rewards that fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from hearth.config.objectives import RewardSection
from hearth.errors import ConfigError, TrainingError
from hearth.training.rollouts.answers import Answer
from hearth.training.rollouts.rewards import Rewards, find_reward, make_rewards


def answers(*completions: str, **fields: Any) -> list[Answer]:
    return [Answer("the prompt", each, fields=fields) for each in completions]


def no_model(_name: str, _options: Mapping[str, Any]) -> Any:
    raise AssertionError("no model is asked for")


def make(*sections: dict[str, Any]) -> Rewards:
    return make_rewards([RewardSection.model_validate(each) for each in sections], no_model)


def judged(found: list[Answer], name: str, **options: Any) -> list[float]:
    return make({"name": name, "options": options})(found)[0].tolist()


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,072"


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("She sold more.\n#### 1072", 1.0),
        ("#### 1,072", 1.0),
        ("#### $1072.00.", 1.0),
        ("#### 5\nno, wait\n#### 1072", 1.0),
        ("that makes 1072.", 1.0),
        ("1072 of 2000", 0.0),
        ("#### 1072 clips", 0.0),
        ("#### 107", 0.0),
        ("I do not know", 0.0),
        ("", 0.0),
        ("-1072", 0.0),
    ],
)
def test_exact_answer_reads_final_numbers(completion: str, wanted: float) -> None:
    assert judged(answers(completion, answer=GSM8K), "exact_answer") == [wanted]


def test_a_number_may_begin_with_its_point() -> None:
    found = answers(".5", "#### .50", "it is $.5.", "-.5", "5", answer="0.5")
    assert judged(found, "exact_answer") == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert judged(answers(".5", answer="5"), "exact_answer") == [0.0]


def test_exact_answer_of_words_and_of_another_column() -> None:
    found = answers(" Paris. ", "paris", "Paris, France", capital="Paris")
    assert judged(found, "exact_answer", field="capital") == [1.0, 1.0, 0.0]
    assert judged(answers("it is 1/2", "0.50", answer=0.5), "exact_answer") == [0.0, 1.0]


def test_a_column_that_is_absent_is_named() -> None:
    with pytest.raises(
        TrainingError, match=r"'exact_answer' failed: the prompt has no column 'solution'; its"
    ):
        judged(answers("1", answer="1"), "exact_answer", field="solution")


def test_patterns_and_texts() -> None:
    found = answers("a\nb", "xa b", "ab", word="a b")
    assert judged(found, "matches", pattern="a.b") == [1.0, 1.0, 0.0]
    assert judged(found, "contains", text="b") == [1.0, 1.0, 1.0]
    assert judged(found, "contains", field="word") == [0.0, 1.0, 0.0]
    thinking = "<think>so\nso</think>\n<answer>4</answer>"
    assert judged(answers(f" {thinking}\n", f"{thinking} and more", "4"), "format") == [1.0, 0.0, 0.0]
    assert judged(answers("12", "1b"), "format", pattern=r"\d+") == [1.0, 0.0]


def test_length_counts_tokens_without_the_stop_token() -> None:
    of = [
        Answer("", "", token_ids=(5,) * 4 + (1,)),
        Answer("", "", token_ids=(5,) * 4, truncated=True),
        Answer("", "", token_ids=(5,) * 3, truncated=True),
        Answer("", "", token_ids=(5,) * 9, truncated=True),
    ]
    assert judged(of, "length", target=4) == [1.0, 1.0, 0.75, 0.0]


def test_the_sum_is_weighted_and_each_reward_has_a_name() -> None:
    rewards = make(
        {"name": "contains", "options": {"text": "a"}, "weight": 2.0},
        {"name": "contains", "options": {"text": "b"}, "weight": -0.5},
    )
    total, by_name = rewards(answers("a", "b", "ab", "c"))
    assert total.tolist() == [2.0, -0.5, 1.5, 0.0]
    assert total.dtype is torch.float64
    assert {name: each.tolist() for name, each in by_name.items()} == {
        "contains": [1.0, 0.0, 1.0, 0.0],
        "contains#2": [0.0, 1.0, 1.0, 0.0],
    }


def test_a_function_of_the_users_own(module_of: Callable[..., str]) -> None:
    def vowels(found: Sequence[Answer], *, each: float = 1.0) -> list[float]:
        return [each * sum(letter in "aeiou" for letter in answer.completion) for answer in found]

    name = f"{module_of(vowels=vowels)}:vowels"
    assert judged(answers("aia", "bb"), name, each=0.5) == [1.5, 0.0]
    with pytest.raises(
        ConfigError, match=r"does not take the options .*'much'.*\n  fix: its options are each"
    ):
        make({"name": name, "options": {"much": 1}})


def test_a_reward_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "zero"

        def load(self) -> Callable[..., list[float]]:
            return lambda found: [0.0] * len(found)

    def points(*, group: str, name: str = "zero") -> list[Point]:
        return [Point()] if (group, name) == ("hearth.rewards", "zero") else []

    monkeypatch.setattr("hearth.training.rollouts.rewards.entry_points", points)
    assert judged(answers("x"), "zero") == [0.0]
    with pytest.raises(ConfigError, match=r"'zeros' is unknown\n  fix: did you mean zero\?"):
        find_reward("zeros")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "exact_anser"}, "did you mean exact_answer"),
        ({"name": "nobody:knows"}, "importing nobody fails with ModuleNotFoundError"),
        ({"name": "math:pi"}, "is a float, not a function"),
        ({"name": "math:nothing"}, "math has no nothing"),
        ({"name": "matches"}, "missing a required"),
        ({"name": "matches", "options": {"pattern": "("}}, "no regular expression"),
        ({"name": "contains"}, "text or field"),
        ({"name": "length", "options": {"target": 0}}, "target 0"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_at_once(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(section)


def test_no_reward_at_all() -> None:
    with pytest.raises(ConfigError, match=r"rewards is empty.*\n  fix: add one, such as .*exact_answer"):
        make()


def failing(found: Sequence[Answer]) -> list[float]:
    if any(answer.completion == "bad" for answer in found):
        raise KeyError("nothing")
    return [0.0] * len(found)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (failing, r"failed: KeyError: 'nothing'; prompt 'the prompt', completion 'bad'"),
        (lambda found: [float("nan") if a.completion == "bad" else 1.0 for a in found], r"gave nan, .*'bad'"),
        (lambda found: [float("inf")] * len(found), r"gave inf, which is no finite number.*'good'"),
        (lambda found: ["1"] * len(found), r"gave '1', which is no finite number"),
        (lambda found: [None] * len(found), r"gave None, which"),
        (lambda found: [torch.ones(2)] * len(found), r"gave tensor"),
        (lambda _: [1.0], r"gave 1 numbers for 2 answers"),
        (lambda _: 1.0, r"failed: TypeError"),
    ],
)
def test_a_reward_that_fails_stops_with_prompt_and_completion(
    function: Any, message: str, module_of: Callable[..., str]
) -> None:
    rewards = make({"name": f"{module_of(judge=function)}:judge"})
    with pytest.raises(TrainingError, match=message):
        rewards(answers("good", "bad"))


def test_numbers_of_any_kind_are_numbers(module_of: Callable[..., str]) -> None:
    import numpy as np

    name = module_of(judge=lambda _: [True, np.float32(0.5), torch.tensor(2), 3])
    assert judged(answers(*"abcd"), f"{name}:judge") == [1.0, 0.5, 2.0, 3.0]


def test_a_long_completion_is_shortened_in_the_message(module_of: Callable[..., str]) -> None:
    rewards = make({"name": f"{module_of(judge=lambda _: [None])}:judge"})
    with pytest.raises(TrainingError) as caught:
        rewards(answers("x" * 5000))
    assert len(str(caught.value)) < 700
