"""Odds-ratio preference optimisation: one stage, no reference (Hong et al. 2024, eqs. 6 and 7).

The token loss of the chosen answer, plus a term on the odds of both answers, odds(p) = p / (1 - p), where p
is the geometric mean of the probabilities of an answer's tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hearth.training.objectives.preference import PairObjective, Pairs

_LARGEST_LOGP = -1e-6  # odds of a certain answer are infinite


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(p / (1 - p)) for log p."""
    logp = mean_logp.clamp(max=_LARGEST_LOGP)
    return logp - torch.log(-torch.expm1(logp))


class ORPO(PairObjective):
    """The chosen answer's token loss, over its own tokens alone, and ``odds_weight`` times the odds ratio."""

    name = "orpo"
    reads = frozenset({"odds_weight"})

    @property
    def token_weight(self) -> float:
        """One for the token loss that belongs to ORPO; ``sft_weight`` adds to it."""
        return 1.0 + self.settings.sft_weight

    def pair_losses(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Losses, and log-odds as rewards."""
        rewards_P2 = log_odds(pairs.mean_logp_P2)
        return -self.settings.odds_weight * F.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1]), rewards_P2
