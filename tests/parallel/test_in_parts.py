"""A model that no process has as a whole has the weights of one that was built as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hearth.config.recipe import ModelSection
from hearth.models.building import build_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
QWEN3 = {**SMALL, "model_type": "qwen3", "tie_word_embeddings": False}
TIED = {**SMALL, "model_type": "qwen3", "tie_word_embeddings": True}
PHI3 = {**SMALL, "model_type": "phi3", "pad_token_id": 0}  # packed projections
MOE = {
    **SMALL,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
ROWS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "fsdp2": (QWEN3, 2, {"shard": 2}),
    "fsdp2-tied": (TIED, 2, {"shard": 2}),
    "zero1": (QWEN3, 2, {"shard": 2, "zero": 1}),
    "offload": (QWEN3, 2, {"shard": 2, "offload": "cpu"}),
    "tp2": (QWEN3, 2, {"tensor": 2}),
    "tp2-packed": (PHI3, 2, {"tensor": 2}),
    "fsdp2-tp2": (QWEN3, 4, {"shard": 2, "tensor": 2}),
    "pp2": (QWEN3, 2, {"pipeline": 2}),
    "fsdp2-pp2": (QWEN3, 4, {"shard": 2, "pipeline": 2}),
    "moe-ep2": (MOE, 2, {"data": 2, "expert": 2}),
    "moe-fsdp2": (MOE, 2, {"shard": 2}),
    "moe-tp2": (MOE, 2, {"tensor": 2}),
}


def built(launch: Any, tmp_path: Path, num: int, **settings: Any) -> dict[str, torch.Tensor]:
    name = f"{num}-{settings['in_parts']}"
    file, out = tmp_path / f"{name}.json", tmp_path / f"{name}.safetensors"
    file.write_text(json.dumps(settings))
    launch("in_parts", num, [str(file), str(out)])
    return load_file(out)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    logits = found.pop("logits", None)
    if logits is not None:
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)
    expected.pop("logits")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_new_weights(launch: Any, tmp_path: Path, name: str) -> None:
    config, num, parallel = ROWS[name]
    model = {"model": {"config": config}}
    expected = built(launch, tmp_path, 1, recipe=model, in_parts=False)
    assert_same(built(launch, tmp_path, num, recipe={**model, "parallel": parallel}, in_parts=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("fsdp2", False),
        ("fsdp2", True),
        ("tp2-packed", False),
        ("fsdp2-pp2", False),
        ("moe-ep2", False),
        ("moe-fsdp2", False),
        ("moe-tp2", False),
    ],
)
def test_saved_weights(launch: Any, tmp_path: Path, name: str, adapter: bool) -> None:
    config, num, parallel = ROWS[name]
    base = tmp_path / "base"
    build_model(ModelSection(config=config), vocab_size=64, seed=1).save_pretrained(
        base, max_shard_size="20KB"
    )
    model = {"model": {"base": str(base)}}
    expected = built(launch, tmp_path, 1, recipe=model, in_parts=False, adapter=adapter)
    recipe = {**model, "parallel": parallel}
    assert_same(built(launch, tmp_path, num, recipe=recipe, in_parts=True, adapter=adapter), expected)


def memory_of(launch: Any, tmp_path: Path, num: int, **settings: Any) -> tuple[int, int]:
    """The most that a process needed, and what the weights take."""
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    text = launch("peak", num, [str(file)])[0]
    (line,) = [line for line in text.splitlines() if line.startswith("RESULT")]
    found = json.loads(line.removeprefix("RESULT"))
    return max(found["took"]), found["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "from_files"), [(QWEN3, False), (QWEN3, True), (MOE, True)])
def test_no_process_has_memory_for_all(
    launch: Any, tmp_path: Path, kind: dict[str, Any], from_files: bool
) -> None:
    large = {**kind, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
    large["moe_intermediate_size"] = 512
    model: dict[str, Any] = {"config": large}
    if from_files:
        # In half precision, as most are: the same type would be mapped, not read.
        made = build_model(ModelSection(config=large), vocab_size=64).bfloat16()
        made.save_pretrained(tmp_path / "base", max_shard_size="20MB")
        model = {"base": str(tmp_path / "base")}
    recipe = {"model": model, "parallel": {"shard": 2}}
    whole, weights = memory_of(launch, tmp_path, 2, recipe=recipe, in_parts=False)
    parts, _ = memory_of(launch, tmp_path, 2, recipe=recipe, in_parts=True)
    assert weights > 300e6
    assert whole > 0.9 * weights
    # Half of it, a layer, and what the allocator keeps.
    assert parts < 0.7 * weights
