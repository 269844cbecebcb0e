"""What `hearth plan` offers is what `hearth train` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.config import Recipe
from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.checks import check_micro_batches, check_model, check_settings, check_training
from hearth.parallel.layout import Layout
from hearth.parallel.planner import (
    Job,
    ModelFacts,
    Plan,
    check_fits,
    choose,
    job_of_recipe,
    make_cluster,
    memory_of,
)
from hearth.parallel.planner.choose import as_it_stands, find_choices, legal_plans
from hearth.parallel.planner.report import paste
from hearth.training.objectives import make_objective

FAMILIES = ("qwen3", "llama", "gpt2", "qwen3_moe", "mixtral", "gpt_oss", "granite", "qwen3_next", "stablelm")


@settings(deadline=None, max_examples=40)
@given(
    family=st.sampled_from(FAMILIES),
    tied=st.booleans(),
    devices=st.sampled_from([1, 2, 4, 8, 16]),
    rows=st.sampled_from([8, 16, 24, 64]),
    length=st.sampled_from([100, 256, 16384]),
    optimizer=st.sampled_from(["adamw", "adamw8bit", "adafactor", "lion", "muon"]),
    reduce=st.sampled_from(["fp32", "bf16"]),
    compiled=st.booleans(),
    offload=st.booleans(),
)
def test_every_layout_that_is_offered_passes_the_checks(
    make_facts: Callable[..., ModelFacts],
    family: str,
    tied: bool,
    devices: int,
    rows: int,
    length: int,
    optimizer: str,
    reduce: str,
    compiled: bool,
    offload: bool,
) -> None:
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_local_experts": 8,
    }
    facts = make_facts(family, tie_word_embeddings=tied, **(experts if family in MOE else {}))
    recipe = Recipe.model_validate(
        {
            "model": {"context_length": 65536},
            "data": {"sequence_length": length},
            "train": {"batch_size": rows, "micro_batch_size": 1, "optimizer": optimizer, "compile": compiled},
            "parallel": {"reduce": reduce},
        }
    )
    job = job_of_recipe(recipe)
    found, _ = find_choices(facts, job, make_cluster(devices), offload=offload)
    for choice in found:
        given_back = yaml.safe_load(paste(choice))
        section = ParallelSection.model_validate(given_back["parallel"])
        layout = Layout.of(section, devices)
        check_settings(section, layout)
        check_training(section, layout, optimizer=optimizer, compiled=compiled)
        check_model(section, facts.config, sequence_length=length)
        rest = rows // layout.batch_ranks
        assert rest * layout.batch_ranks == rows
        number, left = divmod(rest, given_back["train"]["micro_batch_size"])
        assert left == 0
        check_micro_batches(section, number)
        assert not section.sequence or length // section.context % section.tensor == 0
        assert Plan.of(section, devices) == choice.plan
        assert section.reduce == (reduce if layout.data * layout.shard * layout.context > 1 else "fp32")


MOE = ("qwen3_moe", "mixtral", "gpt_oss", "qwen3_next")


def test_families_without_a_plan_are_not_cut(make_facts: Callable[..., ModelFacts]) -> None:
    def kinds(family: str, **changes: Any) -> tuple[set[int], set[int]]:
        plans = list(legal_plans(make_facts(family, **changes), Job(256, 64, 1), make_cluster(8)))
        return {plan.layout.tensor for plan in plans}, {plan.layout.pipeline for plan in plans}

    assert kinds("llama") == ({1, 2, 4}, {1, 2, 4})
    assert kinds("stablelm") == ({1}, {1})  # transformers has no plan for it
    assert kinds("granite", embedding_multiplier=2.0)[1] == {1}


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "ppo", "distill"])
@pytest.mark.parametrize("dimension", ["context", "pipeline"])
def test_what_an_objective_refuses_is_not_offered(name: str, dimension: str) -> None:
    settings: dict[str, Any] = {"objective": name}
    recipe = Recipe.model_validate({"train": settings, "parallel": {dimension: 2}})
    refused = False
    try:
        make_objective(recipe).check(None)
    except (ConfigError, AttributeError, TypeError) as error:  # of a data set that is not there
        refused = f"parallel.{dimension}" in str(error)
    assert (dimension in job_of_recipe(recipe).whole) == refused


def test_a_smaller_state_is_no_way_out_where_weights_are_cut(llama: Callable[[str], ModelFacts]) -> None:
    job, plan = Job(2048, 8, 1, checkpointing="full"), Plan(Layout(shard=8))
    memory = memory_of(llama("8B"), job, plan).total
    with pytest.raises(ConfigError) as caught:
        check_fits(llama("8B"), job, plan, memory_bytes=round(0.9 * memory))
    assert "adamw8bit" not in str(caught.value.fix)
    with pytest.raises(ConfigError) as caught:  # one process has nobody to share with
        check_fits(llama("8B"), job, Plan(Layout()), memory_bytes=30 * 10**9)
    assert "offload" not in str(caught.value.fix)


def test_a_recipe_that_would_be_refused_does_not_fit_as_it_stands(
    make_facts: Callable[..., ModelFacts],
) -> None:
    planning = choose(make_facts(), Job(256, 64, 1, optimizer="adamw8bit"), make_cluster(8))
    assert planning.chosen.plan.layout.data == 8
    for section, message in (
        (ParallelSection(shard=8), "keeps state of whole weights"),
        (ParallelSection(tensor=8), "is not cut so"),
        (ParallelSection(pipeline=8), "stages are more"),
    ):
        with pytest.raises(ConfigError, match=message):
            as_it_stands(planning, section)
