"""A learned reward model as a reward: what `train.objective: reward` leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from hearth.errors import ConfigError, ModelError
from hearth.models import load_tokenizer, resolve_reference
from hearth.models.loading import quiet_transformers
from hearth.models.reward_head import has_reward_head
from hearth.training.precision import autocast
from hearth.training.rollouts.answers import Answer
from hearth.training.samples import Sample, collate_samples

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer

_AT_ONCE = 32  # answers in one pass


class RewardModelJudge:
    """Scores prompt and answer, token for token as the policy has them."""

    def __init__(self, trainer: Trainer, reference: str, options: Mapping[str, Any]) -> None:
        """Open ``reference``: name, name@version or directory.

        Raises ConfigError where it reads other tokens or another template than the policy, or shorter texts;
        ModelError where it is no reward model.
        """
        if options:
            raise ConfigError(f"the reward model {reference} takes no options", fix="leave options out")
        path = resolve_reference(reference, trainer.workspace)
        self._trainer = trainer
        self._model = _load(path).to(trainer.device)
        _check_tokenizer(path, trainer.tokenizer)
        config: Any = self._model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        needed = trainer.config.data.sequence_length
        if context is not None and context < needed:
            raise ConfigError(
                f"the reward model {reference} reads at most {context} tokens, data.sequence_length is "
                f"{needed}",
                fix=f"use a sequence_length of at most {context}",
            )
        self._pad_id = config.pad_token_id

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The score of every answer."""
        from hearth.training.objectives.reward import scores

        found: list[float] = []
        trainer = self._trainer
        for first in range(0, len(answers), _AT_ONCE):
            samples = [self._sample(answer) for answer in answers[first : first + _AT_ONCE]]
            batch = collate_samples(samples).to(trainer.device)
            with torch.no_grad(), autocast(trainer.precision, trainer.device):
                found += scores(self._model, batch).tolist()
        return found

    def _sample(self, answer: Answer) -> Sample:
        """One marked position: the last token that is no padding, as the model itself would look for it."""
        tokens = np.asarray((*answer.prompt_ids, *answer.token_ids), np.int64)
        real = np.arange(len(tokens)) if self._pad_id is None else np.flatnonzero(tokens != self._pad_id)
        marked = np.zeros(len(tokens) + 1, np.bool_)
        marked[real[-1] + 1] = True
        return Sample(((np.append(tokens, 0), marked),))


def _load(path: Path) -> Any:
    try:
        with quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, dtype="auto", local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the reward model {path} cannot be opened: {error}") from error
    if not has_reward_head(model) or report["missing_keys"]:
        raise ModelError(
            f"{path} is no reward model: it has no score head of one label",
            fix="train one with train.objective: reward",
        )
    return model.eval().requires_grad_(False)


def _check_tokenizer(path: Path, tokenizer: Any) -> None:
    own = load_tokenizer(path)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the reward model {path} has another tokenizer ({len(own)} tokens) than the policy "
            f"({len(tokenizer)}), so it would read other tokens than those that the policy writes",
            fix="train the reward model from the same base",
        )
    if own.chat_template is not None and own.chat_template != tokenizer.chat_template:
        raise ConfigError(
            f"the reward model {path} was trained with another chat template than the policy's",
            fix="train both on conversations that are rendered alike",
        )
