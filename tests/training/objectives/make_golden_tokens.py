"""Golden numbers of losses over tokens, made by TRL: fine-tuning, and distillation by logits.

    python tests/training/objectives/make_golden_tokens.py    # in the environment of make_golden.py

writes trl_tokens.json beside this file, for the models and samples of make_golden.py: the better answers
count, with their end. Losses are per token that counts. Distillation is GKD's loss at temperature 1.7, where
TRL does not multiply by the square of the temperature; both models are given.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from make_golden import PAD, _tokenizer, make_model, make_samples
from torch import Tensor

TEMPERATURE = 1.7
BETAS = {"forward": 0, "reverse": 1, "jsd": 0.3}


def _batch() -> dict[str, Tensor]:
    """All samples padded to one length; labels stand at their own tokens."""
    samples = make_samples()
    length = max(len(s["prompt"]) + len(s["chosen"]) for s in samples)
    ids = torch.full((len(samples), length), PAD)
    labels = torch.full((len(samples), length), -100)
    for row, sample in enumerate(samples):
        first, last = len(sample["prompt"]), len(sample["prompt"]) + len(sample["chosen"])
        ids[row, :last] = torch.tensor(sample["prompt"] + sample["chosen"])
        labels[row, first:last] = ids[row, first:last]
    mask = torch.tensor([[at < len(s["prompt"]) + len(s["chosen"]) for at in range(length)] for s in samples])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


def _result(model: Any, loss: Tensor) -> dict[str, Any]:
    loss.backward()
    norms = {name: float(weight.grad.norm()) for name, weight in model.named_parameters()}
    return {"loss": float(loss), "gradient_norms": norms}


def measure_sft() -> dict[str, Any]:
    """SFTTrainer's own loss of the batch."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    batch = _batch()
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=make_model(0),
            args=SFTConfig(
                output_dir=out,
                use_cpu=True,
                bf16=False,
                report_to=[],
                gradient_checkpointing=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_dict({"input_ids": batch["input_ids"].tolist()}),
            processing_class=_tokenizer(),
        )
        trainer.model.train()
        num = int((batch["labels"] != -100).sum())
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(num))
        return _result(trainer.model, loss)


def measure_distillation(beta: float) -> dict[str, Any]:
    """GKD's divergence of a student from a teacher."""
    from trl.experimental.gkd import GKDTrainer

    batch, student, teacher = _batch(), make_model(0), make_model(1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = teacher(**inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = GKDTrainer.generalized_jsd_loss(
        student(**inputs).logits[:, :-1],
        wanted,
        labels,
        beta=beta,
        temperature=TEMPERATURE,
        num_items_in_batch=int((labels != -100).sum()),
    )
    return _result(student, loss)


def main() -> None:
    """Measure every case and write trl_tokens.json."""
    golden = {
        "command": "python tests/training/objectives/make_golden_tokens.py",
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "datasets", "numpy")},
        "sft": measure_sft(),
        "distill": {
            name: {**measure_distillation(beta), "beta": beta, "temperature": TEMPERATURE}
            for name, beta in BETAS.items()
        },
    }
    path = Path(__file__).with_name("trl_tokens.json")
    path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
