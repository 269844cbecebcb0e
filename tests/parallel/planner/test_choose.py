"""Choosing a layout: what is legal, that it fits, that it follows the rules, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.config import Recipe
from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
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
from hearth.parallel.planner.choose import FILLED, find_choices, legal_layouts, legal_plans
from hearth.parallel.planner.explain import zero_rule
from hearth.parallel.planner.job import check_job, what_is_missing
from hearth.parallel.planner.report import as_dict, cost, parallel_section, paste

GB = 10**9


def test_every_legal_layout_divides(make_facts: Callable[..., ModelFacts], mixture: ModelFacts) -> None:
    cluster = make_cluster(32)
    job = Job(256, 64, 1)
    layouts = list(legal_layouts(make_facts(), job, cluster))
    assert len(layouts) == len(set(layouts)) > 10
    for layout in layouts:
        assert layout.world_size == 32
        assert 4 % layout.tensor == 0  # key heads
        assert layout.pipeline <= 4
        assert layout.tensor * layout.context <= 8
        assert layout.expert == 1
    assert {layout.expert for layout in legal_layouts(mixture, job, cluster)} == {1, 2, 4, 8}


def test_what_cannot_be_cut_is_not(make_facts: Callable[..., ModelFacts]) -> None:
    cluster = make_cluster(8)
    tied = make_facts(tie_word_embeddings=True)
    assert {layout.pipeline for layout in legal_layouts(tied, Job(256, 64, 1), cluster)} == {1}
    adapter: Any = Recipe.model_validate({"model": {"base": "x", "adapter": {"rank": 4}}}).model.adapter
    job = Job(256, 64, 1, adapter=adapter)
    assert {(each.tensor, each.pipeline) for each in legal_layouts(make_facts(), job, cluster)} == {(1, 1)}
    # Short rows are not cut over processes; long ones may be.
    assert {each.context for each in legal_layouts(tied, Job(256, 64, 1), cluster)} == {1}
    assert {each.context for each in legal_layouts(tied, Job(32768, 64, 1), cluster)} == {1, 2, 4, 8}


@settings(deadline=None, max_examples=12)
@given(
    devices=st.sampled_from([1, 2, 4, 8, 16]),
    memory=st.integers(20, 400),
    rows=st.sampled_from([16, 64]),
    length=st.sampled_from([128, 1024]),
)
def test_the_chosen_layout_fits_and_none_is_much_faster(
    make_facts: Callable[..., ModelFacts], devices: int, memory: int, rows: int, length: int
) -> None:
    facts, job = make_facts(hidden_size=256, vocab_size=8192), Job(length, rows, 1)
    cluster = make_cluster(devices, memory=memory * 100_000_000)
    try:
        planning = choose(facts, job, cluster)
    except ConfigError as error:
        assert "do not fit" in str(error)  # noqa: PT017 - either is right, depending on the memory
        return
    chosen = planning.chosen
    assert chosen.memory.total <= FILLED * cluster.device.memory
    assert chosen.plan.layout.world_size == devices
    assert chosen.plan.micro_batches(chosen.job) >= 1
    fastest = min(choice.step.seconds for choice in planning.choices)
    assert fastest <= chosen.step.seconds <= 1.05 * fastest
    # The sections to paste are a legal recipe that means the same plan.
    section = ParallelSection.model_validate(parallel_section(chosen))
    assert Plan.of(section, devices) == chosen.plan or chosen.plan.layout.shard == 1


def test_small_models_are_replicated_and_large_ones_cut(llama: Callable[[str], ModelFacts]) -> None:
    job = Job(4096, 1024, 1, isolated=False)
    small = choose(llama("8B"), job, make_cluster(64)).chosen.plan.layout
    assert (small.tensor, small.pipeline) == (1, 1)
    large = choose(llama("405B"), job, make_cluster(512)).chosen.plan.layout
    assert large.tensor * large.pipeline > 1
    assert large.tensor <= 8


def test_memory_decides_the_stage_of_zero(make_facts: Callable[..., ModelFacts]) -> None:
    facts = make_facts(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=32000)
    job = Job(1024, 64, 1, checkpointing="full")
    found = {
        memory: {
            choice.plan.zero
            for choice in find_choices(facts, job, make_cluster(8, memory=memory * GB))[0]
            if choice.plan.layout.tensor == choice.plan.layout.pipeline == 1
        }
        for memory in (40, 7)
    }
    assert found[40] == {1, 2, 3}
    assert 1 not in found[7]
    assert ["ZeRO 1" in zero_rule(0.5), "ZeRO 2" in zero_rule(2.0), "ZeRO 3" in zero_rule(6.0)] == [True] * 3
    assert "offload" in zero_rule(20.0)


def test_the_reasons_name_the_case(llama: Callable[[str], ModelFacts]) -> None:
    planning = choose(llama("70B"), Job(4096, 1024, 1, isolated=False), make_cluster(64))
    text = "\n".join(planning.reasons)
    assert "70.6B parameters are above 7 B" in text
    assert "times the memory of a device" in text
    assert "layouts that fit" in text
    layout = planning.chosen.plan.layout
    assert (f"tensor {layout.tensor} stays within a node" in text) == (layout.tensor > 1)
    assert (f"pipeline {layout.pipeline} " in text) == (layout.pipeline > 1)


def test_a_batch_that_does_not_divide(make_facts: Callable[..., ModelFacts]) -> None:
    tied = make_facts(tie_word_embeddings=True, num_key_value_heads=1)
    with pytest.raises(ConfigError, match=r"batch_size 4 cannot be divided over 16 devices") as caught:
        choose(tied, Job(256, 4, 1), make_cluster(16))
    assert "multiple of 16" in str(caught.value.fix)


def test_what_cannot_fit_is_refused_with_what_would(llama: Callable[[str], ModelFacts]) -> None:
    job, cluster = Job(4096, 64, 1, isolated=False), make_cluster(8, memory=9 * GB)
    with pytest.raises(ConfigError, match=r"do not fit 8 x 8\.4 GiB in any layout") as caught:
        choose(llama("70B"), job, cluster)
    fix = str(caught.value.fix)
    assert "devices of this size are enough" in fix
    number = int(fix.split()[0])
    assert number > 8
    assert choose(llama("70B"), job.with_(batch_size=max(64, number)), make_cluster(number, memory=9 * GB))


def test_where_more_devices_do_not_help(llama: Callable[[str], ModelFacts]) -> None:
    # The embedding of 405B alone is 8.4 GB, gathered in one piece with its gradient.
    with pytest.raises(ConfigError) as caught:
        choose(llama("405B"), Job(4096, 64, 1, isolated=False), make_cluster(8, memory=8 * GB))
    assert "more of these devices are not enough" in str(caught.value.fix)


def test_a_smaller_optimizer_that_is_enough_is_named(make_facts: Callable[..., ModelFacts]) -> None:
    facts = make_facts(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=32000)
    job, one = Job(512, 8, 1, checkpointing="full"), make_cluster(1)
    needed = memory_of(facts, job.with_(optimizer="adamw8bit"), Plan(Layout())).total / FILLED
    cluster = make_cluster(1, memory=round(1.01 * needed))
    found, _ = find_choices(facts, job, one)
    assert found
    assert not find_choices(facts, job, cluster)[0]
    assert find_choices(facts, job.with_(optimizer="adamw8bit"), cluster)[0]


def test_a_run_is_checked_before_it_starts(llama: Callable[[str], ModelFacts]) -> None:
    job = Job(4096, 8, 4, isolated=False)
    memory = check_fits(llama("8B"), job, Plan(Layout()), memory_bytes=400 * GB)
    assert memory == memory_of(llama("8B"), job, Plan(Layout()))
    for room, fix in (
        (0.9 * memory.total, "train.activation_checkpointing: selective"),
        (0.5 * memory.total, "activation_checkpointing: full"),
    ):
        with pytest.raises(ConfigError, match="this run does not fit: a process needs") as caught:
            check_fits(llama("8B"), job, Plan(Layout()), memory_bytes=round(room / FILLED))
        assert fix in str(caught.value.fix)
    with pytest.raises(ConfigError) as caught:
        check_fits(llama("8B"), job, Plan(Layout(data=8)), memory_bytes=60 * GB)
    assert "parallel.shard: 8 with zero: 3" in str(caught.value.fix)


def test_what_an_error_of_the_estimate_may_explain_is_not_refused(llama: Callable[[str], ModelFacts]) -> None:
    job, plan = Job(4096, 8, 4, isolated=False), Plan(Layout())
    memory = memory_of(llama("8B"), job, plan)
    assert check_fits(llama("8B"), job, plan, memory_bytes=round(memory.tensors), certain=True) == memory
    with pytest.raises(ConfigError, match="this run does not fit"):
        check_fits(llama("8B"), job, plan, memory_bytes=round(0.9 * memory.tensors), certain=True)


def test_the_memory_of_the_host_is_no_way_out_of_itself(make_facts: Callable[..., ModelFacts]) -> None:
    job, plan = Job(128, 2, 1, checkpointing="full"), Plan(Layout(shard=2))
    facts = make_facts(num_hidden_layers=24, hidden_size=1024, intermediate_size=4096)
    for device, fix in (("cuda", "parallel.offload: cpu"), ("cpu", "a smaller model")):
        memory = memory_of(facts, job, plan, device=device)
        with pytest.raises(ConfigError) as caught:
            check_fits(facts, job, plan, memory_bytes=round(memory.total), device=device)
        assert fix in str(caught.value.fix)


def test_figures_for_scripts(make_facts: Callable[..., ModelFacts]) -> None:
    planning = choose(make_facts(), Job(256, 64, 1), make_cluster(8, price=2.0))
    figures = as_dict(planning, top=2)
    assert len(figures["best"]) == 2
    chosen = figures["chosen"]
    assert sum(value for name, value in chosen["memory"].items() if name != "total") == pytest.approx(
        chosen["memory"]["total"], rel=1e-6
    )
    assert sum(chosen["step_parts"].values()) == pytest.approx(chosen["step_seconds"])
    assert chosen["cost_per_day"] == 2.0 * 8 * 24
    hours = 1e9 / planning.chosen.step.tokens_per_second / 3600
    assert cost(planning, planning.chosen, 1e9) == pytest.approx(hours * 16)
    assert "parallel:\n  data: " in paste(planning.chosen)


def test_slower_wires_cost(llama: Callable[[str], ModelFacts]) -> None:
    job = Job(4096, 512, 1, isolated=False)
    plan = Plan(Layout(shard=8, tensor=8), sequence=True)
    from hearth.parallel.planner import step_time

    seconds = [
        step_time(llama("8B"), job, plan, make_cluster(64, interconnect=wires)).seconds
        for wires in ("nvlink+ib", "nvlink+ethernet", "pcie+ethernet")
    ]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 3


def test_recipes_become_jobs() -> None:
    recipe = Recipe.model_validate(
        {
            "data": {"sequence_length": 256, "packing": False},
            "train": {"optimizer": "lion", "ema_decay": 0.9, "micro_batch_size": "auto", "batch_size": 16},
        }
    )
    job = job_of_recipe(recipe)
    assert (job.sequence_length, job.batch_size, job.micro_batch_size) == (256, 16, 1)
    assert (job.optimizer, job.averaged, job.isolated, job.precision) == ("lion", True, False, "bf16")
    assert what_is_missing(recipe) is None
    grpo = Recipe.model_validate({"train": {"objective": "grpo"}})
    assert "rollouts" in str(what_is_missing(grpo))
    with pytest.raises(ConfigError, match="not a multiple"):
        check_job(Job(128, 5, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "h1000"}, "'h1000' is unknown"),
        ({"interconnect": "nvlink+string"}, "'string' is no wire"),
        ({"interconnect": "nvlink", "gpu": "l40s"}, "has no NVLink"),
        ({"num_devices": 12}, "no multiple of the 8 devices of a node"),
        ({"num_devices": 0}, "--gpus 0 is not positive"),
    ],
)
def test_clusters_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_cluster(arguments.pop("num_devices", 8), **arguments)


def test_plans_of_a_pipeline(make_facts: Callable[..., ModelFacts]) -> None:
    plans = list(legal_plans(make_facts(), Job(256, 64, 1), make_cluster(8)))
    assert {plan.schedule for plan in plans} == {"1f1b", "interleaved", "zero_bubble"}
    for plan in plans:
        assert plan.chunks == 1 or plan.layout.pipeline * plan.chunks <= 4
        assert not plan.sequence or plan.layout.tensor > 1
