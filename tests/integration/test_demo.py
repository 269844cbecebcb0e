"""The main job, for real, at a tiny budget: raw text to answers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_demo_reaches_answers(demo_report: tuple[Any, dict[str, Any]]) -> None:
    _, report = demo_report
    assert report["parity"]["passed"] is True
    assert report["version"]["ref"] == "stdlib-assistant@1"
    assert {answer["held_out"] for answer in report["answers"]} == {True, False}
    assert all(answer["question"] and answer["expected"] for answer in report["answers"])
    measured = report["compression"]
    # Even seconds of training beat byte frequencies; if not, training or scoring is broken.
    assert 0 < measured["model_bits_per_byte"] < measured["order0_bits_per_byte"]
    assert 0 < measured["xz_bits_per_byte"] < measured["order0_bits_per_byte"]
    assert report["chat_loss"]["after"] < report["chat_loss"]["before"]
    assert not report["reused"]


def test_second_demo_reuses_what_is_unchanged(demo_report: tuple[Any, dict[str, Any]]) -> None:
    shell, first = demo_report
    again = shell.json("demo", "--minutes", "0.1", timeout=600)
    assert set(again["reused"]) == {"dataset", "questions", "pretrain run", "chat run", "parity report"}
    assert again["version"]["ref"] == first["version"]["ref"]
    assert again["compression"] == first["compression"]
    # Greedy answers of an unchanged model are unchanged.
    assert [answer["text"] for answer in again["answers"]] == [answer["text"] for answer in first["answers"]]


def test_demo_leaves_a_model_that_transformers_opens(demo_report: tuple[Any, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, report = demo_report
    path = report["version"]["path"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does os.getcwd do?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert output.shape[1] > prompt["input_ids"].shape[1]


def test_lineage_leads_from_the_version_to_the_library(demo_report: tuple[Any, dict[str, Any]]) -> None:
    shell, report = demo_report
    text = shell.run("lineage", "stdlib-assistant@production").stdout
    for node in (report["version"]["ref"], report["version"]["base"], *report["version"]["runs"], "stdlib"):
        assert node in text


def test_a_damaged_version_is_found_and_not_served(demo_report: tuple[Any, dict[str, Any]]) -> None:
    shell, report = demo_report
    weights = Path(report["version"]["path"]) / "model.safetensors"
    original = weights.read_bytes()
    damaged = bytearray(original)
    damaged[-5] ^= 1
    weights.chmod(0o644)
    try:
        weights.write_bytes(bytes(damaged))
        verify = shell.run("models", "verify", "stdlib-assistant@1", code=1)
        assert "model.safetensors" in verify.stderr
        served = shell.run("serve", "stdlib-assistant@1", "--port", "0", code=1, timeout=120)
        assert "model.safetensors" in served.stderr
    finally:
        weights.write_bytes(original)
    shell.run("models", "verify", "stdlib-assistant@1")
