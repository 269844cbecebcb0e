"""Trained to fill in, a model knows better what lies between two pieces of a text that it has never seen."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hearth.config import Recipe
from hearth.config.recipe import FimSection
from hearth.data import PackedRows
from hearth.training import Trainer
from hearth.training.batches import IGNORE, collate
from hearth.training.loss import token_loss_sum
from hearth.workspace import Workspace

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.slow


def middle_loss(trainer: Trainer, num_rows: int = 48) -> float:
    """Mean loss of the tokens of middles, given prefix and suffix in this order, on held-out texts."""
    assert trainer.eval_rows is not None
    held_out: Any = trainer.eval_rows
    section = FimSection(rate=1.0, spm_rate=0.0)
    rows = PackedRows(held_out.split, trainer.config.data.sequence_length, seed=7, fim=section)
    assert rows.fim is not None
    mark, end = rows.fim._marks.middle, held_out.split.dataset.tokenizer().eos_id
    batch = collate(rows, range(min(num_rows, len(rows))))
    labels = batch.labels_BT.numpy().copy()
    for row, (inputs, segments) in enumerate(
        zip(batch.input_ids_BT.numpy(), batch.segment_ids_BT.numpy(), strict=True)
    ):
        inside = np.zeros(len(inputs), dtype=bool)
        for segment in range(segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            marks = here[inputs[here] == mark]
            inside[marks[0] : here[-1] + 1] = len(marks) == 1
        labels[row][~inside | (labels[row] == end)] = IGNORE
    valid = int((labels != IGNORE).sum())
    assert valid > 500
    batch = dataclasses.replace(batch, labels_BT=torch.from_numpy(labels), num_valid=valid)
    trainer.model.eval()
    with torch.no_grad():
        return float(token_loss_sum(trainer.model, batch)[0]) / valid


def test_middles_are_known_better_by_a_model_that_was_trained_on_them(
    shared_data: Path, workspace_dir: Path, tmp_path: Path
) -> None:
    source = shared_data / "peps" / "peps.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    torch.set_num_threads(1)
    with gzip.open(source, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:300]
    pieces = [text[at : at + 500] for text in texts for at in range(0, min(len(text), 4000), 500)]
    path = tmp_path / "pieces.jsonl"
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    losses = {}
    with Workspace.open() as workspace:
        for name, rate in (("left to right", 0.0), ("filled in", 0.9)):
            recipe = Recipe.model_validate(
                {
                    "model": {"size": "300K", "context_length": 256},
                    "tokenizer": {"vocab_size": 512},
                    "data": {
                        "sources": [{"path": str(path), "format": "jsonl"}],
                        "fim": {"rate": rate, "spm_rate": 0.0},
                        "validation_fraction": 0.05,
                        "sequence_length": 256,
                        "num_workers": 1,
                    },
                    "train": {
                        "steps": 100,
                        "batch_size": 8,
                        "micro_batch_size": 8,
                        "learning_rate": 5e-3,
                        "warmup_steps": 5,
                        "precision": "fp32",
                    },
                }
            )
            trainer = Trainer.from_recipe(recipe, workspace=workspace, progress=False, device="cpu")
            trainer.fit()
            losses[name] = middle_loss(trainer)
    logger.info("loss of middles: %s", losses)
    assert losses["filled in"] < losses["left to right"] - 0.05
