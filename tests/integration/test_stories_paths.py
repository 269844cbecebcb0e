"""A real model says its known text, 256 greedy tokens, whatever way the engine goes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from hearth.engine import Engine, SamplingParams
from hearth.models.llama2c import import_llama2c

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

GOLDEN_SHA256 = "30b2ffb07967"
PARAMS = SamplingParams(max_tokens=256, temperature=0)
BLOCK_BYTES = 5 * 2 * 4 * 8 * 4 * 16  # layers x (keys and values) x KV heads x dim x float32 x tokens
PATHS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "in chunks of 5": {"max_num_batched_tokens": 5},
    "by torch": {"attention": "torch", "prepack": False},
    "small blocks": {"block_size": 4},
    "without prefix cache": {"prefix_cache": False},
    "drafts from its own text": {"speculation": "ngram", "num_draft_tokens": 6},
    "two processes": {"tensor_parallel": 2},
}


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, out = shared_data / "stories260K", tmp_path_factory.mktemp("stories") / "model"
    import_llama2c(folder / "stories260K.bin", folder / "tok512.bin", out)
    return out


def is_known(text: str) -> bool:
    return hashlib.sha256(text.encode()).hexdigest().startswith(GOLDEN_SHA256)


@pytest.mark.parametrize("path", PATHS)
def test_the_known_text_by_every_path(path: str, stories: Path) -> None:
    with Engine.load(stories, **PATHS[path]) as engine:
        first, again = (engine.generate([[1]], PARAMS)[0] for _ in range(2))
    assert is_known(first.text), first.text
    assert again.text == first.text


def test_the_known_text_with_itself_as_draft_model(stories: Path) -> None:
    with Engine.load(stories, speculation=str(stories)) as engine:
        assert is_known(engine.generate([[1]], PARAMS)[0].text)
        stats = engine.stats()
    assert stats.num_accepted_tokens > 0.9 * stats.num_draft_tokens > 0


@pytest.mark.parametrize("swap_memory", [0, 64 * BLOCK_BYTES], ids=["recompute", "swap"])
def test_the_known_text_after_preemption(swap_memory: int, stories: Path) -> None:
    # 24 blocks of 16 tokens for four sequences of 257: somebody always has to go.
    with Engine.load(
        stories, block_size=16, max_model_len=300, kv_cache_memory=24 * BLOCK_BYTES, swap_memory=swap_memory
    ) as engine:
        completions = engine.generate([[1]] * 4, PARAMS)
        stats = engine.stats()
    assert stats.num_preemptions > 0
    assert all(is_known(completion.text) for completion in completions)


def test_the_known_text_after_a_cached_prefix(stories: Path) -> None:
    with Engine.load(stories, block_size=8) as engine:
        tokens = engine.generate([[1]], PARAMS)[0].token_ids
        warm = engine.generate([[1, *tokens[:100]]], SamplingParams(max_tokens=156, temperature=0))[0]
    assert warm.num_cached_tokens == 96
    assert warm.token_ids == tokens[100:]
