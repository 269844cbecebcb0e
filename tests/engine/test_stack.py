"""The layers in one call of the compiled kernels against transformers' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hearth.engine import Engine, SamplingParams, native
from hearth.engine.runner import distance

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
# Queries grow beyond position 128, of which a short text shows nothing.
SCALED_QUERIES = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
# What else a layer does, the reading cannot see, and the comparison must.
OTHER = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
UNSUITED: dict[str, tuple[dict[str, Any], str]] = {
    "granite": ({**OTHER, "residual_multiplier": 0.4, "attention_multiplier": 0.2}, "differ from its own by"),
    "glm": ({**HEADS, "partial_rotary_factor": 0.5, "pad_token_id": 0}, "are not merely rotated"),
    "ministral3": ({**OTHER, "rope_parameters": SCALED_QUERIES}, "queries at position 255 are not merely"),
    "mixtral": ({**OTHER, "num_local_experts": 4}, "MixtralSparseMoeBlock"),
    "cohere": (OTHER, "CohereLayerNorm is no norm"),
}
SUITED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases
    "qwen3": HEADS,  # norms of each head
    "mistral": {"head_dim": 32, "sliding_window": 8},
    "gemma2": {**HEADS, "query_pre_attn_scalar": 32, "sliding_window": 8},  # soft cap, four norms, 1 + weight
    "gemma3_text": {**HEADS, "sliding_window": 8},  # two rotary tables
    "olmo2": {},  # norms after the halves, and over all heads
    "phi3": {},  # merged projections
    "starcoder2": {"sliding_window": 8},  # layer norms, a plain MLP
    "stablelm": {"partial_rotary_factor": 0.25},
}


def make(family_model: Any, family: str) -> Any:
    return family_model(family, **{**OTHER, **SUITED[family]})


def logits_of(engine: Engine, prompts: list[list[int]]) -> torch.Tensor:
    params = SamplingParams(max_tokens=1, temperature=0)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    return engine.runner.execute(engine.scheduler.schedule())


@pytest.mark.parametrize("family", SUITED)
def test_the_stack_computes_what_the_modules_compute(
    family: str, family_model: Any, prompts: list[list[int]]
) -> None:
    wide = make(family_model, family)
    with torch.no_grad():
        expected = [wide(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    errors = {}
    for use_native in (True, False):
        model = make(family_model, family).to(torch.bfloat16)
        with Engine.from_model(model, native=use_native) as engine:
            assert (engine.runner.stack is not None) is use_native
            logits = logits_of(engine, prompts)
            errors[use_native] = max(distance(a, b) for a, b in zip(logits, expected, strict=True))
    # bfloat16 is some way from float32 either way; the kernels, which round less often, not farther.
    assert errors[True] < max(1.5 * errors[False], 0.02)


@pytest.mark.parametrize("family", UNSUITED)
def test_layers_of_another_form_run_module_by_module(
    family: str, family_model: Any, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    changes, reason = UNSUITED[family]
    model = family_model(family, **changes).to(torch.bfloat16)
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts]
    with caplog.at_level("INFO"), Engine.from_model(model) as engine:
        assert engine.runner.stack is None
        assert reason in caplog.text
        for got, want in zip(logits_of(engine, prompts), expected, strict=True):
            assert distance(got, want) < 0.05


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])  # the second with windows and soft caps
def test_decoding_in_any_chunks_gives_the_same_tokens(
    family: str, family_model: Any, prompts: list[list[int]]
) -> None:
    """The kernels sum in another order for other numbers of rows: in bfloat16 the same up to rounding, so the
    tokens are compared where the best is clear of the second."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=2)
    answers = []
    for budget in (2048, 7):
        model = make(family_model, family).to(torch.bfloat16)
        with Engine.from_model(model, max_num_batched_tokens=budget) as engine:
            assert engine.runner.stack is not None
            answers.append(engine.generate(prompts, params))
            engine.scheduler.check()
    for one, other in zip(*answers, strict=True):
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
            if a.token_id != b.token_id:
                assert a.top[0][1] - a.top[1][1] < 0.1
                break
            assert a.logprob == pytest.approx(b.logprob, abs=0.1)
