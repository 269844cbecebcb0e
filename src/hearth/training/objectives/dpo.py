"""Direct preference optimisation: the policy itself is the reward model (Rafailov et al. 2023, eq. 7).

With label smoothing it is conservative DPO: a share of the comparisons is taken to be the wrong way round
(Mitchell 2023, "A note on DPO with noisy preferences").
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hearth.training.objectives.preference import PairObjective, Pairs


def dpo_losses(margins_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood that chosen beats rejected, whose scaled log-ratios differ by ``margins_P``."""
    right = -F.logsigmoid(margins_P)
    if not label_smoothing:
        return right
    return (1 - label_smoothing) * right - label_smoothing * F.logsigmoid(-margins_P)


class DPO(PairObjective):
    """Raises log-ratios of chosen over rejected answers, as far as ``beta`` lets the policy leave."""

    name = "dpo"
    has_reference = True
    reads = frozenset({"beta", "label_smoothing"})

    def pair_losses(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Losses, and beta times the log-ratios as rewards."""
        rewards_P2 = self.settings.beta * pairs.log_ratio_P2
        return dpo_losses(rewards_P2[:, 0] - rewards_P2[:, 1], self.settings.label_smoothing), rewards_P2
