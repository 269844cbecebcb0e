"""Greedy output equals transformers' own `generate`, token for token, for many families and every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hearth.engine import Engine, SamplingParams

GREEDY = SamplingParams(max_tokens=64, temperature=0)
# How the same tokens may be computed: each is another path through scheduler, cache and kernels.
PATHS: dict[str, dict[str, Any]] = {
    "one budget for all": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 20": {"max_num_batched_tokens": 20},
    "one token at a time": {"max_num_batched_tokens": 1},
    "one sequence at a time": {"max_num_seqs": 1},
    "small blocks": {"block_size": 4},
    "torch attention": {"attention": "torch"},
    "torch attention, chunks of 7": {"attention": "torch", "max_num_batched_tokens": 7},
    "plain linears": {"prepack": False},
    "no prefix cache": {"prefix_cache": False},
}


def test_greedy_equals_transformers(
    family: str, family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> None:
    model = family_model(family)
    expected = transformers_tokens(model, prompts, 64)
    assert len({tuple(tokens) for tokens in expected}) > 2, "the model says the same to everything"
    with Engine.from_model(model, max_num_batched_tokens=64) as engine:
        completions = engine.generate(prompts, GREEDY)
        engine.scheduler.check()
    assert [c.token_ids for c in completions] == expected
    assert all(c.finish_reason == ("stop" if c.token_ids[-1] == 2 else "length") for c in completions)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt_oss"])
def test_same_tokens_by_every_path(
    family: str, path: str, family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> None:
    model = family_model(family)
    expected = transformers_tokens(model, prompts, 24)
    with Engine.from_model(model, max_model_len=128, **PATHS[path]) as engine:
        completions = engine.generate(prompts, SamplingParams(max_tokens=24, temperature=0))
        engine.scheduler.check()
        assert engine.pool.num_used == 0
    assert [c.token_ids for c in completions] == expected


def test_same_tokens_after_preemption(
    family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> None:
    model = family_model("qwen3")
    expected = transformers_tokens(model, prompts, 64)
    bytes_per_token = 3 * 2 * 2 * 24 * 4  # layers x (keys and values) x heads x dim x float32
    with Engine.from_model(
        model, block_size=4, max_model_len=104, kv_cache_memory=bytes_per_token * 104
    ) as engine:
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, GREEDY)
        tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
            engine.scheduler.check()
        assert engine.stats().num_preemptions > 0
    assert list(tokens.values()) == expected


def test_prefix_hit_gives_the_same_tokens(family_model: Any, transformers_tokens: Any) -> None:
    model = family_model("mistral")
    shared = list(range(10, 50))
    prompts = [[*shared, 7], [*shared, 8, 9], shared]
    expected = transformers_tokens(model, prompts, 16)
    with Engine.from_model(model, block_size=8) as engine:
        params = SamplingParams(max_tokens=16, temperature=0)
        cold = engine.generate(prompts, params)
        warm = engine.generate(prompts, params)
    assert [c.token_ids for c in cold] == [c.token_ids for c in warm] == expected
    assert [c.num_cached_tokens for c in cold] == [0, 40, 32]  # found while the first was being computed
    assert [c.num_cached_tokens for c in warm] == [40, 40, 32]


def test_bfloat16_stays_close_to_float32(family_model: Any, prompts: list[list[int]]) -> None:
    """The bfloat16 kernels: `self_test` compares them with transformers' own bfloat16 forward."""
    model = family_model("qwen3").to(torch.bfloat16)
    with Engine.from_model(model) as engine:
        assert engine.model_info["dtype"] == "bfloat16"
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        assert all(len(c.token_ids) == 8 for c in engine.generate(prompts, params))
