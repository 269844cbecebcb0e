"""Trained to fill in, a model writes what lies between two ends of words that it has never seen.

Words of the Python Enhancement Proposals, letter by letter: few letters decide much, so that a model of two
hundred thousand parameters shows within a minute what larger ones show on code.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hearth.config import Recipe
from hearth.data import TokenSplit
from hearth.data.fim import FimTokens
from hearth.training import Trainer
from hearth.workspace import Workspace

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.slow

# Enough letters for any word, with the marks and the special tokens: no merges worth the name.
LETTERS = 264


def recipe_of(words: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"size": "200K", "context_length": 128},
            "tokenizer": {"vocab_size": LETTERS},
            "data": {
                "sources": [{"path": str(words), "format": "jsonl"}],
                "filters": {"min_chars": 1},
                "fim": {"rate": 0.7, "spm_rate": 0.0},
                "validation_fraction": 0.05,
                "sequence_length": 128,
                "num_workers": 1,
            },
            "train": {
                "steps": 700,
                "batch_size": 16,
                "micro_batch_size": 16,
                "learning_rate": 5e-3,
                "warmup_steps": 20,
                "precision": "fp32",
            },
        }
    )


@torch.no_grad()
def loss_of(model: Any, context: list[int], wanted: list[int]) -> float:
    logits_TV = model(input_ids=torch.tensor([context + wanted])).logits[0]
    logp_TV = logits_TV.log_softmax(-1)[len(context) - 1 : -1]
    return -float(logp_TV.gather(1, torch.tensor(wanted)[:, None]).sum())


def losses_of_middles(model: Any, split: TokenSplit) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[words, 3] loss a token of middles and their ends: with the suffix, with another word's, with none."""
    tokenizer = split.dataset.tokenizer()
    marks, eos, head = FimTokens.find(tokenizer), tokenizer.eos_id, list(tokenizer.prefix_ids)
    special = {eos, *head}
    words = [
        [int(token) for token in split.tokens(index) if token not in special] for index in range(len(split))
    ]
    rng = np.random.default_rng(0)
    losses = []
    for index, word in enumerate(words):
        first = int(rng.integers(1, len(word) - 3))
        last = int(rng.integers(first + 1, min(len(word) - 1, first + 4)))
        prefix, suffix, middle = word[:first], word[last:], [*word[first:last], eos]
        other = words[index - 1]
        found = [
            loss_of(model, [*head, marks.prefix, *prefix, marks.suffix, *after, marks.middle], middle)
            for after in (suffix, other[len(other) // 2 :])
        ]
        losses.append([loss / len(middle) for loss in (*found, loss_of(model, head + prefix, middle))])
    return np.array(losses)


def test_what_follows_helps_to_fill_in(shared_data: Path, workspace_dir: Path, tmp_path: Path) -> None:
    source = shared_data / "peps" / "peps.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    counts: Counter[str] = Counter()
    with gzip.open(source, "rt", encoding="utf-8") as file:
        for line in file:
            counts.update(re.findall(r"\b[a-z]{6,14}\b", json.loads(line)["text"]))
    words = tmp_path / "words.jsonl"
    words.write_text(
        "".join(json.dumps({"text": word}) + "\n" for word in sorted(counts) if counts[word] >= 2)
    )
    with Workspace.open() as workspace:
        trainer = Trainer.from_recipe(recipe_of(words), workspace=workspace, progress=False, device="cpu")
        trainer.fit()
        held_out: Any = trainer.eval_rows
        trainer.model.eval()
        losses = losses_of_middles(trainer.model, held_out.split)
    assert len(losses) > 400
    right, wrong, none = losses.mean(axis=0)
    gain = losses[:, 1] - losses[:, 0]
    error = gain.std() / len(gain) ** 0.5
    logger.info("suffix %.3f, another's %.3f, none %.3f; gain's error %.3f", right, wrong, none, error)
    assert gain.mean() > 4 * error
    assert right < none - 0.3
