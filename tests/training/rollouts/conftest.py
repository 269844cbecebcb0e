"""A tokenizer of characters, tiny policies, prompts and trainers for the tests of reinforcement learning."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hearth.config import Recipe
from hearth.training import Trainer
from hearth.training.objectives.ppo import PPO
from hearth.training.samples import Sample

CHARACTERS = "abcdefgh0123456789+= #.,$-?"
LETTERS = "abcdefgh"


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_policy(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of one thousand weights or so, lively enough to have opinions."""
    config = LlamaConfig(
        **{
            "vocab_size": len(CHARACTERS) + 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(4.0)
    return model


@pytest.fixture
def policy() -> Callable[..., LlamaForCausalLM]:
    return make_policy


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[Sample]]:
    """Prompts "b=" whose answer is "b"; with several characters where lengths are to differ."""

    def make(count: int, *, varied: bool = False) -> list[Sample]:
        found = []
        for number in range(count):
            letter = LETTERS[number % len(LETTERS)]
            text = f"{letter * (1 + number % 4 if varied else 1)}="
            tokens = np.asarray(tokenizer.encode(text), np.int64)
            part = (tokens, np.zeros(len(tokens), np.bool_))
            found.append(Sample((part,), fields={"answer": letter, "number": number}))
        return found

    return make


@pytest.fixture
def trainer_of(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., Trainer]:
    def make(
        objective: str,
        rows: Sequence[Sample],
        *,
        model: Any = None,
        train: dict[str, Any] | None = None,
        reinforce: dict[str, Any] | None = None,
        sections: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Trainer:
        settings = {
            "rewards": [{"name": "contains", "options": {"field": "answer"}}],
            "num_generations": 4,
            "max_new_tokens": 6,
            **(reinforce or {}),
        }
        values = {
            "objective": objective,
            "steps": 3,
            "batch_size": len(rows),
            "micro_batch_size": len(rows),
            "precision": "fp32",
            "learning_rate": 1e-3,
            "reinforce": settings,
            **(train or {}),
        }
        config = Recipe.model_validate({"train": values, "data": {"sequence_length": 16}, **(sections or {})})
        model = copy.deepcopy(model) if model is not None else make_policy()
        if objective == "ppo":
            model = PPO(config).adapt_model(model)
        return Trainer(
            model=model,
            train_dataset=rows,
            config=config,
            progress=False,
            device="cpu",
            **{"tokenizer": tokenizer, **arguments},
        )

    return make


@pytest.fixture
def module_of() -> Iterator[Callable[..., str]]:
    """Makes an importable module of functions; its name."""
    made: list[str] = []

    def make(**functions: Any) -> str:
        name = f"rewards_of_a_test_{len(made)}"
        module = ModuleType(name)
        vars(module).update(functions)
        sys.modules[name] = module
        made.append(name)
        return name

    yield make
    for name in made:
        del sys.modules[name]
