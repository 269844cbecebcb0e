"""`hearth train --sweep`: what it prints, and what it refuses before torch is loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

RECIPE = """
model: {size: 100K, context_length: 64}
tokenizer: {vocab_size: 320}
data:
  sources: [{path: docs.jsonl, format: jsonl}]
  validation_fraction: 0.1
  sequence_length: 32
  num_workers: 1
train: {steps: 4, batch_size: 4, micro_batch_size: 2, precision: fp32, evaluate_every: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path, workspace_dir: Path) -> Path:
    rng = random.Random(1)
    words = ["the", "dog", "cat", "sees", "a", "red", "house", "and", "then"]
    lines = [json.dumps({"text": " ".join(rng.choice(words) for _ in range(30))}) for _ in range(80)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "tiny.yaml"


def sweep_file(folder: Path, text: str) -> str:
    (folder / "sweep.yaml").write_text(text)
    return str(folder / "sweep.yaml")


@pytest.mark.parametrize(
    ("text", "arguments", "match"),
    [
        ("parameters: {train.lerning_rate: {log: [1e-4, 1]}}", [], "did you mean train.learning_rate?"),
        ("parameters: {train.learning_rate: {log: [1, 1e-4]}}", [], "the first must be less"),
        (
            "parameters: {train.learning_rate: {log: [1e-4, 1]}}",
            ["--dry-run"],
            "neither --resume nor --dry-run",
        ),
        ("nonsense", [], "sweep.yaml"),
    ],
)
def test_bad_input(
    hearth: Callable[..., Any], recipe: Path, text: str, arguments: list[str], match: str
) -> None:
    done = hearth("train", str(recipe), "--sweep", sweep_file(recipe.parent, text), *arguments)
    assert done.code == 2
    assert match in done.err


def test_a_file_that_is_not_there(hearth: Callable[..., Any], recipe: Path) -> None:
    done = hearth("train", str(recipe), "--sweep", "absent.yaml")
    assert done.code == 2
    assert "absent.yaml" in done.err


def test_a_sweep(hearth: Callable[..., Any], recipe: Path) -> None:
    pytest.importorskip("optuna", reason="needs hearth-lm[sweep]")
    file = sweep_file(
        recipe.parent,
        "parameters: {train.learning_rate: {choice: [1e-2, 1e-5]}, train.weight_decay: {choice: [0.0]}}\n"
        "sampler: grid\nname: mine\n",
    )
    done = hearth("train", str(recipe), "--sweep", file, "--json", "--quiet")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["counts"] == {"finished": 2}
    assert found["best"]["params"] == {"train.learning_rate": 1e-2, "train.weight_decay": 0.0}
    assert "learning_rate: 0.01" in Path(found["best_recipe"]).read_text()
    picture = ElementTree.parse(found["plot"]).getroot()  # well-formed, one dot for a trial in each panel
    circles = [node for node in picture.iter() if node.tag.endswith("circle")]
    assert len(circles) == 2 * 3
    again = hearth("train", str(recipe), "--sweep", file)
    assert again.code == 0
    assert "Sweep mine" in again.out
    assert found["best"]["run"] in again.out
    assert "train the best: hearth train" in again.err
