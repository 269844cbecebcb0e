"""Embeddings: transformers' last hidden states, pooled, whatever the steps were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.engine import AsyncEngine, Engine, SamplingParams
from hearth.engine.embedding import pooling_of
from hearth.engine.outputs import Embedding
from hearth.errors import EngineError, RequestError

POOLINGS = ("mean", "last", "cls")


@pytest.fixture(scope="module")
def engine(family_model: Any, tokenizer: Any) -> Iterator[Engine]:
    with Engine.from_model(
        family_model("llama"), tokenizer, max_model_len=64, block_size=8, max_num_batched_tokens=32
    ) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine: Engine = request.getfixturevalue("engine")
        engine.scheduler.check()
        assert not engine.has_work
        assert not engine._sequences
        assert engine.pool.num_used == 0


def expected(model: Any, prompt: list[int], pooling: str, *, normalize: bool = True) -> torch.Tensor:
    with torch.inference_mode():
        hidden_TD = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    pooled_D = {"mean": hidden_TD.mean(0), "last": hidden_TD[-1], "cls": hidden_TD[0]}[pooling]
    return torch.nn.functional.normalize(pooled_D, dim=0) if normalize else pooled_D


def check(got: Embedding, want_D: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(got.embedding), want_D, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_hidden_states_of_transformers(
    engine: Engine, family_model: Any, prompts: list[list[int]], pooling: str, normalize: bool
) -> None:
    """Prompts of 1 to 64 tokens in steps of 32; the second time there are cached prefixes."""
    model = family_model("llama")
    every = [*prompts, list(range(3, 67))]  # the last one fills the context
    for _ in range(2):
        for prompt, got in zip(every, engine.embed(every, pooling, normalize=normalize), strict=True):
            check(got, expected(model, prompt, pooling, normalize=normalize))
            assert got.num_prompt_tokens == len(prompt)
            assert pooling == "last" or got.num_cached_tokens == 0


@pytest.mark.parametrize("other", ["gpt2", "opt", "gemma2"])
def test_other_families(family_model: Any, other: str) -> None:
    prompt = [5, 6, 7, 8, 9]
    with Engine.from_model(family_model(other), max_model_len=64) as engine:
        for pooling in POOLINGS:
            check(engine.embed([prompt], pooling)[0], expected(family_model(other), prompt, pooling))


def test_beside_generation_and_after_preemption(engine: Engine, family_model: Any) -> None:
    """Short of blocks, in one batch with requests that generate; both are as they are alone."""
    model = family_model("llama")
    prompts = [[3 + i * 5 + j for j in range(24)] for i in range(4)]
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    alone = engine.generate(prompts, greedy)
    block_bytes = engine.runner.num_bytes // engine.pool.num_blocks
    with Engine.from_model(
        family_model("llama"),
        max_model_len=64,
        block_size=8,
        max_num_batched_tokens=8,
        kv_cache_memory=12 * block_bytes,
    ) as tight:
        tokens: dict[str, list[int]] = {}
        embeddings: dict[str, Any] = {}
        for i, prompt in enumerate(prompts):
            tight.add_request(f"text-{i}", prompt, greedy)
            tight.add_embedding(f"mean-{i}", prompt[::-1], "mean")
            tight.add_embedding(f"last-{i}", prompt[::-1], "last")
        while tight.has_work:
            for output in tight.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.embedding is not None:
                    embeddings[output.request_id] = output.embedding
            tight.scheduler.check()
        assert tight.stats().num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert tokens[f"text-{i}"] == alone[i].token_ids
        for pooling in ("mean", "last"):
            got = torch.tensor(embeddings[f"{pooling}-{i}"])
            torch.testing.assert_close(got, expected(model, prompt[::-1], pooling), atol=1e-4, rtol=1e-4)


def test_abort_and_refusals(engine: Engine) -> None:
    engine.add_embedding("gone", [5] * 60, "mean")
    engine.step()
    outputs = engine.abort("gone")
    assert [(o.finish_reason, o.embedding) for o in outputs] == [("abort", None)]
    for prompt, pooling, param in (
        ([5] * 65, "mean", "prompt"),
        ([], "mean", "prompt"),
        ([320], "mean", "prompt"),
        ([5], "max", "pooling"),
    ):
        with pytest.raises(RequestError) as caught:
            engine.embed([[5], prompt], pooling)
        assert caught.value.param == param
        assert not engine.has_work


def test_a_failing_step_fails_its_embeddings(engine: Engine, monkeypatch: Any) -> None:
    def broken(plan: Any) -> Any:
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "execute", broken)
        with pytest.raises(EngineError, match="no more"):
            engine.embed([[5, 6]])
    assert len(engine.embed([[5, 6]])) == 1


def test_the_pooling_that_a_model_directory_asks_for(tmp_path: Path) -> None:
    assert pooling_of(None, None) == "last"
    assert pooling_of(tmp_path, None) == "last"
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    for settings, pooling in (
        (
            {
                "word_embedding_dimension": 8,
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": False,
            },
            "cls",
        ),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ):
        (folder / "config.json").write_text(json.dumps(settings))
        assert pooling_of(tmp_path, None) == pooling
        assert pooling_of(tmp_path, "mean") == "mean"
    for text in (json.dumps({"pooling_mode_max_tokens": True}), "{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(RequestError, match=r"config\.json"):
            pooling_of(tmp_path, None)


async def test_in_a_process_of_its_own(model_dir: Path, family_model: Any) -> None:
    engine = await AsyncEngine.start(model_dir, max_model_len=64, num_threads=1)
    try:
        got = await engine.embed([5, 6, 7], "mean")
        check(got, expected(family_model("llama"), [5, 6, 7], "mean"))
        with pytest.raises(RequestError, match="pooling"):
            await engine.embed([5], "max")
        with pytest.raises(RequestError, match="holds no more"):
            await engine.embed([5] * 65)
        assert len((await engine.embed([5] * 64)).embedding) == 64
    finally:
        await engine.close()


def test_no_numbers_are_an_error_and_nobody_reuses_their_blocks(family_model: Any, tokenizer: Any) -> None:
    model = family_model("llama")
    with Engine.from_model(model, tokenizer, max_model_len=64, block_size=8) as engine:
        prompt = list(range(3, 40))
        norm = engine.runner.model.base_model.norm
        hook = norm.register_forward_hook(lambda module, inputs, out: out * float("nan"))
        with pytest.raises(EngineError, match="NaN or infinity"):
            engine.embed([prompt], "last")
        hook.remove()
        assert engine.pool.num_cached == 0
        assert dict(engine.stats().finished) == {"error": 1}
        check(engine.embed([prompt], "last")[0], expected(model, prompt, "last"))
