"""Preemption, swapping and sliding windows with real models: whatever happens to its blocks, a sequence gets
the tokens that it gets alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedModel

from hearth.engine import support
from hearth.engine.llm import Engine
from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan
from hearth.errors import ConfigError


def make_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in lengths]


PROMPTS = make_prompts((30, 25, 23, 40, 20))
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
NUM_BLOCKS = 40  # of 4 tokens: two of the sequences fit, and a third one nearly


def make_engine(model: PreTrainedModel, num_blocks: int, **fields: Any) -> Engine:
    """A float32 engine with blocks of 4 tokens."""
    memory = num_blocks * block_bytes_of(model)
    return Engine.from_model(model, block_size=4, max_model_len=100, kv_cache_memory=memory, **fields)


def block_bytes_of(model: PreTrainedModel) -> int:
    specs = support.examine(model)
    return 4 * sum(spec.bytes_per_token(model.dtype) for _, spec in specs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "gpt_oss", "mistral"])
def test_the_same_tokens_whichever_way_a_sequence_comes_back(family: str, family_model: Any) -> None:
    with make_engine(family_model(family), 400) as engine:
        expected = [done.token_ids for done in engine.generate(PROMPTS, GREEDY)]
        assert engine.stats().num_preemptions == 0
    with make_engine(family_model(family), NUM_BLOCKS) as engine:
        computed = [done.token_ids for done in engine.generate(PROMPTS, GREEDY)]
        stats = engine.stats()
        assert stats.num_host_blocks == stats.num_blocks_swapped_in == 0
        # With a window, sequences give up what is out of sight and fit.
        assert (stats.num_preemptions > 0) == (family != "mistral")
    with make_engine(family_model(family), NUM_BLOCKS, swap_memory=10**7) as engine:
        costs = engine.scheduler.costs
        assert costs.bytes_per_second is not None
        assert costs.bytes_per_second > 0
        costs.bytes_per_second = 1e30
        copied = [done.token_ids for done in engine.generate(PROMPTS, GREEDY)]
        stats = engine.stats()
        assert (stats.num_blocks_swapped_in > 0) == (family != "mistral")
        assert stats.num_blocks_swapped_out >= stats.num_blocks_swapped_in
        engine.scheduler.check()
        engine.pool.begin_step()
        assert engine.stats().num_used_host_blocks == 0
    assert computed == expected
    assert copied == expected


def test_a_step_that_fails_while_copying_ends_its_requests_and_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, family_model: Any
) -> None:
    with make_engine(family_model("llama"), NUM_BLOCKS, swap_memory=10**7) as engine:
        engine.scheduler.costs.bytes_per_second = 1e30
        expected = engine.generate(PROMPTS[:1], GREEDY)[0].token_ids
        assert engine.runner.host is not None
        copy = engine.runner.host.copy

        def fail(plan: Plan) -> None:
            if plan.swap_in:
                raise MemoryError("no memory to copy to")
            copy(plan)

        with monkeypatch.context() as patch:
            patch.setattr(engine.runner.host, "copy", fail)
            reasons: list[str | None] = []
            for i, prompt in enumerate(PROMPTS):
                engine.add_request(str(i), prompt, GREEDY)
            while engine.has_work:
                reasons += [output.finish_reason for output in engine.step() if output.finished]
                engine.scheduler.check()
        assert reasons.count("error") > 0
        assert len(reasons) == len(PROMPTS)
        engine.pool.begin_step()
        stats = engine.stats()
        assert stats.num_used_host_blocks == stats.num_used_blocks == 0
        assert engine.generate(PROMPTS[:1], GREEDY)[0].token_ids == expected


def test_settings_that_cannot_swap_are_refused(family_model: Any) -> None:
    with pytest.raises(ConfigError, match="less than a KV block"):
        make_engine(family_model("llama"), NUM_BLOCKS, swap_memory=1)
    with pytest.raises(ConfigError, match="prefix cache"):
        make_engine(family_model("llama"), NUM_BLOCKS, swap_memory=10**6, prefix_cache=False)


@pytest.mark.parametrize("attention", ["torch", "numba"])
def test_freed_blocks_are_never_seen_by_a_model_with_windows(
    attention: str, family_model: Any, transformers_tokens: Any
) -> None:
    """A long text in a small part of the pool; what is given up is overwritten with nonsense at once."""
    model = family_model("mistral")
    size = block_bytes_of(model)
    prompt = make_prompts((50,))[0]
    expected = transformers_tokens(model, [prompt], 150)
    engine = Engine.from_model(
        model, block_size=4, max_model_len=200, kv_cache_memory=50 * size, attention=attention,
        max_num_batched_tokens=16, prefix_cache=False,
    )  # fmt: skip
    assert engine.pool.window == 8
    engine.add_request("r", prompt, SamplingParams(max_tokens=150, temperature=0.0))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
        engine.scheduler.check()
        assert engine.pool.num_used <= (8 - 1 + 16) // 4 + 2
        for layer in engine.runner.layers:
            for part in layer.pool.parts:
                part[engine.pool._free] = 1e4
    assert [tokens] == expected


def test_layers_that_differ_keep_everything(family_model: Any) -> None:
    with make_engine(family_model("gemma3_text"), 100) as engine:
        assert engine.pool.window == 0
