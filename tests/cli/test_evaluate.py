"""`hearth eval` and `hearth parity`, with a real small model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.config.recipe import ModelSection
from hearth.data.tokenizer import train_bpe
from hearth.models import build_model, load_tokenizer, save_model
from hearth.workspace import Workspace

TEXT = "The library opened at nine, and by ten every chair was taken.\n" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_bpe([TEXT], 300).save(folder / "tokenizer", model_max_length=128)
    tokenizer = load_tokenizer(folder / "tokenizer")
    section = ModelSection.model_validate({"size": "100K", "context_length": 128})
    save_model(build_model(section, vocab_size=len(tokenizer), seed=0), tokenizer, folder / "tiny")
    return folder / "tiny"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_eval_text_beside_the_baselines(
    hearth: Callable[..., Any], workspace_dir: Path, model: Path, text_file: Path
) -> None:
    report = hearth("eval", model, "--text", text_file, "--json").json
    assert report["num_bytes"] == len(TEXT)
    # A model of random weights takes every token for about equally likely.
    uniform = math.log2(report["vocab_size"]) * (report["num_scored"] + 1) / len(TEXT)
    assert report["bits_per_byte"] == pytest.approx(uniform, rel=0.1)
    # One line over and over: bytes taken one by one look random, repetition compresses to almost nothing.
    assert report["order0_bits_per_byte"] > 5 * report["xz_bits_per_byte"] > 0
    table = hearth("eval", model, "--text", text_file)
    assert (table.code, "bits_per_byte" in table.out) == (0, True)


def test_reports_of_a_version_are_kept(
    hearth: Callable[..., Any], workspace_dir: Path, model: Path, text_file: Path
) -> None:
    with Workspace.open() as workspace:
        workspace.registry.create_version("tiny", model)
    hearth("eval", "tiny", "--text", text_file)
    refused = hearth("models", "promote", "tiny@1", "production")
    assert refused.code == 1
    assert "hearth parity tiny@1" in refused.err
    passed = hearth("parity", "tiny", "--prompts", "1", "--tokens", "8", "--json")
    assert (passed.code, passed.json["passed"]) == (0, True)
    assert hearth("models", "promote", "tiny@1", "production").code == 0
    with Workspace.open() as workspace:
        kinds = {report.kind for report in workspace.registry.reports("tiny@1")}
    assert kinds == {"parity", "evaluation"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "the file is empty"), (b"ok \xff\xfe", "byte 3 is 0xff"), (None, "no such file")],
)
def test_unusable_text(
    hearth: Callable[..., Any],
    workspace_dir: Path,
    model: Path,
    tmp_path: Path,
    content: bytes | None,
    problem: str,
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    outcome = hearth("eval", model, "--text", path)
    assert outcome.code == 2
    assert problem in outcome.err
    assert "bad.txt" in outcome.err


def test_nothing_to_evaluate_on(hearth: Callable[..., Any], workspace_dir: Path, model: Path) -> None:
    outcome = hearth("eval", model)
    assert outcome.code == 2
    assert "give --text FILE or --dataset DIRECTORY" in outcome.err


@pytest.mark.parametrize(
    ("option", "value"), [("--tokens", "0"), ("--tokens", "1"), ("--prompts", "-1"), ("--dtype", "int4")]
)
def test_a_gate_of_nothing_is_refused(
    hearth: Callable[..., Any], workspace_dir: Path, model: Path, option: str, value: str
) -> None:
    outcome = hearth("parity", model, option, value)
    assert outcome.code == 2
    assert value in outcome.err


def test_a_pipe_gets_no_progress(
    hearth: Callable[..., Any], workspace_dir: Path, model: Path, text_file: Path
) -> None:
    assert hearth("eval", model, "--text", text_file).err == ""


@pytest.mark.parametrize("verb", ["eval", "parity"])
def test_an_unknown_model(hearth: Callable[..., Any], workspace_dir: Path, verb: str) -> None:
    outcome = hearth(verb, "nobody")
    assert outcome.code == 2
    assert "nobody" in outcome.err
