"""The arithmetic of the benchmarks of the engine and of training, and a run of each on a tiny model."""

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


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        ("engine", "--only", "decode,speed"),
        ("engine", "--peers", "sglang"),
        ("training", "--only", "sft,speed"),
        ("training", "--peers", "axolotl"),
    ],
)
def test_unknown_rows_and_peers_are_refused(script: str, option: str, value: str) -> None:
    result = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", option, value], cwd=ROOT, capture_output=True, text=True
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


@pytest.fixture
def training_figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trainers.figures

    return trainers.figures


def test_the_rate_of_training_leaves_out_the_first_step(training_figures: Any) -> None:
    # Steps of 2, 1 and 4 seconds after the first: 50, 120 and 20 tokens a second.
    assert training_figures.tokens_per_second([7.0, 9.0, 10.0, 14.0], [1000, 100, 120, 80]) == 50.0


def test_overhead_is_the_median_of_pairs_after_the_first(training_figures: Any) -> None:
    pairs = [(9.0, 1.0), (2.0, 1.9), (4.0, 2.0), (10.0, 9.9)]
    assert training_figures.overhead_share(pairs) == pytest.approx(0.05)
    assert training_figures.overhead_share([(4.0, 3.0)]) == 0.25


def test_losses_side_by_side(training_figures: Any) -> None:
    losses = {"hearth": [2.0, 1.0], "torch": [2.0, 1.01], "trl-default": [1.96, 1.0]}
    assert training_figures.largest_difference(losses, ours="hearth") == pytest.approx(0.02)
    assert training_figures.loss_table(losses).splitlines()[-1] == "| 2 | 1.0000 | 1.0100 | 1.0000 |"


def test_a_goal_is_a_least_or_a_most(training_figures: Any) -> None:
    goal = training_figures.Goal
    goals = [goal("a", 1.5, least=1.5), goal("b", 0.71, most=0.7), goal("c", None, least=1.0)]
    assert [each.reached for each in goals] == [True, False, False]
    table = training_figures.goal_table(goals).splitlines()
    assert table[2:] == ["| a | >= 1.5 | 1.500 | reached |", "| b | <= 0.7 | 0.710 | missed |"]


def test_a_step_is_cut_into_nearly_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    from job import evenly

    assert evenly(range(5), 2) == [[0, 1], [2, 3, 4]]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quick_run_of_training_measures_every_part_and_the_losses_agree() -> None:
    command = [sys.executable, "benchmarks/training.py", "--quick", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    has_gsm8k = (ROOT.parent / "shared/data/gsm8k/train.jsonl.gz").exists()
    assert found["notes"] == [] if has_gsm8k else "sft is skipped" in found["notes"][0]
    trained = {"pretrain, 300K": {"hearth", "transformers", "torch"}}
    if has_gsm8k:
        trained["sft, 300K"] = {"hearth", "torch"}
    assert {label: set(row) for label, row in found["tokens/s"].items()} == trained
    for label, names in trained.items():
        losses = found["losses"][label]
        assert set(losses) == names
        for name in names:
            assert losses[name] == pytest.approx(losses["hearth"], rel=1e-3)
    assert set(found["MiB"]["memory, 1M, 8192 entries: peak"]) == {"hearth", "transformers", "torch"}
    assert set(found["overhead %"]["overhead, 300K"]) == {"beside a bare step", "by the clock of the loop"}
    saves = found["checkpoint ms"]["checkpoint, 300K"]
    assert saves["hearth"]["stall"] < saves["hearth"]["seconds"]
    assert saves["transformers"]["stall"] == saves["transformers"]["seconds"]
