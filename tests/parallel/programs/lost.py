"""One process of a run of which another process is killed or stopped in the middle of a step.

RANK=… WORLD_SIZE=… lost.py SETTINGS.json
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.cli.main import main
from hearth.config import Recipe
from hearth.training import Trainer


def make_rows(num: int) -> Any:
    spec = importlib.util.spec_from_file_location("fit", Path(__file__).with_name("fit.py"))
    assert spec is not None
    assert spec.loader is not None
    fit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit)
    return fit.make_rows(num, 0)


def run() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    torch.manual_seed(0)

    class Breaking(Trainer):
        """Ends itself, or stands still, inside of the loss of a step."""

        num_calls = 0

        def compute_loss(self, model: Any, batch: Any) -> Any:
            self.num_calls += 1
            if self.world.rank == settings["rank"] and self.num_calls == settings["call"]:
                os.write(1, b"BREAKS\n")
                os.kill(os.getpid(), getattr(signal, settings["signal"]))
            return super().compute_loss(model, batch)

        @classmethod
        def from_recipe(cls, recipe: Recipe, **others: Any) -> Any:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings["model"]))
            others.pop("resume")
            return cls(model=model, train_dataset=make_rows(61), config=recipe, **others)

    # The command line as it is, on rows that are made and a trainer that breaks.
    import hearth.training

    hearth.training.Trainer = Breaking  # type: ignore[misc]
    main(["train", settings["recipe"]])


if __name__ == "__main__":
    run()
