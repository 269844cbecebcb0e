"""Golden numbers of GRPO, made by TRL's own trainer on a fixed tiny model and fixed answers.

    python tests/training/rollouts/make_golden.py    # in an environment with trl 1.16.0 and datasets 5.2.0

writes trl.json beside this file. The model is in float64. The answers are given, as two samplers would draw
different ones; rewards become advantages by the function of TRL that its trainer uses for the deviation.

The tests import the model and the answers from here.
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
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, PAD, EOS, GROUP = 48, 0, 2, 3
CASES: dict[str, dict[str, Any]] = {
    "tokens": {"loss": "tokens"},
    "sequences": {"loss": "sequences"},
    "clips": {"loss": "tokens", "clip_low": 0.05, "clip_high": 0.2},
    "unscaled": {"loss": "sequences", "scale_advantages": False},
    "divergence": {"loss": "tokens", "kl_weight": 0.3},
    "all": {"loss": "sequences", "clip_low": 0.1, "clip_high": 0.15, "kl_weight": 0.1, "temperature": 0.7},
}
# Seeds of the weights, and how far from the first ones
POLICY, OLD, REFERENCE = (0, 0.0), (1, 0.1), (2, 0.3)


def make_model(seed: int, distance: float) -> Any:
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
    )
    model = LlamaForCausalLM(config).double()
    first, other = np.random.default_rng(0), np.random.default_rng(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            noise = first.standard_normal(tuple(weight.shape))
            noise += distance * other.standard_normal(tuple(weight.shape))
            scale = (0.3 if weight.dim() == 1 else 1.5) / np.sqrt(weight.shape[-1])
            drawn = torch.from_numpy(noise * scale)
            weight.copy_(drawn + 1 if weight.dim() == 1 else drawn)
    return model


def make_answers() -> list[dict[str, Any]]:
    """Four prompts with three answers and their rewards; the rewards of the third are all alike."""
    rng = np.random.default_rng(11)
    found = []
    for number in range(4):
        prompt = rng.integers(3, VOCAB, rng.integers(2, 7)).tolist()
        answers = [[*rng.integers(3, VOCAB, rng.integers(1, 9)).tolist(), EOS] for _ in range(GROUP)]
        rewards = [1.0] * GROUP if number == 2 else np.round(rng.standard_normal(GROUP), 3).tolist()
        found.append({"prompt": prompt, "answers": answers, "rewards": rewards})
    return found


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


def _trainer(settings: dict[str, Any], out: str) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=out,
        per_device_train_batch_size=4 * GROUP,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        loss_type={"tokens": "dapo", "sequences": "grpo"}[settings["loss"]],
        epsilon=settings.get("clip_low", 0.2),
        epsilon_high=settings.get("clip_high", 0.2),
        temperature=settings.get("temperature", 1.0),
        use_bias_correction_kl=False,  # the plain estimator, as in the paper
        beta=0.0,  # else it would look for a reference model on the hub; set below
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=make_model(*POLICY),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "t3 t4"}] * 4),
        processing_class=_tokenizer(),
    )
    trainer.beta = settings.get("kl_weight", 0.0)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _padded(rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        here = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, here], mask[row, here] = torch.tensor(tokens), 1
    return ids, mask


def _inputs(trainer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from trl.trainer.utils import nanstd

    answers = make_answers()
    prompt_ids, prompt_mask = _padded([row["prompt"] for row in answers for _ in range(GROUP)], left=True)
    ids, mask = _padded([answer for row in answers for answer in row["answers"]], left=False)
    rewards = torch.tensor([row["rewards"] for row in answers], dtype=torch.float64)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if settings.get("scale_advantages", True):
        advantages = advantages / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages.flatten(),
        "num_items_in_batch": mask.sum(),
    }
    whole = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)
    with torch.no_grad():
        # In the trainer's own model, as TRL has changed its forward pass.
        for name, weights in (("old", OLD), ("ref", REFERENCE), ("", POLICY)):
            trainer.model.load_state_dict(make_model(*weights).state_dict())
            found = trainer._get_per_token_logps_and_entropies(trainer.model, *whole, ids.shape[1])
            if name:
                inputs[f"{name}_per_token_logps"] = found[0]
    return inputs


def measure(case: str) -> dict[str, Any]:
    """Loss, norm of the gradient of every weight, and metrics of one batch of TRL."""
    settings = CASES[case]
    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(settings, out)
        inputs = _inputs(trainer, settings)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        gradients = {name: float(weight.grad.norm()) for name, weight in trainer.model.named_parameters()}
        wanted = ("kl", "entropy", "clip_ratio/region_mean")
        metrics = {name: float(v[0]) for name, v in trainer._metrics["train"].items() if name in wanted}
        return {"loss": float(loss), "gradient_norms": gradients, "metrics": metrics}


def main() -> None:
    """Measure every case and write trl.json."""
    golden = {
        "command": "python tests/training/rollouts/make_golden.py",
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "datasets", "numpy")},
        "cases": {case: measure(case) for case in CASES},
    }
    path = Path(__file__).with_name("trl.json")
    path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
