"""Group relative policy optimisation (Shao et al. 2024, DeepSeekMath, section 4.1).

An answer is compared with the other answers to its prompt; there is no value model. ``loss: sequences`` is
the paper's mean over answers of their token means, ``loss: tokens`` DAPO's mean over all tokens of the step
(Yu et al. 2025, section 3.3); different clips below and above are DAPO's, too (section 3.1).

Shape suffixes: P prompts, G answers of a prompt, S answers, N tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hearth.errors import ConfigError
from hearth.training.batches import Batch
from hearth.training.logprobs import token_logprobs
from hearth.training.objectives.base import Losses
from hearth.training.objectives.reinforce import ADVANTAGES, REFERENCE, ReinforceObjective
from hearth.training.rollouts.batching import Rollouts
from hearth.training.rollouts.formulas import divergences, even_groups, group_advantages


class GRPO(ReinforceObjective):
    """Makes answers likelier that are better than the others to the same prompt."""

    name = "grpo"
    reads = frozenset({"scale_advantages"})

    def check(self, dataset: Any) -> None:
        """Refuse groups of one besides: their advantage is always zero."""
        super().check(dataset)
        if self.settings.num_generations < 2:
            raise ConfigError(
                "train.reinforce.num_generations is 1, but grpo compares the answers to a prompt",
                fix="use 2 or more, such as 8; or train.objective: ppo",
            )

    def judge(self, rollouts: Rollouts, rewards_S: Tensor) -> dict[str, float]:
        """Advantages within each group; the share of groups in which there is nothing to learn."""
        rewards_PG = rewards_S.view(-1, rollouts.num_generations)
        advantages_S = group_advantages(rewards_PG, scale=self.settings.scale_advantages).flatten()
        rollouts.values[ADVANTAGES] = advantages_S.repeat_interleave(rollouts.answer_lengths_S)
        return {"groups_without_variance": float(even_groups(rewards_PG).double().mean())}

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """The clipped surrogate and the divergence from the reference."""
        temperature = self.settings.temperature
        logp_N, entropy_N = token_logprobs(model, batch, temperature=temperature, with_entropy=True)
        losses_N, metrics = self.policy_losses(logp_N, entropy_N, batch)
        if self.settings.kl_weight:
            reference_N = batch.extras[REFERENCE].to(logp_N.dtype)
            losses_N = losses_N + self.settings.kl_weight * divergences(logp_N, reference_N)
        return self.losses(losses_N, batch, metrics)
