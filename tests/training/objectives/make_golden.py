"""Golden numbers of preference losses, made by TRL's own trainers on a fixed tiny model and batch.

    python tests/training/objectives/make_golden.py    # in an environment with trl 1.16.0 and datasets 5.2.0

writes trl.json beside this file. Everything is float64 but for what TRL casts to float32 itself. Where TRL
differs on purpose the batch is such that both must agree: ORPO's token loss covers the prompt there, so its
prompts have one token, which nothing predicts; KTO's baseline is taken over each micro-batch there, so the
batch is one micro-batch.

The tests import the model and the batch from here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

VOCAB, PAD, EOS = 48, 0, 2
CASES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "dpo_sft": {"beta": 0.1, "sft_weight": 0.5},
    "ipo": {"beta": 0.4},
    "kto": {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.8},
    "orpo": {"odds_weight": 0.25},
    "simpo": {"beta": 2.0, "gamma": 0.6},
    "simpo_sft": {"beta": 2.5, "gamma": 1.0, "sft_weight": 0.7},
    "reward": {},
    "reward_centred": {"center_weight": 0.05},
}


def seeds_of(case: str) -> tuple[int, int]:
    """Seeds of policy and reference; for KTO such that the baseline is positive, as it is cut off at zero."""
    return (1, 0) if case == "kto" else (0, 1)


def make_model(seed: int, *, reward: bool = False) -> Any:
    """A Llama whose weights numpy draws, so that no version of torch changes them; in float64."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        num_labels=1,
    )
    model = (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config).double()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            scale = 0.3 / np.sqrt(weight.shape[-1]) if weight.dim() == 1 else 1.5 / np.sqrt(weight.shape[-1])
            noise = torch.from_numpy(rng.standard_normal(tuple(weight.shape)) * scale)
            weight.copy_(noise + 1 if weight.dim() == 1 else noise)
    return model


def make_samples(prompt_length: int | None = None) -> list[dict[str, Any]]:
    """Six prompts with two answers each and a verdict on the first; ids, answers end with EOS."""
    rng = np.random.default_rng(11)
    found = []
    for number in range(6):
        prompt = rng.integers(3, VOCAB, prompt_length or rng.integers(2, 7)).tolist()
        answers = [[*rng.integers(3, VOCAB, rng.integers(1, 9)).tolist(), EOS] for _ in range(2)]
        found.append(
            {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "label": number % 3 != 1}
        )
    return found


def samples_of(case: str) -> list[dict[str, Any]]:
    """The samples of a case."""
    return make_samples(1 if case == "orpo" else None)


# ── below: only in TRL's environment ─────────────────────────────────────────────────────────────────────


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<unk>": 1, "<eos>": EOS, **{f"t{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _text(ids: list[int]) -> str:
    return "".join(f" t{token}" for token in ids if token != EOS)


def _dataset(case: str) -> Any:
    from datasets import Dataset

    rows = []
    for sample in samples_of(case):
        prompt = _text(sample["prompt"]).strip()
        if case == "kto":
            rows.append({"prompt": prompt, "completion": _text(sample["chosen"]), "label": sample["label"]})
        elif case.startswith("reward"):
            rows.append({key: prompt + _text(sample[key]) for key in ("chosen", "rejected")})
        else:
            rows.append(
                {"prompt": prompt, "chosen": _text(sample["chosen"]), "rejected": _text(sample["rejected"])}
            )
    return Dataset.from_list(rows)


def _trainer(case: str, out: str) -> Any:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    settings, kind = CASES[case], case.partition("_")[0]
    common: dict[str, Any] = {
        "output_dir": out,
        "per_device_train_batch_size": 6,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_length": 64,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    parts = {"train_dataset": _dataset(case), "processing_class": _tokenizer()}
    if kind in ("dpo", "ipo"):
        weight = settings.get("sft_weight")
        types = ["ipo"] if kind == "ipo" else ["sigmoid", "sft"] if weight else ["sigmoid"]
        config = DPOConfig(
            **common, beta=settings["beta"], loss_type=types, loss_weights=[1.0, weight] if weight else None
        )
        return DPOTrainer(model=make_model(0), ref_model=make_model(1), args=config, **parts)
    if kind == "kto":
        config = KTOConfig(**common, **settings)
        policy, reference = (make_model(seed) for seed in seeds_of(case))
        return KTOTrainer(model=policy, ref_model=reference, args=config, **parts)
    if kind == "orpo":
        config = ORPOConfig(**common, beta=settings["odds_weight"])
        return ORPOTrainer(model=make_model(0), args=config, **parts)
    if kind == "simpo":
        config = CPOConfig(
            **common,
            loss_type="simpo",
            beta=settings["beta"],
            simpo_gamma=settings["gamma"],
            cpo_alpha=settings.get("sft_weight", 0.0),
        )
        return CPOTrainer(model=make_model(0), args=config, **parts)
    config = RewardConfig(**common, center_rewards_coefficient=settings.get("center_weight"))
    return RewardTrainer(model=make_model(0, reward=True), args=config, **parts)


def _metrics(trainer: Any) -> dict[str, float]:
    metrics = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    wanted = ("accuracies", "accuracy", "margin", "rewards/", "logps/", "kl")
    return {
        name: float(np.mean(values))
        for name, values in metrics["train"].items()
        if any(part in name for part in wanted) and "token" not in name
    }


def measure(case: str) -> dict[str, Any]:
    """Loss, norm of the gradient of every weight, and metrics of one micro-batch of TRL."""
    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(case, out)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = {
            name: float(weight.grad.norm())
            for name, weight in trainer.model.named_parameters()
            if weight.grad is not None
        }
        assert next(trainer.model.parameters()).dtype == torch.float64
        return {"loss": float(loss), "gradient_norms": gradients, "metrics": _metrics(trainer)}


def main() -> None:
    """Measure every case and write trl.json."""
    golden = {
        "command": "python tests/training/objectives/make_golden.py",
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "datasets", "numpy")},
        "cases": {case: measure(case) for case in CASES},
    }
    path = Path(__file__).with_name("trl.json")
    path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
