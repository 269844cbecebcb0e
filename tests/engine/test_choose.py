"""Drafts change neither tokens nor text nor log-probabilities, wherever they are right or wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hearth.engine import Completion, Engine, Guided, SamplingParams


@pytest.fixture(scope="module")
def engine(family_model: Any, tokenizer: Any) -> Iterator[Engine]:
    model = family_model("llama")
    with Engine.from_model(model, tokenizer, block_size=8, prefix_cache=False) as engine:
        yield engine


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "ignore_eos": True},
    "penalties": {"seed": 1, "presence_penalty": 1.0, "repetition_penalty": 1.3, "ignore_eos": True},
    "filters": {"seed": 2, "top_p": 0.9, "top_k": 50, "min_p": 0.001, "ignore_eos": True},
    "ends": {"seed": 3, "logit_bias": {2: 6.0}, "min_tokens": 8},
    "stop": {"seed": 4, "stop": ("e", "o", "a"), "min_tokens": 4},
    "grammar": {"seed": 5, "guided": Guided(json={"type": "array", "items": {"type": "boolean"}})},
    "best of": {"seed": 6, "n": 1, "best_of": 3, "logit_bias": {2: 5.0}},
}


def generate_with_drafts(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, truth: list[dict[int, list[int]]]
) -> list[Completion]:
    """`generate`, with drafts before every step: the next tokens as they will be, the fourth one wrong."""
    schedule, num_accepted = engine.scheduler.schedule, 0

    def draft() -> Any:
        nonlocal num_accepted
        for request in engine.scheduler.running:
            if request.is_decoding and request.num_output_tokens:
                known = truth[prompts.index(request.prompt_token_ids)][request.index]
                right = known[request.num_output_tokens :][:3]
                request.draft_ids = [*right, 7 if len(known) == 0 or known[-1] != 7 else 8]
                num_accepted += len(right)
        return schedule()

    engine.scheduler.schedule = draft  # type: ignore[method-assign]
    try:
        completions = engine.generate(prompts, params)
    finally:
        del engine.scheduler.schedule
    assert num_accepted > 10
    return completions


@pytest.mark.parametrize("case", CASES)
def test_the_same_with_drafts(engine: Engine, prompts: list[list[int]], case: str) -> None:
    params = SamplingParams(max_tokens=24, logprobs=2, **CASES[case])
    every = SamplingParams(max_tokens=24, **{**CASES[case], "n": params.num_sequences, "best_of": None})
    truth = [{} for _ in prompts]
    for i, completion in enumerate(engine.generate(prompts, every)):
        truth[i // every.n][completion.index] = completion.token_ids
    plain = engine.generate(prompts, params)
    num_steps = engine.stats().num_steps
    drafted = generate_with_drafts(engine, prompts, params, truth)
    assert engine.stats().num_steps - num_steps < max(len(c.token_ids) for c in plain)
    for one, other in zip(plain, drafted, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert [entry.token_id for entry in other.logprobs] == other.token_ids
        for mine, its in zip(one.logprobs, other.logprobs, strict=True):
            assert its.logprob == pytest.approx(mine.logprob, abs=1e-4)
            assert [value for _, value in its.top] == pytest.approx([v for _, v in mine.top], abs=1e-4)
    engine.scheduler.check()
    assert engine.pool.num_used == 0
