"""One process of the test of objectives: trains a tiny model in float64 by each, and writes what came of it.

RANK=… WORLD_SIZE=… objectives.py SETTINGS.json OUT.safetensors

All objectives in turn, in one group of processes: starting one takes longer than training does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hearth.config import Recipe
from hearth.parallel.tensor import gathered
from hearth.parallel.world import World, joined
from hearth.training import Trainer
from hearth.training.adapter import add_adapter
from hearth.training.objectives import make_objective
from hearth.training.samples import Sample
from hearth.training.teacher import Teacher

CHARACTERS = "abcdefgh0123456789+= #.,$-?"
VOCAB, LENGTH = len(CHARACTERS) + 3, 24
PAIRS = ("dpo", "ipo", "orpo", "simpo", "reward")


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    numbered = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).double()


def packed(num: int, seed: int, *, empty: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Rows of two documents each; no label counts in the rows of ``empty``."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        cut = int(rng.integers(4, LENGTH - 4))
        tokens = rng.integers(3, VOCAB, LENGTH + 1)
        labels = np.where(rng.random(LENGTH) < (0.0 if number in empty else 0.8), tokens[1:], -100)
        labels[cut - 1] = -100
        rows.append(
            {
                "input_ids": tokens[:-1],
                "labels": labels,
                "position_ids": np.concatenate([np.arange(cut), np.arange(LENGTH - cut)]),
                "segment_ids": np.concatenate([np.zeros(cut), np.ones(LENGTH - cut)]).astype(int),
            }
        )
    return rows


def samples(num: int, num_parts: int, seed: int) -> list[Sample]:
    """Prompts with two answers, or with one and a verdict."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num):
        prompt = rng.integers(3, VOCAB, rng.integers(1, 9))
        parts = []
        for _ in range(num_parts):
            tokens = np.concatenate([prompt, rng.integers(3, VOCAB, rng.integers(1, 14))]).astype(np.int64)
            parts.append((tokens, np.arange(len(tokens)) >= len(prompt)))
        found.append(Sample(tuple(parts), 1.0 if num_parts == 2 else float(number % 3 != 1)))
    return found


def prompts(num: int, tokenizer: Any) -> list[Sample]:
    found = []
    for number in range(num):
        letter = "abcdefgh"[number % 8]
        tokens = np.asarray(tokenizer.encode(f"{letter * (1 + number % 4)}="), np.int64)
        found.append(Sample(((tokens, np.zeros(len(tokens), np.bool_)),), fields={"answer": letter}))
    return found


def rows_of(objective: str, tokenizer: Any) -> tuple[Any, Any]:
    """For training and for evaluation, whose number no number of processes divides."""
    if objective in ("pretrain", "sft", "distill"):
        return packed(12, 0, empty=(3, 4, 5)), packed(5, 1, empty=(2,))
    if objective in ("grpo", "ppo"):
        return prompts(8, tokenizer), prompts(3, tokenizer)
    num_parts = 2 if objective in PAIRS else 1
    return samples(12, num_parts, 0), samples(5, num_parts, 1)


def make_trainer(
    case: dict[str, Any], parallel: dict[str, Any], world: World, tokenizer: Any, **arguments: Any
) -> Trainer:
    train, reinforced = dict(case["train"]), case["train"]["objective"] in ("grpo", "ppo")
    values = {
        "parallel": parallel,
        "data": {"sequence_length": LENGTH},
        "model": case.get("model", {}),
        "train": {
            "steps": 3,
            "batch_size": 4 if reinforced else 8,
            "micro_batch_size": 1,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "grad_clip": 0.5,
            **train,
        },
    }
    recipe = Recipe.model_validate(values)
    model: Any = make_objective(recipe).adapt_model(make_model())
    if recipe.model.adapter is not None:
        model = add_adapter(model, recipe.model.adapter, seed=3)
    rows, held_out = rows_of(recipe.train.objective, tokenizer)
    trainer = Trainer(
        model=model.double(),
        tokenizer=tokenizer if reinforced else None,
        train_dataset=rows,
        eval_dataset=held_out,
        config=recipe,
        world=world,
        progress=False,
        **arguments,
    )
    if recipe.train.objective == "distill":
        objective: Any = trainer.objective
        objective.teacher = Teacher(make_model(1))
    return trainer


def results(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
    """Losses, norms, metrics, evaluations before and after, and all weights."""
    figures = [("before", trainer.evaluate())]
    for step in range(3):
        found = trainer.train_step(step)
        own = {"loss": found.loss, "norm": found.grad_norm, "tokens": float(found.num_tokens)}
        figures.append((f"step {step}", {**own, **found.metrics}))
    figures.append(("after", trainer.evaluate()))
    for when, values in figures:
        for name, value in values.items():
            yield f"{when}, {name}", torch.tensor(value, dtype=torch.float64)
    for name, weight in trainer.model.named_parameters():
        yield f"weight {name}", gathered(weight.detach()).clone()


def train_by_each(cases: dict[str, Any], parallel: dict[str, Any], world: World) -> dict[str, torch.Tensor]:
    """What comes of each case, under ``CASE | WHAT``."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    found: dict[str, torch.Tensor] = {}
    for name, case in cases.items():
        trainer = make_trainer(case, parallel, world, tokenizer)
        found |= {f"{name} | {key}": value for key, value in results(trainer)}
    return found


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    section = Recipe.model_validate({"parallel": settings["parallel"]}).parallel
    with joined(section, torch.device("cpu")) as world:
        found = train_by_each(settings["cases"], settings["parallel"], world)
        # In a pipeline each process has some of the weights.
        found = {key: value for part in world.gather(found) for key, value in part.items()}
        if world.is_main:
            save_file(found, sys.argv[2])


if __name__ == "__main__":
    main()
