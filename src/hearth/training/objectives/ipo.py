"""Identity preference optimisation: the margin is to reach a value, not infinity (Azar et al. 2023, eq. 17).

Log-ratios are taken per token. The paper does not say so, but its results are of that form (the authors to
TRL), and without it the squared loss grows with the length of the answers.
"""

from __future__ import annotations

from torch import Tensor

from hearth.training.objectives.preference import PairObjective, Pairs


def ipo_losses(margins_P: Tensor, beta: float) -> Tensor:
    """Squared distance of the difference of log-ratios per token from 1 / (2 beta)."""
    return (margins_P - 1 / (2 * beta)).square()


class IPO(PairObjective):
    """``beta`` is the tau of the paper: the smaller, the farther apart the answers are to be."""

    name = "ipo"
    has_reference = True
    reads = frozenset({"beta"})

    def pair_losses(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Losses, and log-ratios per token as rewards."""
        rewards_P2 = pairs.log_ratio_P2 / pairs.num_tokens_P2
        return ipo_losses(rewards_P2[:, 0] - rewards_P2[:, 1], self.settings.beta), rewards_P2
