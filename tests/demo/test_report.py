"""The demo's last page: it fits a terminal, shows text as it is, and says where the model loses."""

from __future__ import annotations

import dataclasses

import pytest
from rich.cells import cell_len
from rich.text import Text

from hearth.demo.report import WIDTH, Answer, DemoReport, render


@pytest.fixture
def report() -> DemoReport:
    stage = {"num_tokens": 5.1e6, "epochs": 12.3, "tokens_per_second": 23e3, "mfu": 0.4, "steps": 1300}
    stages = ("corpus", "pretrain", "teach", "measure", "register", "gate", "serve and ask")
    return DemoReport(
        minutes=3.5,
        device="cpu",
        corpus={
            "num_documents": 12_345,
            "num_bytes": 123.4e6,
            "python": "3.11.17",
            "num_held_out": 1_234,
            "vocab_size": 16_384,
            "bytes_per_token": 3.41,
        },
        chat_corpus={"num_documents": 48_123, "num_held_out": 2_402},
        training={"pretrain": stage, "chat": dict(stage)},
        compression={
            "model_bits_per_byte": 2.1,
            "xz_bits_per_byte": 1.9,
            "order0_bits_per_byte": 4.6,
            "num_bytes": 400_000,
        },
        chat_loss={"before": 14.1, "after": 12.2},
        version={
            "name": "stdlib-assistant",
            "ref": "stdlib-assistant@12",
            "alias": "production",
            "parameters": 63_200_000,
            "path": "/home/user/.hearth/models/stdlib-assistant/12",
            "runs": ["abcdefgh", "bcdfghjk"],
            "workspace": "/home/user/.hearth",
            "command": ".venv/bin/hearth",
        },
        parity={"passed": True, "prompts": [{"first_difference": None, "num_ties": 1}] * 16},
        serving={"first_token_seconds": 0.012, "tokens_per_second": 512.0, "ready_seconds": 3.0},
        answers=[
            Answer(
                "What does f do? " * 9, "Return [b]it[/b]. " * 9, "Return [red]x[/red].\n" * 9, True, 0.1, 5.0
            ),
            Answer("What is g?", "A function.", "", False, 0.1, 5.0),
        ],
        seconds=dict.fromkeys(stages, 123.4),
        reused=["dataset", "questions", "pretrain run", "chat run", "parity report"],
    )


def plain(report: DemoReport) -> str:
    return Text.from_markup(render(report)).plain


def test_the_page_fits_a_terminal(report: DemoReport) -> None:
    assert [line for line in plain(report).splitlines() if cell_len(line) > WIDTH] == []


def test_what_the_model_wrote_is_no_markup(report: DemoReport) -> None:
    assert "Return [red]x[/red]." in plain(report)
    assert "A (nothing)" in plain(report)


def test_it_says_where_it_loses_and_where_it_wins(report: DemoReport) -> None:
    assert "behind xz by 11 %" in plain(report)
    assert "rounding decided 16 near ties" in plain(report)
    better = dataclasses.replace(report, compression=report.compression | {"model_bits_per_byte": 1.52})
    assert "better than xz by 20 %" in plain(better)


def test_a_stage_without_a_measured_speed(report: DemoReport) -> None:
    report.training["chat"] |= {"tokens_per_second": None, "mfu": None}
    assert "teaching     1300 steps" in plain(report)


def test_a_long_demo_proposes_no_shorter_one(report: DemoReport) -> None:
    assert "demo --minutes 30" in plain(report)
    assert "demo --minutes" not in plain(dataclasses.replace(report, minutes=45.0))
