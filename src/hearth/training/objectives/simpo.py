"""Simple preference optimisation: mean log-probability as reward, no reference (Meng et al. 2024, eq. 6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hearth.training.objectives.preference import PairObjective, Pairs


class SimPO(PairObjective):
    """``beta`` scales log-probabilities per token (2 to 2.5 in the paper); ``gamma`` is the target margin."""

    name = "simpo"
    reads = frozenset({"beta", "gamma"})

    def pair_losses(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Losses, and scaled log-probabilities per token as rewards."""
        rewards_P2 = self.settings.beta * pairs.mean_logp_P2
        return -F.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1] - self.settings.gamma), rewards_P2
