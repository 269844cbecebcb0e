"""The recipes of examples/recipes load, and those of several processes can be laid out over two."""

from __future__ import annotations

from pathlib import Path

import pytest

from hearth.config import load_recipe
from hearth.parallel.checks import check_micro_batches, check_settings
from hearth.parallel.layout import Layout

RECIPES = sorted((Path(__file__).resolve().parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads(path: Path) -> None:
    recipe = load_recipe(path, environ={}).recipe
    several = "--processes 2" in path.read_text(encoding="utf-8")
    layout = Layout.of(recipe.parallel, 2 if several else 1)
    check_settings(recipe.parallel, layout)
    train = recipe.train
    assert isinstance(train.micro_batch_size, int)
    rows, rest = divmod(train.batch_size, layout.batch_ranks * train.micro_batch_size)
    assert rest == 0
    check_micro_batches(recipe.parallel, rows)
