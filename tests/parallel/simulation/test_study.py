"""Kinds of layouts on more and more devices, and the picture of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from transformers import AutoConfig

from hearth.parallel.layout import Layout
from hearth.parallel.planner import Job, Plan, facts_of_config, make_cluster
from hearth.parallel.simulation.plot import Panel, svg
from hearth.parallel.simulation.run import Faults
from hearth.parallel.simulation.study import KINDS, Point, kind_of, saves_of, study


@pytest.fixture(scope="module")
def found() -> dict[str, list[Point]]:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    job = Job(2048, 64, 1, isolated=False)
    clusters = [make_cluster(size) for size in (8, 64, 128)]
    return study(facts_of_config(config), job, clusters, faults=Faults(), rounds=2)


def test_every_kind_is_found_where_it_can_be(found: dict[str, list[Point]]) -> None:
    sizes = {kind: [point.num_devices for point in points] for kind, points in found.items()}
    # 64 rows are not enough for 128 processes with rows of their own.
    assert sizes == {KINDS[0]: [8, 64], KINDS[1]: [8, 64], KINDS[2]: [8, 64, 128], KINDS[3]: [8, 64, 128]}
    for kind, points in found.items():
        for point in points:
            assert kind_of(point.choice.plan) == kind
            assert 0 < point.effective_mfu < point.choice.step.mfu
    assert [point.outcome.goodput for point in found[KINDS[3]]] == sorted(
        (point.outcome.goodput for point in found[KINDS[3]]), reverse=True
    )


def test_kinds_of_plans() -> None:
    plans = (Layout(data=8), Layout(shard=8), Layout(shard=4, tensor=2), Layout(tensor=2, pipeline=4))
    assert tuple(kind_of(Plan(layout)) for layout in plans) == KINDS


def test_more_devices_save_and_load_faster(found: dict[str, list[Point]]) -> None:
    facts = facts_of_config(AutoConfig.for_model("llama", num_hidden_layers=2, vocab_size=1000))
    few, many = (saves_of(facts, make_cluster(size)) for size in (8, 64))
    assert few.stall_seconds == pytest.approx(8 * many.stall_seconds)
    assert few.load_seconds == pytest.approx(8 * many.load_seconds)
    assert few.bytes == 12 * facts.num_parameters


def test_the_picture_is_whole_and_inside_its_frame(found: dict[str, list[Point]]) -> None:
    lines = {kind: [(point.num_devices, point.effective_mfu) for point in found[kind]] for kind in KINDS}
    text = svg(
        "A <title> & more", [Panel("one", lines, top=0.6), Panel("none", {kind: [] for kind in KINDS})]
    )
    root = ET.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{space}polyline")) == 4
    assert len(root.findall(f".//{space}circle")) == 2 + 2 + 3 + 3
    assert "nothing fits" in text
    for line in root.findall(f".//{space}polyline"):
        numbers = [float(number) for number in re.findall(r"[\d.]+", line.attrib["points"])]
        assert all(
            0 <= x <= width and 0 <= y <= height for x, y in zip(numbers[::2], numbers[1::2], strict=True)
        )
