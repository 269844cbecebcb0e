"""TRL's SFTTrainer in the training benchmark: as it comes, padding without recomputation, and packing.

As it comes it pads, 8 samples in a micro-batch, and recomputes activations. A step has the documents that it
has for all others; they are cut into micro-batches of (nearly) equal numbers.
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from job import Job, Meter, evenly, work

SAMPLES = 8  # `per_device_train_batch_size` of SFTConfig


def train(job: Job, meter: Meter, scratch: Path, *, packing: bool, options: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.utils import logging
    from trl import SFTConfig, SFTTrainer, pack_dataset

    logging.set_verbosity_error()
    disable_progress_bars()
    settings = job.settings
    steps = [Dataset.from_list(job.documents(step)) for step in range(settings["steps"])]
    if packing:
        # Its own packing, within each step: what a packed row holds must not move to another step.
        steps = [pack_dataset(documents, settings["length"], "bfd") for documents in steps]
        accumulate = settings["batch_size"] // settings["micro_batch_size"]
    else:
        accumulate = math.ceil(max(map(len, steps)) / SAMPLES)
    examples = [row for step in steps for row in step]
    batches, first = [], 0
    for step in steps:
        batches += evenly(range(first, first + len(step)), accumulate)
        first += len(step)

    class InOrder(SFTTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator
            )

    class Metered(TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            meter.step()

    model = job.model()
    meter.start()
    trainer = InOrder(
        model=model,
        args=SFTConfig(
            **job.arguments(str(scratch), accumulate=accumulate),
            max_length=settings["length"],
            # They lie packed already, with the lengths of their documents, by which its collator keeps those
            # apart: it lays the rows of a micro-batch one behind the other.
            packing=packing,
            dataset_kwargs={"skip_prepare_dataset": True},
            **options,
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(job.folder / "model"),
        callbacks=[Metered()],
    )
    trainer.train()
    meter.losses += [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    meter.extra["micro_batches"] = accumulate


if __name__ == "__main__":
    kept = {"gradient_checkpointing": False}
    work(
        {
            "trl-default": functools.partial(train, packing=False, options={}),
            "trl-padding": functools.partial(train, packing=False, options=kept),
            "trl-packing": functools.partial(train, packing=True, options=kept),
        },
        ("trl", "transformers", "torch", "accelerate", "datasets"),
    )
