"""Every parameter and buffer has its place after a model was spread, and what has none is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
ALWAYS = ["drop_parameter", "drop_parameter_in_one_process", "buffer_in_one_process", "new_buffer"]
SHARDED = [*ALWAYS, "cut_by_hand", "plain_weight"]
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], list[str]]] = {
    "ddp": (2, {"data": 2}, QWEN3, SHARDED),
    "fsdp": (2, {"shard": 2}, QWEN3, SHARDED),
    "tp": (2, {"tensor": 2}, QWEN3, ALWAYS),
    "pp": (2, {"pipeline": 2}, QWEN3, ["drop_parameter", "new_buffer", "outside"]),
    "ep": (2, {"shard": 2, "expert": 2}, QWEN3_MOE, ["buffer_in_one_process", "new_buffer", "plain_weight"]),
    "cp": (2, {"context": 2}, QWEN3, SHARDED),
    "fsdp-tp": (4, {"shard": 2, "tensor": 2}, QWEN3, SHARDED),
    "interleaved": (2, {"pipeline": 2, "schedule": "interleaved", "stages": 2}, QWEN3, ["outside"]),
    "fsdp-pp": (4, {"shard": 2, "pipeline": 2}, QWEN3, ["drop_parameter", "outside"]),
    "hsdp-ep": (4, {"data": 2, "shard": 2, "expert": 2}, QWEN3_MOE, ["plain_weight"]),
}
FAST = ("fsdp",)
SAYS = {
    "drop_parameter": "the parameter model.layers.1.mlp.up_proj.weight is in no process",
    "drop_parameter_in_one_process": "model.layers.1.mlp.up_proj.weight is ",
    "buffer_in_one_process": "model.rotary_emb.inv_freq is replicated in rank 0, absent in rank 1",
    "new_buffer": "more was not in the whole model",
    "cut_by_hand": "model.layers.0.input_layernorm.weight has shape (16,), in the whole model (32,)",
    "plain_weight": "the gradients of model.layers.0.input_layernorm.weight are not added up over ",
    "outside": "is a copy that does not train",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in LAYOUTS]
)
def test_all_have_a_place_and_what_has_none_is_noticed(launch: Any, tmp_path: Path, name: str) -> None:
    num, parallel, model, breaks = LAYOUTS[name]
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"parallel": parallel, "model": model, "breaks": breaks}))
    found = []
    for text in launch("completeness", num, [str(settings)]):
        (line,) = (line for line in text.splitlines() if line.startswith("RESULT "))
        found.append(json.loads(line.removeprefix("RESULT ")))
    for each in found:  # every process says the same of what is broken
        assert each["broken"].keys() == set(breaks)
        for what, message in each["broken"].items():
            assert SAYS[what] in message, message
        assert each["broken"] == found[0]["broken"]
    places = [each["complete"]["own"] for each in found]
    names = set(found[0]["complete"]["before"])
    assert {own for each in places for own in each} == names
    assert len(names) > 40
    if parallel.get("pipeline", 1) == 1:
        assert all(each == places[0] and each.keys() == names for each in places)
    else:
        shared = set.intersection(*(set(each) for each in places))
        assert shared == {own for own in names if "inv_freq" in own}
