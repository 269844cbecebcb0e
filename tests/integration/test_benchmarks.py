"""The arithmetic of the engine benchmark, and a run of it on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 32,
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import inference.figures

    return inference.figures


def test_the_shape_counts_the_weights_of_the_model_itself(figures: Any) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG, tie_word_embeddings=True))
    shape = figures.Shape(CONFIG)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert shape.layer_weights + shape.head_weights == matrices
    assert shape.kv_bytes_per_token == 2 * (2 * 2 * 4) * 2  # layers x (keys and values) x two bytes


def test_operations_and_bytes_of_a_step(figures: Any) -> None:
    shape = figures.Shape(CONFIG)
    # One token: every weight twice, the head, and attention to itself (half of a product each way).
    linears = 2 * (shape.layer_weights + shape.head_weights)
    assert shape.prefill_operations(1, 1) == linears + 2 * 2 * 4 * 4
    assert shape.prefill_operations(3, 5) == 3 * shape.prefill_operations(1, 5)
    assert shape.decode_bytes(1000.0, 2, 10, 4) == 1000 + 2 * 12 * shape.kv_bytes_per_token


def test_the_decode_rate_leaves_out_what_came_with_the_first_tokens(figures: Any) -> None:
    answer = {"first": 1.0, "tokens_by_first": 20, "total": 3.0, "tokens": 80}
    assert figures.decode_rate(answer) == 30.0


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (95, 10), (100, 10), (1, 1)])
def test_percentiles(figures: Any, percent: float, expected: int) -> None:
    assert figures.percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == expected


def test_a_trace_is_stretched_to_the_rate_and_capped(figures: Any) -> None:
    lines = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.6805900,5000,109",
        "2023-11-16 18:15:51.6805900,0,55",
        "2023-11-16 18:16:06.6805900,91,16",
        "2023-11-16 18:19:06.6805900,91,16",
    ]
    arrivals = figures.scaled_trace(lines, rate=0.5, seconds=8, max_prompt=1000, max_output=50)
    assert [a.num_prompt_tokens for a in arrivals] == [374, 1000, 1, 91]
    assert [a.num_output_tokens for a in arrivals] == [44, 50, 50, 16]
    # 3 intervals at 0.5 requests a second are 6 s instead of 20: the proportions stay.
    assert [a.at for a in arrivals] == pytest.approx([0, 1.2, 1.5, 6])


def test_tokens_are_timed_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from peers.protocol import timed_steps

    steps = [[(0, 5)], [], [(0, 6), (1, 7)], [(1, 8)]]
    answer = timed_steps(iter(steps), 2)
    assert answer["tokens"] == 4
    assert answer["tokens_by_first"] == 3
    assert answer["last_ids"] == [6, 8]
    assert 0 < answer["first"] <= answer["total"]


def test_unknown_rows_and_peers_are_refused() -> None:
    for option, value in (("--only", "decode,speed"), ("--peers", "sglang")):
        result = subprocess.run(
            [sys.executable, "benchmarks/engine.py", option, value], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 2
        assert "choose from" in result.stderr


@pytest.mark.slow
def test_the_quick_run_measures_every_row_of_ours() -> None:
    command = [sys.executable, "benchmarks/engine.py", "--quick", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert found["notes"] == []
    labels = {label for table in found.values() if isinstance(table, dict) for label in table}
    for wanted in (
        "decode bf16, batch 32",
        "decode int8, batch 16",
        "decode int4, batch 1",
        "prefill bf16, 1 x 256",
        "96-token prefix, repeated",
        "start to first token, own process",
        "scheduling, 16 requests",
    ):
        assert wanted in labels
