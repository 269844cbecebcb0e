"""What is known in closed form, which the simulator must agree with, and from which it takes its defaults."""

from __future__ import annotations

import math


def best_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of work between checkpoints that lose least: √(2 δ M) (Young 1974); M where δ is large.

    Daly 2006, "A higher order estimate of the optimum checkpoint interval", equation 37:
    √(2 δ M) (1 + ⅓ √(δ / 2M) + ⅑ (δ / 2M)) - δ for δ < 2M, else M.
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    interval = math.sqrt(2 * save_seconds * mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9)
    return max(interval - save_seconds, 0.0)


def expected_goodput(
    interval: float, save_seconds: float, restart_seconds: float, mtbf_seconds: float
) -> float:
    """Share of the time that is work which stays, for failures that come as a Poisson process.

    Daly 2006, equation 20: work of T takes M e^(R/M) (e^((τ + δ)/M) - 1) T / τ; failures may come during
    saves and restarts, too.
    """
    if interval <= 0:
        return 0.0
    exponent = (interval + save_seconds) / mtbf_seconds
    if exponent + restart_seconds / mtbf_seconds > 700:
        return 0.0
    total = mtbf_seconds * math.exp(restart_seconds / mtbf_seconds) * math.expm1(exponent)
    return interval / total


def expected_slowest(num_ranks: int, deviation: float) -> float:
    """Mean of the slowest of n processes whose times scatter normally around 1.

    Blom 1958: the expected largest of n normal values is about Φ⁻¹((n - 0.375) / (n + 0.25)) deviations.
    """
    from statistics import NormalDist

    if num_ranks < 2 or deviation == 0:
        return 1.0
    return 1.0 + deviation * NormalDist().inv_cdf((num_ranks - 0.375) / (num_ranks + 0.25))
