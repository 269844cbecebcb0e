"""The time of a step: collectives, arithmetic, what overlaps, and waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.parallel.layout import Layout
from hearth.parallel.planner import Job, ModelFacts, Plan, make_cluster, step_time
from hearth.parallel.planner.collectives import Group, collective_seconds
from hearth.parallel.planner.hardware import LINK_EFFICIENCY, LINKS, find_device
from hearth.parallel.planner.memory import gathered_bytes
from hearth.parallel.planner.state import place
from hearth.parallel.planner.work import layer_seconds, product_rate, recomputed_share

JOB = Job(4096, 256, 1, isolated=False)


@given(size=st.integers(2, 512), bytes_=st.floats(1e3, 1e10), stride=st.sampled_from([1, 2, 8]))
def test_all_reduce_is_a_reduce_scatter_and_an_all_gather(size: int, bytes_: float, stride: int) -> None:
    cluster, group = make_cluster(4096), Group(size, stride)
    halves = [collective_seconds(name, bytes_, group, cluster) for name in ("reduce_scatter", "all_gather")]  # type: ignore[arg-type]
    assert collective_seconds("all_reduce", bytes_, group, cluster) == pytest.approx(sum(halves))
    assert collective_seconds("all_reduce", 2 * bytes_, group, cluster) > sum(halves)
    assert collective_seconds("all_reduce", bytes_, Group(1), cluster) == 0.0


def test_groups_find_their_wires() -> None:
    cluster = make_cluster(64)
    layout = Layout(pipeline=2, data=2, shard=4, tensor=4)
    assert Group.of(layout, "tensor") == Group(4, 1)
    assert Group.of(layout, "shard") == Group(4, 4)
    assert Group.of(layout, "data") == Group(2, 16)
    assert Group.of(layout, "pipeline") == Group(2, 32)
    assert Group.of(layout, "data", "shard") == Group(8, 4)
    assert Group(8).nodes(cluster) == 1
    nvlink, ib = LINKS["nvlink4"].bandwidth, LINKS["ib"].bandwidth
    assert Group(8).bandwidth(cluster) == LINK_EFFICIENCY * nvlink
    # One of each node: its own wire. All of each node: a ring has the wires of all of them.
    assert Group(8, 8).bandwidth(cluster) == LINK_EFFICIENCY * ib
    assert Group(64).bandwidth(cluster) == LINK_EFFICIENCY * min(nvlink, 8 * ib)


def test_large_messages_go_at_the_bandwidth_of_the_wire() -> None:
    cluster = make_cluster(8)
    seconds = collective_seconds("all_gather", 80e9, Group(8), cluster)
    assert seconds == pytest.approx(7 / 8 * 80e9 / (LINK_EFFICIENCY * 450e9), rel=0.01)


def test_a_layer_is_its_products_and_more(llama: Callable[[str], ModelFacts]) -> None:
    facts, device = llama("8B"), find_device("h100")
    found = layer_seconds(facts, 0, JOB, device, tokens=4096, tensor=1)
    products = 2 * 4096 * facts.count("attention", "dense", layer=0) / product_rate(JOB, device)
    assert products < found.forward < 2 * products
    assert 1.8 * found.forward < found.backward < 2.6 * found.forward
    again = layer_seconds(facts, 0, JOB.with_(checkpointing="full"), device, tokens=4096, tensor=1)
    assert again.forward == found.forward
    assert again.backward == pytest.approx(found.backward + found.forward, rel=0.02)
    halves = layer_seconds(facts, 0, JOB, device, tokens=4096, tensor=2)
    assert found.forward / 2 < halves.forward < 0.65 * found.forward
    assert recomputed_share(facts, facts.layers[0], JOB) == 0.0


def test_parts_add_up_and_mfu_is_the_models_arithmetic(llama: Callable[[str], ModelFacts]) -> None:
    cluster = make_cluster(64)
    step = step_time(llama("8B"), JOB, Plan(Layout(shard=64)), cluster)
    assert step.seconds == pytest.approx(sum(step.parts().values()))
    assert step.tokens == 256 * 4096
    assert step.tokens_per_day == pytest.approx(86400 * step.tokens / step.seconds)
    assert step.mfu == pytest.approx(step.model_flops / step.seconds / (64 * 989e12))
    assert 0.2 < step.mfu < 0.6


def test_the_bubble_is_that_of_the_schedule(llama: Callable[[str], ModelFacts]) -> None:
    cluster = make_cluster(32)

    def bubble(schedule: str, chunks: int, rows: int) -> float:
        job = JOB.with_(batch_size=rows * 4)
        plan = Plan(Layout(shard=4, pipeline=8), schedule=schedule, chunks=chunks)
        step = step_time(llama("8B"), job, plan, cluster)
        return step.bubble / (step.compute + step.tensor)

    assert bubble("1f1b", 1, 16) == pytest.approx(7 / 16)
    assert bubble("interleaved", 2, 16) == pytest.approx(7 / 32)
    assert bubble("zero_bubble", 2, 16) < bubble("interleaved", 2, 16) / 2
    assert bubble("1f1b", 1, 64) == pytest.approx(7 / 64)


def test_what_is_hidden_does_not_show(llama: Callable[[str], ModelFacts]) -> None:
    many = JOB.with_(batch_size=64, micro_batch_size=1)
    near = step_time(llama("8B"), many, Plan(Layout(shard=8)), make_cluster(8))
    assert near.data < 0.02 * near.seconds
    far = step_time(
        llama("8B"), many, Plan(Layout(shard=8)), make_cluster(8, interconnect="ethernet+ethernet")
    )
    assert far.data > 0.5 * far.seconds
    # ZeRO 2 and 1 gather once a step, 1 shares gradients once.
    shares = [
        step_time(
            llama("8B"),
            many,
            Plan(Layout(shard=8), zero=zero),
            make_cluster(8, interconnect="ethernet+ethernet"),
        ).data
        for zero in (3, 2, 1)
    ]
    assert shares == sorted(shares, reverse=True)
    bf16 = many.with_(bf16_reduce=True)
    wires: dict[str, Any] = {"interconnect": "ethernet+ethernet"}
    replicas = Plan(Layout(data=8))
    assert (
        step_time(llama("8B"), bf16, replicas, make_cluster(8, **wires)).data
        < step_time(llama("8B"), many, replicas, make_cluster(8, **wires)).data
    )


def test_experts_travel(mixture: ModelFacts) -> None:
    plan = Plan(Layout(data=8, expert=8))
    near = step_time(mixture, JOB, plan, make_cluster(8))
    assert near.expert > 0
    assert step_time(mixture, JOB, Plan(Layout(data=8)), make_cluster(8)).expert == 0.0
    apart = step_time(mixture, JOB, plan, make_cluster(8, per_node=1))
    assert apart.expert > near.expert


def test_float32_has_its_own_rate(llama: Callable[[str], ModelFacts]) -> None:
    halves, whole = (
        step_time(llama("8B"), JOB.with_(precision=precision), Plan(Layout(shard=8)), make_cluster(8))
        for precision in ("bf16", "fp32")
    )
    assert whole.compute > 5 * halves.compute


def test_weights_travel_in_the_type_of_autocast(
    llama: Callable[[str], ModelFacts], mixture: ModelFacts
) -> None:
    halves, whole = JOB, JOB.with_(precision="fp32")
    dense = llama("8B")
    placed = place(dense, JOB, range(dense.num_layers), first=True, last=True, tensor=1, expert=1)
    ends = dense.count(layer=None) - sum(dense.count(layer=index) for index in range(dense.num_layers))
    assert gathered_bytes(placed, halves) == 2 * (dense.num_parameters - ends) + 4 * ends
    assert gathered_bytes(placed, whole) == 4 * dense.num_parameters
    # Layers with experts are gathered as they are.
    placed = place(mixture, JOB, range(mixture.num_layers), first=True, last=True, tensor=1, expert=1)
    assert gathered_bytes(placed, halves) == 4 * mixture.num_parameters


def test_a_sequence_shares_what_is_sharded(llama: Callable[[str], ModelFacts]) -> None:
    slow, job = make_cluster(8, interconnect="ethernet+ethernet"), JOB.with_(sequence_length=32768)
    split = step_time(llama("8B"), job, Plan(Layout(shard=2, context=4)), slow)
    whole = step_time(
        llama("8B"), job, Plan(Layout(shard=2)), make_cluster(2, interconnect="ethernet+ethernet")
    )
    assert split.data > whole.data  # a part of a row hides less, and more processes have to be asked


def test_offload_is_slow(llama: Callable[[str], ModelFacts]) -> None:
    plain, offloaded = (
        step_time(llama("8B"), JOB, Plan(Layout(shard=8), offload=offload), make_cluster(8))
        for offload in (False, True)
    )
    assert offloaded.host > 0 == plain.host
    assert offloaded.seconds > plain.seconds


@settings(deadline=None, max_examples=40)
@given(rows=st.sampled_from([64, 128, 512]), length=st.sampled_from([512, 2048, 8192]))
def test_more_work_takes_longer_and_quicker_devices_less(
    make_facts: Callable[..., ModelFacts], rows: int, length: int
) -> None:
    facts, plan = make_facts(), Plan(Layout(data=8))
    job = Job(length, rows, 1, isolated=False)
    seconds = step_time(facts, job, plan, make_cluster(8)).seconds
    assert step_time(facts, job.with_(batch_size=2 * rows), plan, make_cluster(8)).seconds > seconds
    assert step_time(facts, job.with_(sequence_length=2 * length), plan, make_cluster(8)).seconds > seconds
    assert step_time(facts, job, plan, make_cluster(8, gpu="a100")).seconds >= seconds
