"""Sampling: the right distribution, reproducible draws, penalties as transformers has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hearth.engine.params import SamplingParams
from hearth.engine.sampler import SamplingState, sample

VOCAB = 40


def state(seed: int = 0, prompt: tuple[int, ...] = (1,), index: int = 0, **fields: Any) -> SamplingState:
    return SamplingState(SamplingParams(**fields), prompt, index, eos_ids=(2,), fallback_seed=seed)


def draw_many(logits_V: torch.Tensor, num: int, **fields: Any) -> np.ndarray:
    states = [state(seed, **fields) for seed in range(num)]
    return np.array(sample(logits_V.repeat(num, 1), states).token_ids)


CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "softmax": ({}, []),
    "temperature": ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
    "top-k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top-p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min-p": ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    "all": (
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution_of_transformers(case: str) -> None:
    """Chi-square against the softmax after transformers' own warpers; seeds are fixed, so no flakes."""
    fields, warpers = CASES[case]
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    warped_V = LogitsProcessorList(warpers)(torch.zeros(1, 1).long(), logits_V[None].clone())[0]
    expected_V = torch.softmax(warped_V, -1)
    num = 6000
    counts = np.bincount(draw_many(logits_V, num, **fields), minlength=VOCAB)
    possible = expected_V.numpy() > 0
    assert counts[~possible].sum() == 0, "a token was drawn that transformers rules out"
    expected = expected_V.double().numpy()[possible] * num
    rare = expected < 5
    observed = np.append(counts[possible][~rare], counts[possible][rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    wanted = wanted[keep] * observed[keep].sum() / wanted[keep].sum()
    assert stats.chisquare(observed[keep], wanted).pvalue > 1e-3


@pytest.mark.parametrize("fields", [{"top_p": 0.999}, {"min_p": 1e-6}, {"top_p": 0.9, "top_k": 700}])
def test_filters_wider_than_the_first_candidates(fields: dict[str, Any]) -> None:
    """A nearly flat distribution over 5000 tokens needs more than the first 256 candidates."""
    logits_V = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.1
    drawn = draw_many(logits_V, 300, **fields)
    rank = torch.argsort(torch.argsort(logits_V, descending=True))[drawn]
    limit = fields.get("top_k", 5000)
    assert int(rank.max()) < limit
    assert int(rank.max()) > limit * 0.7
    assert abs(float(rank.float().mean()) / limit - 0.5) < 0.12


def test_seeded_draws_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(12, 500, generator=torch.Generator().manual_seed(1))
    alone, mixed = state(seed=42, temperature=0.9, top_p=0.8), state(seed=42, temperature=0.9, top_p=0.8)
    tokens_alone = [sample(row[None].clone(), [alone]).token_ids[0] for row in logits]
    tokens_mixed = []
    for i, row in enumerate(logits):
        others = [state(seed=i, top_k=3), state(seed=i, temperature=0), state(seed=i)]
        batch = torch.stack([logits[0], row, logits[1], logits[2]])
        tokens_mixed.append(sample(batch, [others[0], mixed, others[1], others[2]]).token_ids[1])
    assert tokens_alone == tokens_mixed
    assert len(set(tokens_alone)) > 5


def test_seeded_draws_among_equal_logits_do_not_depend_on_the_batch() -> None:
    """bfloat16 has many equal logits, and a neighbour may need more of the candidates than the first ones."""
    logits = (torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * 0.1).bfloat16().float()
    for seed in range(50):
        fields = [{"top_k": 100}, {"top_p": 0.999}, {"top_k": 700, "top_p": 0.8}]
        mixed = sample(logits.repeat(3, 1), [state(seed=seed, **each) for each in fields]).token_ids
        assert mixed == [sample(logits.clone(), [state(seed=seed, **each)]).token_ids[0] for each in fields]


def test_sequences_of_one_seed_differ_by_index() -> None:
    logits = torch.zeros(1, 1000)
    first, second = state(seed=5, index=0), state(seed=5, index=1)
    assert sample(logits.clone(), [first]).token_ids != sample(logits.clone(), [second]).token_ids


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    one = state(prompt=(3, 4, 4), repetition_penalty=1.7, temperature=0)
    for token in (7, 9, 7):
        one.append(token)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 4, 4, 7, 9, 7]]), logits.clone())
    got = logits.clone()
    one.adjust(got[0])
    torch.testing.assert_close(got, expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    one = state(prompt=(3, 4), presence_penalty=0.5, frequency_penalty=0.25)
    for token in (7, 9, 7):
        one.append(token)
    got = torch.zeros(VOCAB)
    one.adjust(got)
    expected = torch.zeros(VOCAB)
    expected[7], expected[9] = -(0.5 + 2 * 0.25), -(0.5 + 0.25)
    torch.testing.assert_close(got, expected)


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 5.0  # the end of sequence
    one = state(temperature=0, min_tokens=1, logit_bias={11: 3.0}, stop_token_ids=(6,))
    assert sample(logits.clone(), [one]).token_ids == [11]
    one.append(11)
    assert sample(logits.clone(), [one]).token_ids == [2]


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    expected = torch.log_softmax(logits[0], -1)
    got = sample(logits.clone(), [state(logprobs=3, temperature=0, logit_bias={5: 100.0})]).logprobs[0]
    assert got is not None
    assert got.token_id == 5
    assert got.logprob == pytest.approx(float(expected[5]), abs=1e-6)
    values, ids = torch.topk(expected, 3)
    assert [token for token, _ in got.top] == ids.tolist()
    assert [value for _, value in got.top] == pytest.approx(values.tolist())


def test_extreme_temperatures_do_not_overflow() -> None:
    logits = torch.tensor([[1000.0, -1000.0, 999.0]])
    for temperature in (1e-6, 1e-50):  # the second is zero in float32
        assert sample(logits.clone(), [state(temperature=temperature)]).token_ids == [0]
        assert sample(logits.flip(1), [state(temperature=temperature, top_p=0.9)]).token_ids == [2]
    assert draw_many(logits[0], 50, temperature=100.0).max() <= 2


def test_a_top_k_beyond_the_vocabulary_keeps_all_of_it() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    for seed in range(20):
        drawn = [sample(logits.clone(), [state(seed=seed, top_k=k)]).token_ids for k in (VOCAB, 2**63 - 1)]
        assert drawn[0] == drawn[1]
