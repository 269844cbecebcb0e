"""What GRPO and PPO share: prompts, rollouts by Hearth's engine, rewards, and several steps on one round.

A *round* is a batch of rollouts: the prompts of a step, each answered ``num_generations`` times. It serves
``iterations`` optimizer steps, and the prompts of round r are the rows of step r. Log-probabilities that a
ratio is taken of are always the training model's. That answers are drawn otherwise, by the engine's
arithmetic and with ``top_p`` from a nucleus, is not corrected for; ``engine_mismatch`` says how far the
engine's log-probabilities are from them.

Shape suffixes: B rows, T positions, S answers, N tokens of all answers (in a batch in row order).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hearth.config.objectives import ReinforceSection
from hearth.errors import ConfigError, DataError
from hearth.training.batches import Batch, Rows, describe_row
from hearth.training.checkpoint.together import in_all
from hearth.training.logprobs import sequence_sums, token_logprobs
from hearth.training.loss import unwrap
from hearth.training.objectives.base import TOKENS, Losses, Objective
from hearth.training.reference import Reference, evaluating, frozen_reference
from hearth.training.rollouts.answers import Answer
from hearth.training.rollouts.batching import FIGURES, KeptRollouts, Rollouts, label_order
from hearth.training.rollouts.formulas import clipped_policy_losses, divergences
from hearth.training.rollouts.judge import RewardModelJudge
from hearth.training.rollouts.rewards import Rewards, make_rewards
from hearth.training.rollouts.source import Draw, RolloutSource
from hearth.training.samples import sample_rows
from hearth.training.shares import own_range, own_turns

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer

ANSWERS = "answers"
# Batch.extras, each for every token of an answer
OLD, REFERENCE, ENGINE, ADVANTAGES = "old_logp", "reference_logp", "engine_logp", "advantages"
_EVALUATION = -1  # in the place of a round
_MOST_GENERATIONS = 128  # what the engine draws for one prompt
_COMMON = (
    "rewards", "num_generations", "max_new_tokens", "temperature", "top_p", "iterations", "clip_low",
    "clip_high", "kl_weight", "loss",
)  # fmt: skip


class ReinforceObjective(Objective):
    """Draws answers, has them judged, and leaves to a subclass what to learn from the rewards."""

    sections = frozenset({"reinforce"})
    kind = "prompts"
    reads: ClassVar[frozenset[str]] = frozenset()  # the keys of train.reinforce that it looks at, besides

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.settings: ReinforceSection = config.train.reinforce
        self._owner: Trainer | None = None
        self._kept = KeptRollouts()
        self._reference: Reference | None = None
        self._rewards: Rewards | None = None
        self._source: RolloutSource | None = None
        self._figure_names: tuple[str, ...] = ()

    # ── before training ──────────────────────────────────────────────────────────────────────────────────

    def check(self, dataset: Any) -> None:  # noqa: ARG002
        """Refuse settings without effect, unknown rewards, and answers that do not fit into a row."""
        self.refuse("needs whole sequences", "context")
        self.refuse("gives all weights to the engine that answers", "pipeline")
        reads = {*_COMMON, *self.reads}
        for key, field in ReinforceSection.model_fields.items():
            if key not in reads and getattr(self.settings, key) != field.default:
                raise ConfigError(
                    f"train.reinforce.{key} is {getattr(self.settings, key)}, but the objective {self.name} "
                    f"does not read it",
                    fix=f"leave it out; {self.name} reads {', '.join(sorted(reads))}",
                )
        make_rewards(self.settings.rewards, lambda *_: lambda answers: [0.0] * len(answers))
        if self.settings.num_generations > _MOST_GENERATIONS:
            raise ConfigError(
                f"train.reinforce.num_generations is {self.settings.num_generations}",
                fix=f"use at most {_MOST_GENERATIONS}, and more prompts in a step",
            )
        if self.longest_prompt < 1:
            raise ConfigError(
                f"train.reinforce.max_new_tokens {self.settings.max_new_tokens} leaves no room for a prompt "
                f"in data.sequence_length {self.config.data.sequence_length}",
                fix="raise data.sequence_length, or lower max_new_tokens",
            )

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that leave room for the longest answer in a row."""
        return self.config.data.sequence_length - self.settings.max_new_tokens

    def rows(self, dataset: Any, split: str) -> Rows | None:
        """The prompts of a split."""
        data = self.config.data
        # A part of n tokens is counted as n - 1 positions.
        return sample_rows(
            dataset, split, kind=self.kind, max_length=self.longest_prompt - 1, truncate=data.truncate
        )

    def start(self, trainer: Trainer, run_dir: Path | None) -> None:  # noqa: ARG002
        """Open the rewards, freeze the reference, and keep rounds of several steps in checkpoints."""
        if trainer.tokenizer is None:
            raise ConfigError(
                f"the objective {self.name} needs a tokenizer: rewards judge texts",
                fix="give Trainer(tokenizer=…)",
            )
        config: Any = unwrap(trainer.model).config.get_text_config()
        context, length = getattr(config, "max_position_embeddings", None), self.config.data.sequence_length
        if context is not None and length > context:
            raise ConfigError(
                f"data.sequence_length {length} exceeds the model's context of {context}",
                fix=f"use at most {context}, prompt and answer together",
            )
        self._rewards = make_rewards(
            self.settings.rewards, lambda model, options: RewardModelJudge(trainer, model, options)
        )
        self._source = RolloutSource(trainer)
        if self.settings.kl_weight:
            adapted = callable(getattr(trainer.model, "disable_adapter", None))
            self._reference = Reference() if adapted else frozen_reference(trainer)
        self._owner = trainer
        if self.settings.iterations > 1:
            trainer.stateful["rollouts"] = self._kept

    # ── rounds ───────────────────────────────────────────────────────────────────────────────────────────

    def batches(self, trainer: Trainer, step: int, indices: Sequence[int]) -> list[Batch]:
        """The micro-batches of a step: of a new round, or once more of the round under way."""
        number = step // self.settings.iterations
        if self.settings.iterations > 1:
            indices = trainer.step_rows(number)[: len(indices)]
        # A trainer that is tried has rounds of its own, which nobody keeps.
        keeps = trainer is self._owner and self.settings.iterations > 1
        rollouts = self._kept.rollouts if keeps and self._kept.round == number else None
        if rollouts is None or rollouts.rows != tuple(indices):
            rollouts = self.play(trainer, trainer.rows, indices, number)
            if keeps:
                self._kept.round, self._kept.rollouts = number, rollouts
        own = trainer.world.share(range(len(indices)))
        assert isinstance(own, range)
        return self._cut(trainer, rollouts, own)

    def evaluation_batches(self, trainer: Trainer, rows: Rows, indices: Sequence[int]) -> Iterable[Batch]:
        """Answers to the held-out prompts, always with the same dice."""
        return self._cut(trainer, self.play(trainer, rows, indices, _EVALUATION))

    def _cut(self, trainer: Trainer, rollouts: Rollouts, places: range | None = None) -> list[Batch]:
        self._figure_names = tuple(rollouts.figures)
        return list(rollouts.batches(trainer.micro_batch_size, places))

    def play(self, trainer: Trainer, rows: Rows, indices: Sequence[int], number: int) -> Rollouts:
        """Draw the answers of a round, have them judged, and score them under policy and reference.

        Each process draws and judges the answers to some of the prompts; all of them know the whole round.
        """
        assert self._source is not None
        prompts = [self._prompt(rows, index) for index in indices]
        own = own_range(trainer.world, len(prompts))
        self._source.take_weights(trainer.model)
        judged = in_all(
            trainer.world, lambda: self._draw_and_judge(trainer, rows, indices, prompts, own, number)
        )
        drawn = [group for part in judged for group in part.drawn]
        rewards_S = torch.cat([part.rewards_S for part in judged])
        # A process without prompts has judged nothing; the first one always has some.
        by_name = {
            name: torch.cat([part.by_name[name] for part in judged if part.drawn])
            for name in judged[0].by_name
        }
        rollouts = Rollouts.of(indices, prompts, [[each.token_ids for each in group] for group in drawn])
        rollouts.values[ENGINE] = torch.tensor([p for group in drawn for d in group for p in d.logprobs])
        rollouts.figures = _figures(rewards_S, by_name, [each for group in drawn for each in group])
        self._score(trainer, rollouts)
        rollouts.figures |= self.judge(rollouts, rewards_S)
        return rollouts

    def _draw_and_judge(
        self,
        trainer: Trainer,
        rows: Rows,
        indices: Sequence[int],
        prompts: Sequence[Sequence[int]],
        own: range,
        number: int,
    ) -> _Judged:
        """Answers to the prompts at the places ``own`` of a round, and their rewards."""
        assert self._source is not None
        assert self._rewards is not None
        if not own:
            return _Judged([], torch.zeros(0, dtype=torch.float64), {})
        drawn = self._source.draw({place: prompts[place] for place in own}, number)
        answers = [
            Answer(
                trainer.tokenizer.decode(list(prompts[place])),  # type: ignore[union-attr]
                each.text,
                tuple(prompts[place]),
                tuple(each.token_ids),
                each.truncated,
                rows[indices[place]].fields,
            )
            for place, group in zip(own, drawn, strict=True)
            for each in group
        ]
        return _Judged(drawn, *self._rewards(answers))

    def _prompt(self, rows: Rows, index: int) -> list[int]:
        sample = rows[index]
        tokens = [int(token) for token in sample.parts[0][0]]
        if not tokens:
            raise DataError(f"the prompt of {describe_row(rows, index)} is empty", fix="leave it out")
        if len(tokens) > self.longest_prompt:
            raise DataError(
                f"the prompt of {describe_row(rows, index)} has {len(tokens)} tokens; data.sequence_length "
                f"{self.config.data.sequence_length} less train.reinforce.max_new_tokens "
                f"{self.settings.max_new_tokens} leaves {self.longest_prompt}",
                fix="raise data.sequence_length, lower max_new_tokens, or leave the prompt out",
            )
        return tokens

    def _score(self, trainer: Trainer, rollouts: Rollouts) -> None:
        """Add to the values of tokens what the model says of them, in the micro-batches of training."""
        size, num = trainer.micro_batch_size, len(rollouts.rows)
        groups = [range(first, min(first + size, num)) for first in range(0, num, size)]
        own: list[tuple[range, dict[str, Tensor]]] = []
        with evaluating(trainer.model):
            turns = ((turn, rollouts.batch(turn[0])) for turn in own_turns(trainer.world, groups))
            measures = trainer.passes.run_on_each(lambda m, batch: (self.measure(m, batch), batch), turns)
            for (places, counts), (measured, batch) in measures:
                order_N = label_order(batch).cpu()
                if counts:
                    own.append((places, {name: value_N.cpu()[order_N] for name, value_N in measured.items()}))
        found: dict[str, Tensor] = {}
        for places, values in itertools.chain.from_iterable(trainer.world.gather(own)):
            for name, value_N in values.items():
                whole_N = found.setdefault(name, value_N.new_empty(int(rollouts.answer_lengths_S.sum())))
                whole_N[rollouts.tokens_at(places)] = value_N
        rollouts.values |= found

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What must be known of the tokens before the first step on them, in row order."""
        found = self.measure_reference(model, batch)
        if (
            self.settings.iterations > 1
        ):  # else the model is still the one that it was, and its own ratio is 1
            found[OLD] = token_logprobs(model, batch, temperature=self.settings.temperature)[0]
        return found

    def measure_reference(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Log-probabilities under the reference, where there is one."""
        if self._reference is None:
            return {}
        logprobs = functools.partial(token_logprobs, temperature=self.settings.temperature)
        return {REFERENCE: self._reference.run(model, logprobs, batch)[0]}

    def judge(self, rollouts: Rollouts, rewards_S: Tensor) -> dict[str, float]:
        """Set the values ADVANTAGES; returns further figures of the round."""
        raise NotImplementedError

    # ── the loss ─────────────────────────────────────────────────────────────────────────────────────────

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Tokens of answers, or answers."""
        assert batch.sequences is not None
        if self.settings.loss == "tokens":
            return {TOKENS: batch.num_valid}
        return {ANSWERS: float(len(batch.sequences))}

    def losses(
        self, losses_N: Tensor, batch: Batch, metrics: Mapping[str, tuple[Tensor | float, float]]
    ) -> Losses:
        """The sum over tokens, or over answers of the mean over their tokens."""
        counts = self.counts(batch)
        if self.settings.loss == "tokens":
            return Losses({TOKENS: losses_N.sum()}, counts, metrics)
        num_tokens_S = sequence_sums(torch.ones_like(losses_N), batch)
        return Losses({ANSWERS: (sequence_sums(losses_N, batch) / num_tokens_S).sum()}, counts, metrics)

    def policy_losses(
        self, logp_N: Tensor, entropy_N: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, tuple[Tensor | float, float]]]:
        """The clipped surrogate at every token, and the metrics that every objective has."""
        settings, extras, num = self.settings, batch.extras, len(logp_N)
        old_N = extras[OLD].to(logp_N.dtype) if OLD in extras else logp_N.detach()
        advantages_N = extras[ADVANTAGES].to(logp_N.dtype)
        losses_N, clipped_N = clipped_policy_losses(
            logp_N, old_N, advantages_N, low=settings.clip_low, high=settings.clip_high
        )
        assert batch.sequences is not None
        num_answers = len(batch.sequences)
        metrics: dict[str, tuple[Tensor | float, float]] = {
            name: (value * num_answers, num_answers)
            for name, value in zip(self._figure_names, extras[FIGURES].tolist(), strict=True)
        }
        metrics |= {
            "entropy": (entropy_N.sum(), num),
            "clip_share": (clipped_N.sum(), num),
            "ratio": ((logp_N.detach() - old_N).exp().sum(), num),
        }
        if settings.temperature == 1.0:  # the engine tells log-probabilities of the untempered distribution
            metrics["engine_mismatch"] = ((extras[ENGINE].to(old_N.dtype) - old_N).abs().sum(), num)
        if REFERENCE in extras:
            reference_N = extras[REFERENCE].to(logp_N.dtype)
            metrics["kl"] = (divergences(logp_N.detach(), reference_N).sum(), num)
        return losses_N, metrics


@dataclass(frozen=True)
class _Judged:
    """Of some of the prompts the answers, the rewards of those, and each reward by its name."""

    drawn: list[list[Draw]]
    rewards_S: Tensor
    by_name: Mapping[str, Tensor]


def _figures(rewards_S: Tensor, by_name: Mapping[str, Tensor], answers: Sequence[Draw]) -> dict[str, float]:
    """Mean and deviation of the rewards, and of the lengths of answers."""
    figures = {"reward": float(rewards_S.mean()), "reward_std": float(rewards_S.std(correction=0))}
    for name, values_S in by_name.items():
        figures[f"reward_{name}"] = float(values_S.mean())
        figures[f"reward_{name}_std"] = float(values_S.std(correction=0))
    lengths_S = torch.tensor([len(each.token_ids) for each in answers], dtype=torch.float64)
    figures["completion_length"] = float(lengths_S.mean())
    figures["truncated"] = sum(each.truncated for each in answers) / len(answers)
    return figures
