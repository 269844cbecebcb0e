"""Models without memory for their weights: what is built, and what can only be built as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hearth.config.recipe import ModelSection
from hearth.errors import ConfigError, ModelError
from hearth.models.building import build_model, model_from_config
from hearth.models.in_parts import build_in_parts
from hearth.models.saving import write_weights

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MOE = {**QWEN3, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 16}


def saved(tmp_path: Path, config: dict[str, Any]) -> Path:
    model = build_model(ModelSection(config=config), vocab_size=64, seed=1)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    return tmp_path / "base"


def test_new_weights() -> None:
    section = ModelSection(config=QWEN3)
    parts = build_in_parts(section, vocab_size=64, seed=4)
    assert parts is not None
    assert all(weight.is_meta for weight in parts.model.parameters())
    whole = dict(build_model(section, vocab_size=64, seed=4).named_parameters())
    found = {name: tensor[...] for name, tensor in parts.source.tensors(whole)}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_files_are_read_by_name(tmp_path: Path) -> None:
    base = saved(tmp_path, QWEN3)
    parts = build_in_parts(ModelSection(base=str(base)), vocab_size=64)
    assert parts is not None
    name = "model.layers.1.mlp.up_proj.weight"
    ((found, tensor),) = parts.source.tensors({name})
    expected = dict(build_model(ModelSection(base=str(base)), vocab_size=64).named_parameters())[name]
    assert found == name
    assert torch.equal(tensor[4:8, 2:3], expected[4:8, 2:3])


def test_the_twin_is_small_and_whole() -> None:
    parts = build_in_parts(ModelSection(size="1B"), vocab_size=50_000)
    assert parts is not None
    layers = parts.model.config.num_hidden_layers
    assert sum(w.numel() for w in parts.twin.parameters()) < sum(
        w.numel() for w in parts.model.parameters()
    ) / (layers / 2)
    assert not any(weight.is_meta for weight in parts.twin.parameters())


def test_an_incomplete_base_is_left_to_who_says_what_is_missing(tmp_path: Path) -> None:
    base = saved(tmp_path, MOE)
    file = next(path for path in base.glob("*.safetensors") if "experts.2" in str(load_file(path).keys()))
    kept = {name: tensor for name, tensor in load_file(file).items() if "experts.2" not in name}
    save_file(kept, file, {"format": "pt"})
    assert build_in_parts(ModelSection(base=str(base)), vocab_size=64) is None
    with pytest.raises(ModelError, match=r"have another shape: model\.layers"):
        build_model(ModelSection(base=str(base)), vocab_size=64)


def test_bad_input_is_refused_as_of_a_whole(tmp_path: Path) -> None:
    base = saved(tmp_path, QWEN3)
    with pytest.raises(ConfigError, match="the tokenizer has 65 tokens"):
        build_in_parts(ModelSection(base=str(base)), vocab_size=65)
    file = sorted(base.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="truncated"):
        build_in_parts(ModelSection(base=str(base)), vocab_size=64)


def test_tied_weights_that_files_have_twice_are_left_to_transformers(tmp_path: Path) -> None:
    """Where they differ, it does not tie them."""
    base = saved(tmp_path, {**QWEN3, "tie_word_embeddings": True})
    assert build_in_parts(ModelSection(base=str(base)), vocab_size=64) is not None
    (index,) = base.glob("*.index.json")
    where = json.loads(index.read_text())
    save_file({"lm_head.weight": torch.ones(64, 32)}, base / "more.safetensors", {"format": "pt"})
    where["weight_map"]["lm_head.weight"] = "more.safetensors"
    index.write_text(json.dumps(where))
    assert build_in_parts(ModelSection(base=str(base)), vocab_size=64) is None


@pytest.mark.parametrize("max_bytes", [10_000_000, 20_000])
def test_weights_are_written_as_transformers_does(tmp_path: Path, max_bytes: int) -> None:
    model = build_model(ModelSection(config=QWEN3), vocab_size=64, seed=1)
    model.config.architectures = [type(model).__name__]
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    model.config.save_pretrained(tmp_path)
    write_weights(weights, weights, tmp_path, max_bytes=max_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_bytes == 20_000)
    for file in files if len(files) > 1 else ():
        assert sum(t.nbytes for t in load_file(file).values()) <= max_bytes
    again = build_model(ModelSection(base=str(tmp_path)), vocab_size=64)
    assert all(torch.equal(w, weights[name]) for name, w in again.named_parameters())
    assert model_from_config(model.config).config.to_dict() == model.config.to_dict()
