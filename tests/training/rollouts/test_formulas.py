"""Advantages and losses against independent formulas in float64, written without tensors where possible."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from hearth.training.rollouts.formulas import (
    clipped_policy_losses,
    clipped_value_losses,
    divergences,
    even_groups,
    generalised_advantages,
    group_advantages,
    whiten,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages(scale: bool) -> None:
    rewards_PG = random(5, 4)
    found = group_advantages(rewards_PG, scale=scale)
    for group, got in zip(rewards_PG.tolist(), found.tolist(), strict=True):
        mean, deviation = statistics.fmean(group), statistics.stdev(group) + 1e-4
        assert got == pytest.approx([(r - mean) / (deviation if scale else 1.0) for r in group], rel=1e-12)


@pytest.mark.parametrize("value", [0.1, 1.0, -3.3])
def test_an_even_group_has_advantages_of_exactly_zero(value: float) -> None:
    rewards_PG = torch.tensor([[value] * 7, [0.0] * 6 + [1.0]], dtype=torch.float64)
    assert group_advantages(rewards_PG)[0].eq(0).all()
    assert group_advantages(rewards_PG)[1].ne(0).all()
    assert even_groups(rewards_PG).tolist() == [True, False]


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_generalised_advantages_are_discounted_sums_of_surprises(discount: float, gae_lambda: float) -> None:
    lengths = [3, 1, 6]
    rewards_N, values_N = random(10, seed=1), random(10, seed=2)
    found = generalised_advantages(
        rewards_N, values_N, torch.tensor(lengths), discount=discount, gae_lambda=gae_lambda
    ).tolist()
    start = 0
    for length in lengths:
        r, v = rewards_N[start : start + length].tolist(), [*values_N[start : start + length].tolist(), 0.0]
        surprises = [r[t] + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            wanted = sum((discount * gae_lambda) ** (k - t) * surprises[k] for k in range(t, length))
            assert found[start + t] == pytest.approx(wanted, rel=1e-12, abs=1e-14)
        start += length


def test_with_lambda_one_an_advantage_is_the_return_less_the_value() -> None:
    rewards_N, values_N = random(8, seed=3), random(8, seed=4)
    found = generalised_advantages(rewards_N, values_N, torch.tensor([8]), discount=1.0, gae_lambda=1.0)
    returns_N = rewards_N.flip(0).cumsum(0).flip(0)
    assert torch.allclose(found, returns_N - values_N, rtol=0, atol=1e-13)


def test_whitening() -> None:
    found = whiten(random(50, seed=5) * 3 + 7)
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.std()) == pytest.approx(1, rel=1e-7)
    assert whiten(torch.tensor([4.0])).tolist() == [0.0]
    assert whiten(torch.full((3,), 2.0)).tolist() == [0.0] * 3


def test_clipped_policy_losses_and_their_gradients() -> None:
    low, high = 0.2, 0.3
    logp_N = (random(200, seed=6) * 0.5).requires_grad_()
    old_N, advantages_N = random(200, seed=7) * 0.5, random(200, seed=8)
    losses_N, clipped_N = clipped_policy_losses(logp_N, old_N, advantages_N, low=low, high=high)
    losses_N.sum().backward()
    assert logp_N.grad is not None
    cases = set()
    rows = zip(
        *(x.tolist() for x in (logp_N, old_N, advantages_N, losses_N, clipped_N, logp_N.grad)), strict=True
    )
    for logp, old, advantage, loss, clipped, slope in rows:
        ratio = math.exp(logp - old)
        held = min(max(ratio, 1 - low), 1 + high)
        assert loss == pytest.approx(-min(ratio * advantage, held * advantage), rel=1e-12)
        outside = (ratio < 1 - low and advantage < 0) or (ratio > 1 + high and advantage > 0)
        assert clipped == outside
        assert slope == pytest.approx(0.0 if outside else -advantage * ratio, rel=1e-10)
        cases.add((ratio < 1 - low, ratio > 1 + high, advantage > 0))
    assert len(cases) == 6


def test_divergences_are_never_negative_and_right_on_average() -> None:
    policy_V, reference_V = random(9, seed=9).log_softmax(0), random(9, seed=10).log_softmax(0)
    found_V = divergences(policy_V, reference_V)
    assert (found_V >= 0).all()
    for value, p, r in zip(found_V.tolist(), policy_V.tolist(), reference_V.tolist(), strict=True):
        assert value == pytest.approx(math.exp(r - p) - (r - p) - 1, rel=1e-10)
    expected = float((policy_V.exp() * found_V).sum())
    assert expected == pytest.approx(float((policy_V.exp() * (policy_V - reference_V)).sum()), rel=1e-12)


def test_clipped_value_losses() -> None:
    values_N, old_N, returns_N = random(100, seed=11), random(100, seed=12), random(100, seed=13)
    found = clipped_value_losses(values_N, old_N, returns_N, clip=0.2).tolist()
    rows = zip(*(x.tolist() for x in (values_N, old_N, returns_N)), found, strict=True)
    for value, old, wanted, loss in rows:
        held = old + min(max(value - old, -0.2), 0.2)
        assert loss == pytest.approx(0.5 * max((value - wanted) ** 2, (held - wanted) ** 2), rel=1e-12)
