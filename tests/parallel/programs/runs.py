"""One process of whole runs of objectives, each with its record, and what it keeps beside checkpoints.

RANK=… WORLD_SIZE=… runs.py SETTINGS.json

Says ``RESULT`` with the id of each run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from fit import StopAt
from objectives import make_tokenizer, make_trainer

from hearth.config import Recipe
from hearth.errors import Interrupted
from hearth.parallel.world import joined
from hearth.workspace import Workspace


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    tokenizer, runs = make_tokenizer(), {}
    section = Recipe.model_validate({"parallel": settings["parallel"]}).parallel
    with joined(section, torch.device("cpu")) as world, Workspace.open() as workspace:
        for name, case in settings["cases"].items():
            trainer = make_trainer(
                case,
                settings["parallel"],
                world,
                tokenizer,
                workspace=workspace,
                resume=settings["resume"].get(name),
                callbacks=[StopAt(settings["stop"])] if settings["stop"] else [],
            )
            try:
                trainer.fit()
            except Interrupted:
                assert settings["stop"]
            assert trainer.run is not None
            runs[name] = trainer.run.id
        if world.is_main:
            print("RESULT", json.dumps(runs))  # noqa: T201


if __name__ == "__main__":
    main()
