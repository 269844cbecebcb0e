"""In the training benchmark: transformers' Trainer, and a loop in plain torch as one would write it by hand.

Both read the packed rows; positions that start again keep the documents of a row apart.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from job import IGNORE, ROW_FIELDS, Job, Meter, work


def _stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in ROW_FIELDS}


def trainer(job: Job, meter: Meter, scratch: Path) -> None:
    """transformers' Trainer as its documentation shows it."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    settings = job.settings

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Metered(TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            meter.step()

        def on_save(self, *_args: Any, **_kwargs: Any) -> None:
            seconds = time.perf_counter() - meter.stamps[-1]  # it saves before it goes on
            meter.saves.append({"seconds": seconds, "stall": seconds})

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = _stack(rows)
        # The labels are already the next tokens; this is transformers' name for such labels.
        return {**batch, "shift_labels": batch["labels"]}

    model = job.model()
    model.config.use_cache = False  # a cache would turn the isolation of packed documents off
    meter.start()
    accumulate = settings["batch_size"] // settings["micro_batch_size"]
    loop = InOrder(
        model=model,
        args=TrainingArguments(
            **job.arguments(str(scratch), accumulate=accumulate),
            per_device_train_batch_size=settings["micro_batch_size"],
            remove_unused_columns=False,
        ),
        train_dataset=[row for step in range(settings["steps"]) for row in job.rows(step)],
        data_collator=collate,
        callbacks=[Metered()],
    )
    loop.train()
    meter.losses += [float(entry["loss"]) for entry in loop.state.log_history if "loss" in entry]


def by_hand(job: Job, meter: Meter, scratch: Path) -> None:  # noqa: ARG001 - every trainer is called alike
    """Autocast, the model's logits, a sum of cross-entropies over the tokens of the step, AdamW."""
    import torch
    import torch.nn.functional as F

    settings = job.settings
    device, bf16 = torch.device(settings["device"]), settings["precision"] == "bf16"
    model = job.model().to(device).train()
    meter.start()
    decayed = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["epsilon"],
        fused=True,
    )
    size = settings["micro_batch_size"]
    for step in range(settings["steps"]):
        rows = job.rows(step)
        num_valid = sum(int((row["labels"] != IGNORE).sum()) for row in rows)
        total = 0.0
        for first in range(0, len(rows), size):
            batch = {name: tensor.to(device) for name, tensor in _stack(rows[first : first + size]).items()}
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                logits = model(
                    input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
                ).logits
            labels = batch["labels"].reshape(-1)
            summed = F.cross_entropy(
                logits.float().flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum"
            )
            loss = summed / num_valid
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step()
        meter.losses.append(total)


if __name__ == "__main__":
    work({"transformers": trainer, "torch": by_hand}, ("transformers", "torch", "accelerate"))
