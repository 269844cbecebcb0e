"""Proximal policy optimisation (Schulman et al. 2017) with a value head on the policy's decoder.

The reward of an answer comes at its last token. With ``kl_weight`` every token costs its log-ratio to the
reference, as in Ziegler et al. 2019, equation 2. Advantages are those of generalised advantage estimation
(Schulman et al. 2016), brought to mean 0 and deviation 1 over the tokens of the round.

Shape suffixes: S answers, N tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hearth.errors import ConfigError
from hearth.training.batches import IGNORE, Batch
from hearth.training.logprobs import token_logprobs
from hearth.training.objectives.base import Losses
from hearth.training.objectives.reinforce import ADVANTAGES, OLD, REFERENCE, ReinforceObjective
from hearth.training.rollouts.batching import Rollouts
from hearth.training.rollouts.formulas import clipped_value_losses, generalised_advantages, whiten
from hearth.training.rollouts.value_head import value_head_of, with_value_head
from hearth.training.rollouts.weights import keeping_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hearth.training.trainer import Trainer

VALUES, RETURNS = "values", "returns"  # Batch.extras, for every token of an answer


class PPO(ReinforceObjective):
    """Makes tokens likelier after which more came than the value head had expected."""

    name = "ppo"
    reads = frozenset({"value_weight", "value_clip", "discount", "gae_lambda"})

    def check(self, dataset: Any) -> None:
        """Refuse an adapter besides: the value head beside it would stay as it is."""
        super().check(dataset)
        if self.config.model.adapter is not None:
            raise ConfigError(
                "ppo trains a value head besides the model, which model.adapter would freeze",
                fix="use train.objective: grpo, or train all weights",
            )

    def adapt_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with a value head beside its output layer."""
        return with_value_head(model)

    def start(self, trainer: Trainer, run_dir: Path | None) -> None:
        """Refuse a model without a value head."""
        if value_head_of(trainer.model) is None:
            raise ConfigError(
                "ppo needs a model with a value head",
                fix="hearth.training.rollouts.value_head.with_value_head(model) puts one on it",
            )
        super().start(trainer, run_dir)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Values besides, from the same pass as the log-probabilities."""
        temperature = self.settings.temperature
        with keeping_hidden(model) as hidden:
            found = {OLD: token_logprobs(model, batch, temperature=temperature)[0]}
        found[VALUES] = self._values(model, hidden[0], batch)
        return found | self.measure_reference(model, batch)

    def _values(self, model: nn.Module, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """What is expected of an answer before each of its tokens; values_N."""
        head = value_head_of(model)
        assert head is not None
        found: Tensor = head(hidden_BTD[batch.labels_BT != IGNORE])
        return found

    def judge(self, rollouts: Rollouts, rewards_S: Tensor) -> dict[str, float]:
        """Rewards by token, advantages and returns."""
        values, settings, lengths_S = rollouts.values, self.settings, rollouts.answer_lengths_S
        values_N = values[VALUES].double()
        rewards_N = values_N.new_zeros(len(values_N))
        if REFERENCE in values:
            rewards_N -= settings.kl_weight * (values[OLD].double() - values[REFERENCE].double())
        rewards_N[lengths_S.cumsum(0) - 1] += rewards_S
        advantages_N = generalised_advantages(
            rewards_N, values_N, lengths_S, discount=settings.discount, gae_lambda=settings.gae_lambda
        )
        values[ADVANTAGES], values[RETURNS] = whiten(advantages_N), advantages_N + values_N
        return {"value": float(values_N.mean()), "return": float(values[RETURNS].mean())}

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """The clipped surrogate and the clipped error of the values."""
        settings, extras = self.settings, batch.extras
        with keeping_hidden(model) as hidden:
            logp_N, entropy_N = token_logprobs(
                model, batch, temperature=settings.temperature, with_entropy=True
            )
        values_N = self._values(model, hidden[0], batch)
        losses_N, metrics = self.policy_losses(logp_N, entropy_N, batch)
        old_values_N, returns_N = (extras[name].to(values_N.dtype) for name in (VALUES, RETURNS))
        value_losses_N = clipped_value_losses(values_N, old_values_N, returns_N, clip=settings.value_clip)
        metrics["value_loss"] = (value_losses_N.detach().sum(), len(value_losses_N))
        return self.losses(losses_N + settings.value_weight * value_losses_N, batch, metrics)
