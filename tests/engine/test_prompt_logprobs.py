"""Log-probabilities of prompts, against transformers, however the prompt was cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hearth.engine import Engine, SamplingParams, TokenLogprob
from hearth.engine.prompt_logprobs import log_probabilities, max_positions


@pytest.fixture(scope="module")
def engine(family_model: Any) -> Iterator[Engine]:
    with Engine.from_model(
        family_model("llama"), max_model_len=128, block_size=8, max_num_batched_tokens=32
    ) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(engine: Engine) -> Iterator[None]:
    yield
    engine.scheduler.check()
    assert not engine.has_work
    assert engine.pool.num_used == 0


def asked(num_top: int = 3, **fields: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 5, "temperature": 0, "ignore_eos": True, "prompt_logprobs": num_top, **fields}
    )


def check(model: Any, prompt: list[int], got: list[TokenLogprob | None] | None, num_top: int = 3) -> None:
    with torch.inference_mode():
        expected_TV = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1)
    assert got is not None
    assert len(got) == len(prompt)
    assert got[0] is None
    for position, entry in enumerate(got[1:], start=1):
        assert entry is not None
        row_V = expected_TV[position - 1]
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(row_V[prompt[position]]), abs=2e-4)
        assert [value for _, value in entry.top] == pytest.approx(
            torch.topk(row_V, num_top)[0].tolist(), abs=2e-4
        )
        assert all(value == pytest.approx(float(row_V[token]), abs=2e-4) for token, value in entry.top)


@pytest.mark.parametrize("max_scores", [1000, 7, 1])
def test_those_of_transformers_for_any_chunk(
    engine: Engine, family_model: Any, prompts: list[list[int]], max_scores: int, monkeypatch: Any
) -> None:
    """Long and short prompts at once, in steps of 32 tokens of which few may want logits, twice."""
    monkeypatch.setattr(engine.scheduler, "max_num_scores", max_scores)
    model = family_model("llama")
    plain = engine.generate(prompts, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    for _ in range(2):  # the second time the prefix cache knows the prompts
        for completion, same in zip(engine.generate(prompts, asked()), plain, strict=True):
            check(model, completion.prompt_token_ids, completion.prompt_logprobs)
            assert completion.token_ids == same.token_ids
            assert completion.num_cached_tokens == 0
            assert completion.logprobs is None


def test_no_step_holds_more_logits_than_allowed(engine: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine.scheduler, "max_num_scores", 6)
    sizes = []
    execute = engine.runner.execute

    def record(plan: Any) -> torch.Tensor:
        logits_RV = execute(plan)
        sizes.append(len(logits_RV))
        return logits_RV

    monkeypatch.setattr(engine.runner, "execute", record)
    engine.generate([[5] * 40, [6] * 40], asked())
    assert max(sizes) <= 6 + 2  # and a decode of each
    assert max_positions(150_000) * 150_000 * 4 <= 64 * 2**20
    assert max_positions(10**9) == 1


def test_after_preemption(engine: Engine, family_model: Any) -> None:
    model = family_model("llama")
    prompts = [[3 + i * 5 + j for j in range(30)] for i in range(4)]
    block_bytes = engine.runner.num_bytes // engine.pool.num_blocks
    with Engine.from_model(
        family_model("llama"),
        max_model_len=70,
        block_size=8,
        max_num_batched_tokens=16,
        kv_cache_memory=16 * block_bytes,
    ) as tight:
        completions = tight.generate(prompts, asked(max_tokens=30))
        assert tight.stats().num_preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        check(model, prompt, completion.prompt_logprobs)


def test_once_for_several_sequences_and_on_the_first_output(engine: Engine, family_model: Any) -> None:
    prompt = list(range(3, 50))
    outputs = list(engine.stream(prompt, asked(0, n=3)))
    bearers = [output for output in outputs if output.prompt_logprobs is not None]
    assert len(bearers) == 1
    assert bearers[0].index == 0
    assert bearers[0] is next(output for output in outputs if output.index == 0)
    with torch.inference_mode():
        expected_TV = torch.log_softmax(family_model("llama")(torch.tensor([prompt])).logits[0], -1)
    for position, entry in enumerate(bearers[0].prompt_logprobs or []):
        if entry is not None:
            assert entry.top == []
            assert entry.logprob == pytest.approx(
                float(expected_TV[position - 1, prompt[position]]), abs=2e-4
            )


def test_a_prompt_of_one_token_and_an_abort(engine: Engine) -> None:
    assert engine.generate([[5]], asked())[0].prompt_logprobs == [None]
    engine.add_request("gone", [5] * 60, asked())
    engine.step()
    engine.abort("gone")


def test_rows_are_normalised_in_parts() -> None:
    logits_QV = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 3
    ids = list(range(40))
    got = log_probabilities(logits_QV, ids, 1)
    expected_QV = torch.log_softmax(logits_QV.double(), -1)
    assert [each.logprob for each in got] == pytest.approx([float(expected_QV[i, i]) for i in ids], abs=1e-5)
    assert [each.top[0][0] for each in got] == logits_QV.argmax(-1).tolist()
