"""Jobs as data, and what is read from command lines."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearth.errors import ConfigError
from hearth.parallel.launch.spec import (
    JobSpec,
    Rendered,
    Resources,
    parse_duration,
    parse_memory,
    parse_pairs,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("2h30m", 9000), ("1d", 86_400), ("1-02:03:04", 93_784),
     ("00:10:00", 600), (" 5m ", 300)],
)  # fmt: skip
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "5x", "1.5h", "0", "m", "1:00"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "mebibytes"),
    [
        ("512M", 512),
        ("64G", 65_536),
        ("64GiB", 65_536),
        ("1.5T", 1_572_864),
        ("2048k", 2),
    ],
)
def test_memory(text: str, mebibytes: int) -> None:
    assert parse_memory(text) == mebibytes


@pytest.mark.parametrize("text", ["", "64", "G", "-1G", "0G", "lots"])
def test_what_is_no_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size of memory"):
        parse_memory(text)


def test_pairs() -> None:
    assert parse_pairs(("A=1", "B=x=y", "C="), "--env") == {"A": "1", "B": "x=y", "C": ""}
    with pytest.raises(ConfigError, match="--env 'A' is not NAME=VALUE"):
        parse_pairs(("A",), "--env")
    # No shell can export it; options of backends have names of another kind.
    with pytest.raises(ConfigError, match="--env 'A-B=1' is not NAME=VALUE"):
        parse_pairs(("A-B=1",), "--env")
    assert parse_pairs(("a-b=1",), "--option", allowed={"a-b": ""}) == {"a-b": "1"}
    with pytest.raises(ConfigError, match="has no 'portt' here") as caught:
        parse_pairs(("portt=1",), "--option", allowed={"port": "of rank 0"})
    assert caught.value.fix == "it knows port: of rank 0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes: 0 is less than 1"),
        ({"processes": -1}, "processes of a node: -1"),
        ({"recipe": None}, "no recipe given"),
        ({"max_restarts": -1}, "--max-restarts -1"),
        ({"join_timeout": 0}, "--join-timeout 0"),
        ({"environment": (("RANK", "1"),)}, "--env RANK is set by the launcher"),
    ],
)
def test_jobs_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JobSpec(**{"name": "j", "recipe": "r.yaml", "workspace": "/w", **changes})


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@given(
    overrides=st.lists(texts, max_size=3),
    environment=st.dictionaries(texts, texts, max_size=3),
    nodes=st.integers(1, 9),
    cpus=st.none() | st.integers(1, 99),
)
def test_a_job_survives_its_record(
    overrides: list[str], environment: dict[str, str], nodes: int, cpus: int | None
) -> None:
    spec = JobSpec(
        "j", "r.yaml", "/w", tuple(overrides), nodes=nodes, environment=tuple(environment.items()),
        resources=Resources(2, cpus, None),
    )  # fmt: skip
    assert JobSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_arguments_and_variables_of_processes() -> None:
    spec = JobSpec(
        "j", "r.yaml", "/w", ("a=1",), resume="r7", environment=(("A", "b"),), nodes=2, processes=4
    )
    assert spec.arguments() == ["--resume", "r7", "r.yaml", "a=1"]
    assert spec.variables() == {"HEARTH_HOME": "/w", "HEARTH_JOB_DIR": "/w/jobs/j", "A": "b"}
    assert spec.world_size == 8


def test_what_is_rendered_shows_files_and_quoted_commands() -> None:
    text = Rendered({"a.sh": "x\n"}, (("run", "a b"),)).to_text()
    assert text == "# ── a.sh ──\nx\n\n# ── commands ──\nrun 'a b'\n"
