"""What is shown while training goes on."""

from __future__ import annotations

import pytest

from hearth.training.progress import TrainingProgress

FIGURES = {"loss": 0.0, "lr": 1e-4, "tokens_per_second": 1000.0, "mfu": 0.1}


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ({"reward": 0.25}, "loss 0.0000  reward 0.250  lr 1.00e-04"),
        (
            {"accuracy": 0.75, "eval_loss": 0.5},
            "accuracy 0.750  lr 1.00e-04  1,000 tok/s  MFU 10.0%  eval 0.5000",
        ),
        ({}, "loss 0.0000  lr 1.00e-04"),
    ],
)
def test_the_line_of_a_step_has_what_tells_most(
    measured: dict[str, float], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingProgress(first_step=0, total_steps=1, enabled=True) as progress:
        progress.step(1, {**FIGURES, **measured})
    assert shown in capsys.readouterr().err
