"""Objectives that other packages bring, found by the entry points of what is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.errors import ConfigError
from hearth.training import Trainer
from hearth.training.objectives import objective_class

PACKAGE = """
from hearth.training.logprobs import token_logprobs
from hearth.training.objectives import Losses, Objective


class Focal(Objective):
    name = "focal"

    def loss(self, model, batch):
        logp_N, _ = token_logprobs(model, batch)
        return Losses.of_tokens((-logp_N * (1 - logp_N.exp()) ** 2).sum(), batch.num_valid)


def no_class():
    return None
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside the others, with its metadata, as pip would leave it."""
    (tmp_path / "focal_objective.py").write_text(PACKAGE)
    metadata = tmp_path / "focal_objective-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: focal-objective\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[hearth.objectives]\nfocal = focal_objective:Focal\nbroken = focal_objective:no_class\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("installed")
def test_an_objective_of_another_package_trains(
    rows_of: Callable[..., list[dict[str, Any]]],
    documents: list[list[int]],
    trainer_of: Callable[..., Trainer],
) -> None:
    trainer = trainer_of("focal", rows_of([[3 + t % 40 for t in d] for d in documents], 64, 2)[:4])
    batches = trainer.objective.batches(trainer, 0, trainer.step_rows(0))
    logits = trainer.model(
        input_ids=batches[0].input_ids_BT, position_ids=batches[0].position_ids_BT, use_cache=False
    ).logits
    labels = batches[0].labels_BT
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels >= 0]
    expected = (-logp * (1 - logp.exp()) ** 2).mean()
    assert trainer.train_step(0).loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.usefixtures("installed")
def test_what_is_no_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'broken': .* is no subclass of hearth\.training\.Objective"):
        objective_class("broken")
    with pytest.raises(ConfigError, match=r"'focall' is unknown\n  fix: did you mean focal\?"):
        objective_class("focall")
