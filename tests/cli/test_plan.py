"""`hearth plan` as a user sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.parallel.planner import parse_bytes

Run = Callable[..., Any]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model:\n  size: 1B\n  context_length: 2048\ntokenizer:\n  vocab_size: 32000\n"
        "data:\n  sequence_length: 2048\ntrain:\n  batch_size: 256\n  micro_batch_size: 4\n"
    )
    return path


def test_a_plan_for_people(hearth: Run, recipe: Path) -> None:
    outcome = hearth("plan", recipe, "--gpus", 16, "--gpu-memory", "80GB", "--interconnect", "nvlink+ib",
                     "--price", 2.5, "--tokens", "20B")  # fmt: skip
    assert outcome.code == 0, outcome.err
    for text in (
        "16 x H100 SXM of 74.5 GiB",
        "memory of the fullest process",
        "optimizer",
        "why:",
        "below 7 B, where data parallelism is the rule",
        "days without failures; ",
        "of them, at the rate of Llama 3's report (goodput 9",
        "cost of 2e+10 tokens",
        "for the recipe:\nparallel:\n  data:",
    ):
        assert text in outcome.out


def test_a_plan_for_scripts(hearth: Run, recipe: Path) -> None:
    figures = hearth("plan", recipe, "--gpus", 8, "--json", "train.optimizer=lion").json
    assert figures["model"]["parameters"] == pytest.approx(1e9, rel=0.03)
    assert figures["chosen"]["memory"]["total"] <= 0.95 * 80e9
    assert figures["chosen"]["parallel"]["data"] * figures["chosen"]["parallel"].get("shard", 1) == 8
    assert len(figures["best"]) == min(5, figures["fitting"])
    assert figures["not_counted"] is None


def test_the_recipe_as_it_stands(hearth: Run, recipe: Path) -> None:
    fitting = hearth("plan", recipe, "--gpus", 8, "--json", "train.micro_batch_size=1").json["as_it_stands"]
    assert fitting["fits"]
    assert "it fits with" in fitting["summary"]
    tight = hearth(
        "plan", recipe, "--gpus", 8, "--gpu-memory", "24GB", "parallel.data=8", "train.micro_batch_size=32"
    )
    assert tight.code == 0, tight.err
    assert "as the recipe stands: this run does not fit" in tight.out
    assert "fix: " in tight.out
    other = hearth("plan", recipe, "--gpus", 8, "parallel.data=4")
    assert "as the recipe stands: parallel asks for" in other.out


def test_a_plan_for_this_processor(hearth: Run, recipe: Path) -> None:
    outcome = hearth(
        "plan",
        recipe,
        "--gpu",
        "cpu",
        "--json",
        "model.size=1M",
        "data.sequence_length=128",
        "tokenizer.vocab_size=512",
    )
    assert outcome.json["cluster"]["device"] == "this CPU"
    assert outcome.json["chosen"]["step_seconds"] > 0


def test_what_is_not_counted_is_said(hearth: Run, recipe: Path) -> None:
    outcome = hearth("plan", recipe, "--gpus", 8, "train.objective=grpo")
    assert outcome.code == 0
    assert "rollouts" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", 12), "no multiple of the 8"),
        (("--gpu", "abacus"), "'abacus' is unknown"),
        (("--gpu-memory", "much"), "no amount of memory"),
        (("--interconnect", "nvlink+pigeon"), "'pigeon' is no wire"),
        (("--price", -1), "negative"),
        (("--tokens", "-5"), "--tokens '-5' is no number of tokens"),
        (("--gpus-per-node", 0), "--gpus-per-node"),
        (("--gpu", "cpu", "--interconnect", "ib"), "say nothing of --gpu cpu"),
        (("--gpus", 64, "train.batch_size=4"), "cannot be divided"),
        (("--gpus", 1, "--gpu-memory", "2GB"), "do not fit 1 x 1.9 GiB"),
        (("model.size=banana",), "not a number of parameters"),
    ],
)
def test_bad_input_is_refused(hearth: Run, recipe: Path, arguments: tuple[object, ...], message: str) -> None:
    outcome = hearth("plan", recipe, *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.out == ""


def test_amounts_of_memory() -> None:
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("74.5 GiB") == int(74.5 * 2**30)
