"""What cannot be combined with `parallel` is refused before anything is built, with a way out."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.errors import ConfigError
from hearth.parallel.checks import CONTEXT_FAMILIES, EXPERT_FAMILIES, PIPELINE_FAMILIES, check_model
from hearth.parallel.layout import Layout
from hearth.parallel.pipeline import Inputs, Stage, divide_layers
from hearth.parallel.world import World, joined
from hearth.training import Trainer
from hearth.training.parallel_checks import check_recipe

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def recipe_of(parallel: dict[str, Any], **train: Any) -> Recipe:
    base = {"steps": 4, "batch_size": 8, "micro_batch_size": 2, "precision": "fp32"}
    return Recipe.model_validate(
        {"parallel": parallel, "data": {"sequence_length": 24}, "train": {**base, **train}}
    )


# (processes, section parallel, settings of train, what the message has)
RECIPES: dict[str, tuple[int, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "too few processes": (3, {"shard": 2}, {}, ("3 processes", "shard 2")),
    "another number": (4, {"data": 3}, {}, ("data 3", "= 3 processes", "there are 4")),
    "several in one": (1, {"tensor": 2}, {}, ("1 processes", "tensor 2")),
    "experts over too few": (2, {"expert": 4}, {}, ("parallel.expert 4", "data x shard = 2")),
    "zero without shard": (2, {"zero": 1}, {}, ("parallel.zero 1", "parallel.shard, which is 1")),
    "zero in a pipeline": (2, {"zero": 2, "pipeline": 2}, {}, ("parallel.zero 2", "shard")),
    "nothing to take in turns": (
        2,
        {"pipeline": 2, "schedule": "interleaved"},
        {},
        ("parallel.schedule interleaved", "parallel.stages 1"),
    ),
    "folder without offload": (2, {"offload_dir": "/x"}, {}, ("parallel.offload_dir '/x'", "offload none")),
    "offload alone": (1, {"offload": "cpu"}, {}, ("parallel.offload: cpu", "one process")),
    "bf16 of nothing": (2, {"data": 1, "tensor": 2, "reduce": "bf16"}, {}, ("reduce bf16", "no gradients")),
    "powersgd over shards": (2, {"shard": 2, "reduce": "powersgd"}, {}, ("reduce powersgd", "shard 2")),
    "powersgd over tensor": (
        4,
        {"data": 2, "tensor": 2, "reduce": "powersgd"},
        {},
        ("powersgd", "tensor 2"),
    ),
    "powersgd with offload": (
        2,
        {"offload": "cpu", "reduce": "powersgd"},
        {},
        ("powersgd", "offload cpu"),
    ),
    "powersgd in fp16": (2, {"reduce": "powersgd"}, {"precision": "fp16"}, ("powersgd", "precision fp16")),
    "powersgd skips": (
        2,
        {"reduce": "powersgd"},
        {"on_non_finite": "skip"},
        ("powersgd", "on_non_finite skip"),
    ),
    "experts and tensor": (
        4,
        {"shard": 2, "expert": 2, "tensor": 2},
        {},
        ("parallel.expert 2", "parallel.tensor 2"),
    ),
    "experts and context": (
        4,
        {"shard": 2, "expert": 2, "context": 2},
        {},
        ("expert 2", "parallel.context 2"),
    ),
    "unequal shares": (3, {"data": 3}, {}, ("train.batch_size 8", "3 processes", "micro-batches of 2")),
    "compiled without bubbles": (
        2,
        {"pipeline": 2, "schedule": "zero_bubble", "stages": 2},
        {"compile": True},
        ("schedule zero_bubble", "train.compile"),
    ),
    "auto in a pipeline": (
        2,
        {"pipeline": 2},
        {"micro_batch_size": "auto"},
        ("train.micro_batch_size auto", "pipeline"),
    ),
    "too few micro-batches": (
        4,
        {"pipeline": 4},
        {"micro_batch_size": 4},
        ("parallel.pipeline 4", "at least 4 micro-batches", "there are 2"),
    ),
    "uneven rounds": (
        2,
        {"pipeline": 2, "schedule": "interleaved", "stages": 2},
        {"batch_size": 10},
        ("schedule interleaved", "a multiple of 2 micro-batches", "there are 5"),
    ),
    "8-bit state in parts": (2, {"shard": 2}, {"optimizer": "adamw8bit"}, ("optimizer adamw8bit", "shard 2")),
    "factors in parts": (2, {"tensor": 2}, {"optimizer": "adafactor"}, ("optimizer adafactor", "tensor 2")),
}
# Beside each refusal, what is taken.
TAKEN: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {}, {"micro_batch_size": "auto", "optimizer": "adamw8bit"}),
    (1, {"reduce": "bf16"}, {}),
    (2, {"shard": 2, "zero": 1, "reduce": "bf16"}, {}),
    (2, {"reduce": "powersgd"}, {}),
    (2, {"data": 2}, {"optimizer": "adafactor"}),
    (2, {"pipeline": 2}, {"optimizer": "adamw8bit"}),
    (2, {"pipeline": 2, "schedule": "zero_bubble", "stages": 2}, {}),
    (2, {"pipeline": 2}, {"batch_size": 10}),
    (4, {"pipeline": 2, "shard": 2, "offload": "cpu"}, {}),
    (4, {"tensor": 2, "context": 2}, {"optimizer": "muon"}),
]


def world_of(recipe: Recipe, num: int) -> World:
    return World(Layout.of(recipe.parallel, num), torch.device("cpu"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    num, parallel, train, parts = RECIPES[name]
    recipe = recipe_of(parallel, **train)
    with pytest.raises(ConfigError) as caught:
        check_recipe(recipe, world_of(recipe, num))
    for part in parts:
        assert part in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(("num", "parallel", "train"), TAKEN)
def test_recipe_that_can_be(num: int, parallel: dict[str, Any], train: dict[str, Any]) -> None:
    recipe = recipe_of(parallel, **train)
    check_recipe(recipe, world_of(recipe, num))


@pytest.mark.parametrize(
    ("num", "batch_size", "micro_batch_size", "settings"),
    [
        (2, 8, 8, [{"micro_batch_size": 4}, {"batch_size": 16}]),
        (4, 24, 4, [{"micro_batch_size": 2}, {"batch_size": 32}]),
        (3, 8, 2, [{"batch_size": 12}]),  # three processes cannot have equal parts of 8 rows
    ],
)
def test_the_settings_that_a_refusal_of_shares_names_are_taken(
    num: int, batch_size: int, micro_batch_size: int, settings: list[dict[str, int]]
) -> None:
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    recipe = recipe_of({"data": num}, **sizes)
    with pytest.raises(ConfigError) as caught:
        check_recipe(recipe, world_of(recipe, num))
    named = [f"train.{name}={value}" for setting in settings for name, value in setting.items()]
    assert caught.value.fix == f"use {', or '.join(named)}"
    for setting in settings:
        check_recipe(recipe_of({"data": num}, **sizes | setting), world_of(recipe, num))


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "tied": ({"pipeline": 2}, {"tie_word_embeddings": True}, ("pipeline 2", "tie_word_embeddings")),
    "stages": ({"pipeline": 8}, {}, ("pipeline 8 x stages 1 = 8 stages", "4 layers")),
    "pieces": (
        {"pipeline": 2, "schedule": "interleaved", "stages": 3},
        {},
        ("pipeline 2 x stages 3 = 6 stages", "4 layers"),
    ),
    "pipeline of gpt2": ({"pipeline": 2}, {"model_type": "gpt2"}, ("pipeline 2: gpt2", "llama")),
    "pipeline of gpt_neox": ({"pipeline": 2}, {"model_type": "gpt_neox"}, ("pipeline 2: gpt_neox", "llama")),
    "scaled embedding": (
        {"pipeline": 2},
        {"model_type": "granite", "embedding_multiplier": 12.0},
        ("multiplies", "12 (embedding_multiplier)"),
    ),
    "context of bloom": ({"context": 2}, {"model_type": "bloom"}, ("context 2: bloom", "llama")),
    "context of qwen3_next": ({"context": 2}, {"model_type": "qwen3_next"}, ("context 2: qwen3_next",)),
    "context of gpt_oss": ({"context": 2}, {"model_type": "gpt_oss"}, ("context 2: gpt_oss",)),
    "linear attention": (
        {"context": 2},
        {
            "model_type": "qwen2",
            "layer_types": ["full_attention", "full_attention", "conv", "full_attention"],
        },
        ("layers of conv", "full_attention"),
    ),
    "positions": ({"context": 5}, {}, ("data.sequence_length 24", "parallel.context 5")),
    "dense experts": ({"expert": 2, "shard": 2}, {}, ("parallel.expert 2: qwen3 has no experts",)),
    "experts": (
        {"expert": 3, "shard": 3},
        {"model_type": "qwen3_moe", **MOE},
        ("parallel.expert 3", "4 experts"),
    ),
    "experts of llama4": (
        {"expert": 2, "shard": 2},
        {"model_type": "llama4_text", "num_local_experts": 4},
        ("expert 2: llama4_text", "qwen3_moe"),
    ),
}


def config_of(changes: dict[str, Any]) -> Any:
    values = {**QWEN3, **changes}
    layer_types = values.pop("layer_types", None)
    config = AutoConfig.for_model(**values)
    if layer_types is not None:
        object.__setattr__(config, "layer_types", layer_types)  # transformers would not allow it
    return config


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    parallel, changes, parts = MODELS[name]
    with pytest.raises(ConfigError) as caught:
        check_model(recipe_of(parallel).parallel, config_of(changes), sequence_length=24)
    for part in parts:
        assert part in caught.value.message
    assert caught.value.fix


def test_a_model_that_can_be() -> None:
    for parallel in ({"pipeline": 2}, {"context": 3}, {"context": 2, "pipeline": 4}):
        check_model(recipe_of(parallel).parallel, config_of({}), sequence_length=24)
    moe = config_of({"model_type": "qwen3_moe", **MOE})
    check_model(recipe_of({"expert": 4, "shard": 4}).parallel, moe, sequence_length=24)


def test_a_trainer_without_a_world_does_not_leave_the_section_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(config_of({"num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match="tensor 2"):
        Trainer(model=model, train_dataset=[], config=recipe_of({"tensor": 2}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        Trainer(model=model, train_dataset=[], config=recipe_of({}))


PLACES: dict[str, tuple[dict[str, str], str]] = {
    "not a number": ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
    "half of them": ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    "too large a rank": (
        {
            "WORLD_SIZE": "2",
            "RANK": "2",
            "LOCAL_RANK": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        },
        "RANK 2 is not below WORLD_SIZE 2",
    ),
    "no port": (
        {
            "WORLD_SIZE": "2",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "70000",
        },
        "MASTER_PORT is '70000'",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, message = PLACES[name]
    for variable in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with (
        pytest.raises(ConfigError, match=message) as caught,
        joined(recipe_of({}).parallel, torch.device("cpu")),
    ):
        pass
    assert "torchrun" in str(caught.value.fix)


# ── the families that are said to compute the same ───────────────────────────────────────────────────────

TINY = {
    **{key: value for key, value in QWEN3.items() if key != "model_type"},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Where a family has a setting of this name.
SIZES = {
    **MOE,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16,
    "sliding_window": 6,
}
# Where keys and values are compressed.
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}


def tiny(family: str) -> Any:
    """A model of four layers, whose norms do something."""
    torch.manual_seed(0)
    defaults = AutoConfig.for_model(family)
    sizes = {key: value for key, value in SIZES.items() if hasattr(defaults, key)}
    latent = LATENT if hasattr(defaults, "q_lora_rank") else {}
    config = AutoConfig.for_model(family, **{**sizes, **TINY, **latent})
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data.add_(torch.rand_like(weight) * 0.1)
    return model


def through_stages(model: Any, num_stages: int, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits: list[torch.Tensor] = []

    def loss(whole: Any, _number: int) -> torch.Tensor:
        logits.append(whole(input_ids=ids, position_ids=positions, use_cache=False).logits)
        return logits[0].sum()

    hidden = torch.zeros(1)
    ranges = divide_layers(4, num_stages)
    for number, layers in enumerate(ranges):
        stage = Stage(model, layers, first=number == 0, last=number == num_stages - 1)
        stage.inputs, stage.loss = [Inputs(ids, positions)], loss
        hidden = stage(hidden, torch.tensor([0]))
    return logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(PIPELINE_FAMILIES))
@torch.no_grad()
def test_stages_compute_what_the_whole_computes(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(3, 64, (2, 24))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for num_stages in (2, 4):
        found = through_stages(model, num_stages, ids, positions)
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "families"), [("context", sorted(CONTEXT_FAMILIES)), ("expert", sorted(EXPERT_FAMILIES))]
)
def test_processes_compute_what_one_computes(
    launch: Any, tmp_path: Path, kind: str, families: list[str]
) -> None:
    parallel = {"context": {"context": 2}, "expert": {"shard": 2, "expert": 2}}[kind]
    settings = tmp_path / "settings.json"
    settings.write_text(
        json.dumps(
            {"parallel": parallel, "families": families, "tiny": TINY, "sizes": SIZES, "latent": LATENT}
        )
    )
    for text in launch("families", 2, [str(settings)], seconds=500):
        (line,) = (line for line in text.splitlines() if line.startswith("RESULT "))
        found = json.loads(line.removeprefix("RESULT "))
        assert found.keys() == set(families)
        assert {family: error for family, error in found.items() if not error < 1e-9} == {}


# ── on every rank ────────────────────────────────────────────────────────────────────────────────────────

REAL: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "heads": ({"tensor": 2}, {"num_attention_heads": 3, "num_key_value_heads": 1}, "num_attention_heads 3"),
    "kv heads": ({"tensor": 2}, {"num_key_value_heads": 1}, "num_key_value_heads 1"),
    "intermediate": ({"tensor": 2}, {"intermediate_size": 47}, "intermediate_size 47"),
    "tensor of gpt2": ({"tensor": 2}, {"model_type": "gpt2"}, "GPT2Model has no plan"),
    "tensor of a family nobody compared": ({"tensor": 2}, {"model_type": "qwen3_next"}, "qwen3_next is none"),
    "tied": ({"pipeline": 2}, {"tie_word_embeddings": True}, "tie_word_embeddings"),
    "dense experts": ({"expert": 2}, {}, "qwen3 has no experts"),
    "context of bloom": ({"context": 2}, {"model_type": "bloom"}, "context 2: bloom"),
    "shares": ({"data": 2}, {}, "train.batch_size 6 cannot be shared by 2 processes"),
}


@pytest.mark.slow
def test_every_rank_refuses(launch: Any, tmp_path: Path) -> None:
    cases = {}
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in REAL]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        ports = [str(listener.getsockname()[1]) for listener in listeners]
    for port, (name, (parallel, changes, _)) in zip(ports, REAL.items(), strict=True):
        recipe = recipe_of(parallel, **({"batch_size": 6} if name == "shares" else {}))
        cases[name] = {
            "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "model": {**QWEN3, "num_hidden_layers": 2, **changes},
            "port": port,
        }
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(cases))
    for text in launch("refuse", 2, [str(settings)]):
        (line,) = (line for line in text.splitlines() if line.startswith("RESULT "))
        said = json.loads(line.removeprefix("RESULT "))
        assert said.keys() == REAL.keys()
        for name, (_, _, message) in REAL.items():
            assert message in said[name]
            assert "fix: " in said[name]
