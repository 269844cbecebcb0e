"""Texts to be filled in: the rows of a step carry their epoch, and a resumed run reads the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hearth.config import Recipe
from hearth.data import Dataset, prepare_dataset
from hearth.training.batches import collate, describe_row, step_rows
from hearth.training.objectives import make_objective


def code_dataset(tmp_path: Path) -> tuple[Recipe, Dataset]:
    folder = tmp_path / "code"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4)
    recipe = Recipe.model_validate(
        {
            "data": {
                "sources": [{"path": str(folder)}],
                "fim": {"rate": 1.0},
                "sequence_length": 96,
                "validation_fraction": 0.2,
            },
            "tokenizer": {"vocab_size": 300},
        }
    )
    return recipe, prepare_dataset(recipe, tmp_path / "dataset")


def test_steps_number_rows_by_epoch() -> None:
    plain = [row for step in range(9) for row in step_rows(step, batch_size=4, seed=1, num_rows=10)]
    rows = [
        row
        for step in range(9)
        for row in step_rows(step, batch_size=4, seed=1, num_rows=10, changes_by_epoch=True)
    ]
    assert [row % 10 for row in rows] == plain
    assert [row // 10 for row in rows] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 6


def test_training_rows_are_rearranged_and_held_out_ones_are_not(tmp_path: Path) -> None:
    recipe, dataset = code_dataset(tmp_path)
    objective = make_objective(recipe)
    train, held_out = objective.rows(dataset, "train"), objective.rows(dataset, "validation")
    assert train is not None
    assert held_out is not None
    mark = dataset.tokenizer().special_ids["<|fim_middle|>"]
    size = len(train)
    first, next_epoch = (collate(train, [1, 1 + size]).input_ids_BT[row] for row in (0, 1))
    assert (first == mark).any()
    assert (next_epoch == mark).any()
    assert not np.array_equal(first.numpy(), next_epoch.numpy())
    assert not (collate(held_out, [0]).input_ids_BT == mark).any()
    # A row named in a message is found again from its number in any epoch.
    assert describe_row(train, 1 + size).partition(":")[2] == describe_row(train, 1).partition(":")[2]
