"""Advantages and losses of reinforcement learning, as pure functions of tensors.

Shape suffixes: P prompts, G answers of a prompt, S answers, T tokens of one answer, N tokens of all answers
one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the deviation of a group, as Shao et al.'s authors and TRL do: an almost even group stays small.
_SMALL = 1e-4


def group_advantages(rewards_PG: Tensor, *, scale: bool = True) -> Tensor:
    """How much better than its group an answer is (Shao et al. 2024, section 4.1.2); advantages_PG.

    ``scale`` divides by the deviation of the group (of the sample, G - 1). A group whose rewards are all the
    same has advantages of exactly zero.
    """
    advantages_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if scale:
        advantages_PG = advantages_PG / (rewards_PG.std(1, keepdim=True) + _SMALL)
    return advantages_PG.masked_fill(even_groups(rewards_PG)[:, None], 0.0)


def even_groups(rewards_PG: Tensor) -> Tensor:
    """Which groups have one reward for all their answers, so that there is nothing to learn from."""
    return rewards_PG.amax(1) == rewards_PG.amin(1)


def generalised_advantages(
    rewards_N: Tensor, values_N: Tensor, lengths_S: Tensor, *, discount: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16); advantages_N.

    After the last token of an answer there is nothing: the value there is 0.
    """
    advantages_N = torch.empty_like(values_N)
    for rewards_T, values_T, found_T in zip(
        *(torch.split(each, lengths_S.tolist()) for each in (rewards_N, values_N, advantages_N)), strict=True
    ):
        following, advantage = values_T.new_zeros(()), values_T.new_zeros(())
        for t in reversed(range(len(values_T))):
            surprise = rewards_T[t] + discount * following - values_T[t]
            advantage = surprise + discount * gae_lambda * advantage
            found_T[t], following = advantage, values_T[t]
    return advantages_N


def whiten(values_N: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over all tokens; a single token stays 0."""
    centred_N = values_N - values_N.mean()
    return centred_N if len(values_N) < 2 else centred_N / (centred_N.std() + 1e-8)


def clipped_policy_losses(
    logp_N: Tensor, old_logp_N: Tensor, advantages_N: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate losses_N (Schulman et al. 2017, eq. 7), and which tokens are held by a clip.

    The ratio is held between ``1 - low`` and ``1 + high``; the two differ in DAPO (Yu et al. 2025, eq. 8).
    """
    ratio_N = (logp_N - old_logp_N).exp()
    held_N = ratio_N.clamp(1 - low, 1 + high)
    losses_N = -torch.minimum(ratio_N * advantages_N, held_N * advantages_N)
    with torch.no_grad():
        too_low_N = (ratio_N < 1 - low) & (advantages_N < 0)
        clipped_N = too_low_N | ((ratio_N > 1 + high) & (advantages_N > 0))
    return losses_N, clipped_N


def divergences(logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the reference at each token, estimated by ``r - 1 - log r`` with
    ``r = reference / policy`` (Schulman 2020, "Approximating KL divergence", k3): unbiased, never negative.
    """
    log_ratio_N = reference_logp_N - logp_N
    return torch.expm1(log_ratio_N) - log_ratio_N


def clipped_value_losses(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip: float) -> Tensor:
    """Half the squared error; a value that moves by more than ``clip`` counts as if it had not, if worse."""
    held_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_N - returns_N).square(), (held_N - returns_N).square())
