"""Opening and saving, and every way in which a directory can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hearth.config.recipe import ModelSection
from hearth.errors import ConfigError, ModelError, NotFoundError, StorageError, UnsupportedModelError
from hearth.models import (
    build_model,
    load_model,
    load_tokenizer,
    model_info,
    num_parameters,
    resolve_reference,
    save_model,
    stop_token_ids,
)


def test_round_trip_through_transformers(
    model: PreTrainedModel, model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    names = {path.name for path in model_dir.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    for opened in (AutoModelForCausalLM.from_pretrained(model_dir), load_model(model_dir)):
        for (name, ours), theirs in zip(model.named_parameters(), opened.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    for opened in (AutoTokenizer.from_pretrained(model_dir), load_tokenizer(model_dir)):
        assert opened("hé <|im_end|>").input_ids == tokenizer("hé <|im_end|>").input_ids
        assert opened.chat_template == tokenizer.chat_template
    assert json.loads((model_dir / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_generation_stops_where_the_template_ends_a_turn(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert stop_token_ids(tokenizer) == [3, 0]
    assert json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"] == [3, 0]
    assert json.loads((model_dir / "config.json").read_text())["eos_token_id"] == 0


def test_dtype(model_dir: Path) -> None:
    assert load_model(model_dir).dtype == torch.float32
    assert load_model(model_dir, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="'int3' is unknown"):
        load_model(model_dir, dtype="int3")


def test_info_reads_no_weights(model_dir: Path, model: PreTrainedModel) -> None:
    info = model_info(model_dir)
    assert (info.model_type, info.dtype, info.context_length) == ("qwen3", "float32", 128)
    assert info.num_parameters == num_parameters(model)
    assert info.has_chat_template


def test_absent_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model directory at .*nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file, not a model directory"):
        load_model(tmp_path / "file")


def test_no_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(model_dir)
    (model_dir / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load_model(model_dir)


def test_config_is_not_json(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("{ nope")
    with pytest.raises(ModelError, match=r"config\.json is not readable JSON"):
        load_model(model_dir)


def test_unknown_architecture(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "model_type": "perceiver9000"}))
    with pytest.raises(UnsupportedModelError, match="'perceiver9000'"):
        load_model(model_dir)


def test_remote_code_is_refused(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"model_type": "perceiver9000", "auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="needs Python code of its own"):
        load_model(model_dir)


def test_not_a_causal_language_model(model_dir: Path) -> None:
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="vit"):
        load_model(model_dir)


def test_a_reward_model_writes_no_text(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="scores texts and writes none"):
        load_model(model_dir)


def test_no_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_model(model_dir)


def test_truncated_weights_name_file_and_sizes(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    with pytest.raises(
        ModelError, match=rf"model\.safetensors is truncated: expected {size}.*found {size - 1000}"
    ):
        load_model(model_dir)
    os.truncate(file, 100)
    with pytest.raises(ModelError, match=r"truncated: its header"):
        load_model(model_dir)
    os.truncate(file, 3)
    with pytest.raises(ModelError, match="no safetensors file"):
        load_model(model_dir)


def test_shards(model: PreTrainedModel, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(tmp_path / "m", max_shard_size="300KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_model(tmp_path / "m").lm_head.weight, model.lm_head.weight)
    os.truncate(shards[1], shards[1].stat().st_size - 4)
    with pytest.raises(ModelError, match=rf"{shards[1].name} is truncated"):
        load_model(tmp_path / "m")
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"shard .*{shards[1].name} is missing"):
        load_model(tmp_path / "m")


def test_missing_weights_are_not_made_up(model_dir: Path) -> None:
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights.*model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(model_dir)


def test_weights_of_another_shape(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["intermediate_size"] += 8
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="mlp"):
        load_model(model_dir)


def test_no_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer\.json\)"):
        load_tokenizer(model_dir)


def test_damaged_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ModelError, match="cannot be opened"):
        load_tokenizer(model_dir)


def test_build_from_config_and_seed() -> None:
    values = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    section = ModelSection(config=values)
    before = torch.get_rng_state()
    first, second = (build_model(section, vocab_size=300, seed=5) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(first, GPT2LMHeadModel)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, build_model(section, vocab_size=300, seed=6).lm_head.weight)
    assert first.config.vocab_size == 300


def test_build_refusals(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="has no model_type"):
        build_model(ModelSection(config={"n_embd": 32}), vocab_size=300)
    with pytest.raises(ConfigError, match="vocab_size 100 is smaller"):
        build_model(ModelSection(config={"model_type": "gpt2", "vocab_size": 100}), vocab_size=300)
    with pytest.raises(ConfigError, match="only 320 embeddings"):
        build_model(ModelSection(base=str(model_dir)), vocab_size=4000)


def test_build_from_base_in_float32(model_dir: Path, model: PreTrainedModel) -> None:
    built = build_model(ModelSection(base=str(model_dir)), vocab_size=260)
    assert torch.equal(built.lm_head.weight, model.lm_head.weight)


def test_references(model_dir: Path, workspace_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hearth.workspace import Workspace

    assert resolve_reference(str(model_dir)) == model_dir
    with pytest.raises(ModelError, match=r"no model directory at .*absent/dir"):
        resolve_reference("./absent/dir")
    with pytest.raises(NotFoundError, match="bard"):
        resolve_reference("bard")
    with Workspace.open() as workspace:
        workspace.registry.create_version("bard", model_dir)
        assert (resolve_reference("bard@1", workspace) / "config.json").is_file()
    assert (resolve_reference("bard") / "config.json").is_file()


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"hf:acme/tiny is not in the local cache"):
        resolve_reference("hf:acme/tiny")
    with pytest.raises(ModelError, match="is no model of the Hugging Face hub"):
        resolve_reference("hf:tiny")


def test_failed_save_keeps_what_was_there(
    model: PreTrainedModel,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = (model_dir / "model.safetensors").read_bytes()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(StorageError, match="No space left"):
        save_model(model, tokenizer, model_dir)
    assert (model_dir / "model.safetensors").read_bytes() == before
    assert [path.name for path in model_dir.parent.iterdir()] == ["model"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_full_disk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, small_disk: Path) -> None:
    with pytest.raises(StorageError, match="cannot write the model"):
        save_model(model, tokenizer, small_disk / "model")
    assert list(small_disk.iterdir()) == []


def test_other_architectures_save_and_load(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config)
    save_model(model, None, tmp_path / "gpt2")
    opened = load_model(tmp_path / "gpt2")
    assert torch.equal(opened.transformer.wte.weight, model.transformer.wte.weight)
