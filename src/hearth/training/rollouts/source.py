"""Answers to prompts by Hearth's engine, in the process that trains, with the weights of the moment.

Of several processes each has an engine of its own, with a whole copy of the weights, however the model that
trains is spread; and each answers some of the prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hearth.engine.llm import Engine
from hearth.engine.params import SamplingParams
from hearth.training.result import generation_config_of
from hearth.training.rollouts.weights import plain_copy, plain_weights

if TYPE_CHECKING:
    from hearth.config.objectives import ReinforceSection
    from hearth.training.trainer import Trainer

_MOST_AT_ONCE = 64  # answers that are generated together; more of them wait


@dataclass(frozen=True)
class Draw:
    """One answer: its tokens with the stop token, the engine's log-probabilities of them, its text."""

    token_ids: list[int]
    logprobs: list[float]
    text: str
    truncated: bool


def draw_seed(seed: int, step: int, prompt: int) -> int:
    """The dice of a prompt's answers, from the run's seed, the batch of rollouts and the place in it.

    Answer g of the prompt throws those of (this, g). ``step`` -1 is an evaluation.
    """
    digest = hashlib.blake2b(f"{seed} {step} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RolloutSource:
    """Opens an engine on a copy of the model at first use; later the weights are handed over."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._engine: Engine | None = None

    @property
    def settings(self) -> ReinforceSection:
        """``train.reinforce``."""
        return self._trainer.config.train.reinforce

    def take_weights(self, model: nn.Module) -> None:
        """Answer by the weights that ``model`` has now, from an empty cache; all processes must ask."""
        self._engine = self._with_weights_of(model)

    def draw(self, prompts: Mapping[int, Sequence[int]], step: int) -> list[list[Draw]]:
        """``num_generations`` answers to each of these prompts of a round, which are given by their places.

        The same seeds, weights and prompts give the same answers: dice depend on the place of a prompt, not
        on which others there are.
        """
        if not prompts:
            return []
        assert self._engine is not None, "take_weights() has not been called"
        settings, seed = self.settings, self._trainer.config.train.seed
        params = [
            SamplingParams(
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                n=settings.num_generations,
                seed=draw_seed(seed, step, place),
                logprobs=0,
            )
            for place in prompts
        ]
        completions = self._engine.generate([list(prompt) for prompt in prompts.values()], params)
        self._engine.release_cache()  # the backward pass needs the memory
        drawn: list[list[Draw]] = [[] for _ in prompts]
        for number, each in enumerate(completions):
            assert each.logprobs is not None
            drawn[number // settings.num_generations].append(
                Draw(
                    list(each.token_ids),
                    [entry.logprob for entry in each.logprobs],
                    each.text,
                    each.finish_reason == "length",
                )
            )
        return drawn

    def _with_weights_of(self, model: nn.Module) -> Engine:
        if self._engine is not None:
            self._engine.update_weights(plain_weights(model))
            return self._engine
        trainer = self._trainer
        dtype = generation_dtype(trainer.precision, trainer.device)
        generation: Any = generation_config_of(trainer, trainer.model)
        config = trainer.config
        prompts = -(-config.train.batch_size // trainer.world.size)  # of a round, at most
        return Engine.from_model(
            plain_copy(model, dtype=dtype, generation_config=generation, device=trainer.device),
            trainer.tokenizer,
            max_model_len=config.data.sequence_length,
            max_num_seqs=min(_MOST_AT_ONCE, prompts * self.settings.num_generations),
        )


def generation_dtype(precision: str, device: torch.device) -> torch.dtype:
    """In what the engine computes, so that it is as close to training as it can be."""
    if precision in ("bf16", "fp8"):
        return torch.bfloat16
    return torch.float16 if precision == "fp16" and device.type == "cuda" else torch.float32
