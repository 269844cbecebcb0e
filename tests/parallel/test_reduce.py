"""Gradients that cross the wire in bfloat16 or as low-rank factors, between real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 4096,  # more gradients than DDP puts into its first bucket
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# Half the distance of neighbouring numbers, relative: 8 bits of significand.
ROUNDING = 2.0**-8
RANK = 4  # of powersgd's factors


def run(launch: Any, tmp_path: Path, parallel: dict[str, Any], **settings: Any) -> dict[str, Tensor]:
    out = tmp_path / "out.safetensors"
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"parallel": parallel, "model": QWEN3, **settings}))
    launch("reduce", 2, [str(file), str(out)])
    return load_file(out)


def under(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def sums(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What the gradients of the processes by themselves add up to."""
    first, second = (under(found, f"{name}/local{rank}/") for rank in range(2))
    return {key: first[key] + second[key] for key in first}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative."""
    assert found.keys() == expected.keys()
    difference = sum((found[key] - expected[key]).double().square().sum() for key in expected)
    whole = sum(expected[key].double().square().sum() for key in expected)
    return float(torch.as_tensor(difference / whole).sqrt())


@pytest.fixture
def gradients(launch: Any, tmp_path: Path) -> dict[str, Tensor]:
    """Of two processes with two micro-batches each, in every way to add them up."""
    ways = {
        "fp32": {"data": 2},
        "bf16": {"data": 2, "reduce": "bf16"},
        "powersgd": {"data": 2, "reduce": "powersgd"},
        "zero3": {"shard": 2},
        "zero3-bf16": {"shard": 2, "reduce": "bf16"},
        "zero1-bf16": {"shard": 2, "zero": 1, "reduce": "bf16"},
    }
    return run(launch, tmp_path, ways, micro_batches=2, length=24, repeats=24)


def test_gradients(gradients: dict[str, Tensor]) -> None:
    expected = sums(gradients, "fp32")
    for way in ("fp32", "zero3"):
        assert distance(under(gradients, f"{way}/0/"), expected) < 1e-6, way
    check_rounding(gradients, "bf16", rounds=1)
    for way in ("zero3-bf16", "zero1-bf16"):
        check_rounding(gradients, way, rounds=2)
    check_powersgd(gradients)
    check_bytes(gradients)


def check_rounding(found: dict[str, Tensor], way: str, *, rounds: int) -> None:
    """Each gradient is rounded before it is sent, and their sum once more.

    ``rounds``: how often a step does so. ZeRO 2 and 3 share the gradients of every micro-batch, ZeRO 1 adds
    them up in bfloat16; they may be larger than their sum, so that there the bound is for all together.
    """
    expected, first, second = (
        sums(found, way),
        under(found, f"{way}/local0/"),
        under(found, f"{way}/local1/"),
    )
    assert 1e-4 < distance(under(found, f"{way}/0/"), expected) < rounds * ROUNDING, way
    if rounds > 1:
        return
    for key, value in under(found, f"{way}/0/").items():
        sent = (first[key].abs() + second[key].abs()) * ROUNDING
        bound = sent * (1 + ROUNDING) + expected[key].abs() * ROUNDING + 1e-8
        assert torch.all((value - expected[key]).abs() <= bound), (way, key)


def check_powersgd(found: dict[str, Tensor]) -> None:
    exact = under(found, "fp32/0/")
    # Two steps are sent whole, bit for bit as they are without compression.
    for step in range(2):
        for key, value in under(found, f"powersgd/{step}/").items():
            assert torch.equal(value, exact[key]), (step, key)
    compressed = [under(found, f"powersgd/{step}/") for step in range(2, 24)]
    # One compressed step has lost something ...
    lost = distance(compressed[0], exact)
    assert 0.05 < lost < 1.0
    # ... and the next ones bring it: what was not sent is added to what is sent later.
    mean = {key: torch.stack([each[key] for each in compressed]).mean(0) for key in exact}
    assert distance(mean, exact) < lost / 2


def check_bytes(found: dict[str, Tensor]) -> None:
    """What a process hands over for each step: DDP once, whatever the number of micro-batches."""
    whole = 4 * sum(value.numel() for value in under(found, "fp32/0/").values())
    sent = {way: found[f"{way}/sent"].tolist() for way in ("fp32", "bf16", "powersgd")}
    assert sent["fp32"] == [whole] * 24
    assert sent["bf16"] == [whole // 2] * 24
    assert sent["powersgd"][:2] == [whole] * 2
    assert max(sent["powersgd"][2:]) < whole / 4


def test_powersgd_keeps_what_has_its_rank(launch: Any, tmp_path: Path) -> None:
    # Three positions are two products of a column and a row in each process: of rank 4 in all.
    way = {"powersgd": {"data": 2, "reduce": "powersgd"}}
    found = run(launch, tmp_path, way, micro_batches=1, length=RANK // 2 + 1, repeats=3)
    expected = sums(found, "powersgd")
    layers = [key for key in expected if "lm_head" in key or "mlp" in key]
    assert found["powersgd/sent"][2] < found["powersgd/sent"][0] / 2
    for key in layers:
        difference = (found[f"powersgd/2/{key}"] - expected[key]).norm()
        assert difference < 1e-3 * expected[key].norm(), key


@pytest.mark.slow
def test_it_learns(launch: Any, tmp_path: Path) -> None:
    recipe = {
        "data": {"sequence_length": 32},
        "model": {"context_length": 64},
        "train": {
            "steps": 40,
            "batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "schedule": "constant",
            "warmup_steps": 4,
            "precision": "fp32",
        },
    }
    ways: dict[str, Any] = {name: {"data": 2, "reduce": name} for name in ("fp32", "bf16", "powersgd")}
    found = run(launch, tmp_path, ways, recipe=recipe)
    losses = {name: found[f"{name}/losses"] for name in ways}
    fell = float(losses["fp32"][0] - losses["fp32"][-5:].mean())
    assert fell > 2.0
    torch.testing.assert_close(losses["powersgd"][:2], losses["fp32"][:2], rtol=0, atol=0)
    # The same fall of the loss, within a twentieth with rounded and a fifth with compressed gradients.
    for name, part in (("bf16", 0.05), ("powersgd", 0.2)):
        assert float(losses[name][-5:].mean() - losses["fp32"][-5:].mean()) < part * fell, name
