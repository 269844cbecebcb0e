"""The gate passes a sound model, and fails each of the ways in which serving has differed in practice."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from hearth.data.tokenizer import DataTokenizer
from hearth.engine import Completion, Engine
from hearth.errors import GateError, InputError, NotFoundError
from hearth.evaluation import run_gate
from hearth.evaluation.gate import generation_stop_ids
from hearth.evaluation.parity import ParityReport, check_continuations, continue_greedily
from hearth.evaluation.prompts import CONVERSATIONS, TEXTS, ParityPrompt, make_prompts
from hearth.models import load_model, load_tokenizer
from hearth.workspace import Workspace

MAX_TOKENS = 8


def ask(directory: Path, engine: Engine) -> list[ParityPrompt]:
    return make_prompts(
        DataTokenizer.open(directory),
        engine.tokenizer,
        num_prompts=8,
        max_prompt_tokens=100,
        vocab_size=engine.vocab_size,
    )


@pytest.fixture(scope="module")
def served(chat_model: Path) -> tuple[list[ParityPrompt], list[Completion]]:
    with Engine.load(chat_model, dtype="float32") as engine:
        prompts = ask(chat_model, engine)
        return prompts, continue_greedily(engine, prompts, max_tokens=MAX_TOKENS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_model_passes(chat_model: Path, workspace_dir: Path, dtype: str) -> None:
    with Workspace.open() as workspace:
        report = run_gate(chat_model, workspace=workspace, dtype=dtype, num_prompts=8, max_tokens=MAX_TOKENS)
    assert report.passed, report.render()
    assert {prompt.name for prompt in report.prompts} == {*TEXTS, *CONVERSATIONS}
    assert all(prompt.num_new_tokens > 0 for prompt in report.prompts)
    assert report.to_dict() == json.loads(json.dumps(report.to_dict()))
    assert "PASSED" in report.render()


@pytest.mark.parametrize(
    "compression", [{"weights": "int8"}, {"weights": "int4"}, {"kv_dtype": "int8"}], ids=str
)
def test_compressed_serving_is_judged_by_log_probabilities(
    chat_model: Path, workspace_dir: Path, compression: dict[str, str]
) -> None:
    with Workspace.open() as workspace:
        report = run_gate(
            chat_model,
            workspace=workspace,
            dtype="float32",
            num_prompts=8,
            max_tokens=MAX_TOKENS,
            **compression,
        )
    assert report.passed, report.render()
    assert {key: report.to_dict()[key] for key in compression} == compression
    assert report.mean_tolerance_nats is not None
    assert 0 < report.mean_logprob_difference <= report.mean_tolerance_nats
    assert "compressed" in report.render()


def test_a_compression_that_is_off_everywhere_fails(
    chat_model: Path, served: tuple[list[ParityPrompt], list[Completion]]
) -> None:
    """No token is far off, but the mean is: the gate of int8 allows 1 nat at once and 0.1 on average."""
    prompts, completions = served
    shifted = [
        replace(c, logprobs=[replace(entry, logprob=entry.logprob - 0.3) for entry in c.logprobs or []])
        for c in completions
    ]
    model = load_model(chat_model, dtype="float32")
    stop_ids = generation_stop_ids(model)
    settings = {"dtype": "float32", "stop_ids": stop_ids, "max_tokens": MAX_TOKENS}
    report = check_continuations(model, prompts, shifted, weights="int8", **settings)
    assert not report.passed
    assert all(prompt.max_logprob_difference < report.tolerance_nats for prompt in report.prompts)
    assert check_continuations(model, prompts, completions, weights="int8", **settings).passed


def test_other_weights_fail(chat_model: Path, served: tuple[list[ParityPrompt], list[Completion]]) -> None:
    prompts, completions = served
    model = load_model(chat_model, dtype="float32")
    with torch.no_grad():
        model.get_output_embeddings().weight[:, 3].mul_(-1)
    report = check(chat_model, prompts, completions, model=model)
    assert not report.passed
    assert "FAILED" in report.render()


def test_other_prompt_ids_fail(chat_model: Path, served: tuple[list[ParityPrompt], list[Completion]]) -> None:
    prompts, completions = served
    # A second BOS, the commonest difference of all, on the serving side only.
    doubled = [dataclasses.replace(p, served_ids=(p.served_ids[0], *p.served_ids)) for p in prompts]
    report = check(chat_model, doubled, completions)
    assert not report.passed
    assert not any(prompt.ids_equal for prompt in report.prompts)
    assert "prompt token ids differ" in report.render()


def test_stopping_where_training_would_go_on_fails(
    chat_model: Path, served: tuple[list[ParityPrompt], list[Completion]]
) -> None:
    prompts, completions = served
    early = [
        Completion(
            prompt=None,
            prompt_token_ids=c.prompt_token_ids,
            text="",
            token_ids=c.token_ids[:2],
            finish_reason="stop",
            logprobs=(c.logprobs or [])[:2],
        )
        for c in completions
    ]
    report = check(chat_model, prompts, early)
    assert not report.passed
    assert report.prompts[0].first_difference == 2
    assert report.prompts[0].served_token == "(stopped)"


def test_running_on_past_the_end_of_training_fails(
    chat_model: Path, served: tuple[list[ParityPrompt], list[Completion]]
) -> None:
    prompts, completions = served
    model = load_model(chat_model, dtype="float32")
    first = completions[0]
    # The engine did not know that this token ends a generation: it went on to max_tokens.
    model.generation_config.eos_token_id = [first.token_ids[0]]
    report = check(chat_model, prompts[:1], [first], model=model)
    assert not report.passed
    assert (report.prompts[0].first_difference, report.prompts[0].expected_token) == (1, "(stopped)")
    for reason, passed in (("length", False), ("stop", True)):
        ended = replace(
            first,
            token_ids=first.token_ids[:1],
            logprobs=(first.logprobs or [])[:1],
            finish_reason=reason,
        )
        assert check(chat_model, prompts[:1], [ended], model=model).passed is passed


def test_a_stop_without_any_stop_token_fails_instead_of_crashing(
    chat_model: Path, served: tuple[list[ParityPrompt], list[Completion]]
) -> None:
    prompts, completions = served
    stopped = [replace(c, finish_reason="stop") for c in completions]
    model = load_model(chat_model, dtype="float32")
    report = check_continuations(
        model, prompts, stopped, dtype="float32", stop_ids=frozenset(), max_tokens=MAX_TOKENS
    )
    assert not report.passed
    assert {prompt.served_token for prompt in report.prompts} == {"(stopped)"}


def test_a_log_probability_that_is_not_a_number_fails(
    chat_model: Path, served: tuple[list[ParityPrompt], list[Completion]]
) -> None:
    prompts, completions = served
    broken = [
        replace(c, logprobs=[replace(entry, logprob=math.nan) for entry in c.logprobs or []])
        for c in completions
    ]
    report = check(chat_model, prompts, broken)
    assert not report.passed
    assert all(prompt.tokens_equal for prompt in report.prompts)


def test_a_prompt_that_the_model_cannot_take_fails(chat_model: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    prompts = make_prompts(
        DataTokenizer.open(chat_model), tokenizer, num_prompts=1, max_prompt_tokens=100, vocab_size=260
    )
    assert {prompt.name for prompt in prompts} == {*TEXTS, *CONVERSATIONS}
    assert not all(prompt.ids_equal for prompt in prompts)
    assert all(max(prompt.served_ids) < 260 for prompt in prompts)


def test_a_difference_beyond_the_cut_is_seen(chat_model: Path) -> None:
    class Appending:
        """A serving side that ends every text with one token more."""

        def __init__(self) -> None:
            self.tokenizer = load_tokenizer(chat_model)

        def __getattr__(self, name: str) -> object:
            return getattr(self.tokenizer, name)

        def __call__(self, *args: object, **options: object) -> object:
            encoded = self.tokenizer(*args, **options)
            encoded["input_ids"] = [*encoded["input_ids"], 5]
            return encoded

    prompts = make_prompts(
        DataTokenizer.open(chat_model), Appending(), num_prompts=1, max_prompt_tokens=4, vocab_size=10_000
    )
    cut = {prompt.name: prompt for prompt in prompts}["plain text"]
    assert cut.trained_ids == cut.served_ids
    assert not cut.ids_equal


def test_a_folder_of_the_same_name_does_not_hide_a_version(
    chat_model: Path, workspace_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters").mkdir()  # the texts that the model of that name was trained on
    with Workspace.open() as workspace:
        workspace.registry.create_version("letters", chat_model)
        run_gate("letters", workspace=workspace, num_prompts=1, max_tokens=MAX_TOKENS)
        assert workspace.registry.reports("letters@1", "parity")
        # A model directory wins over a name, and the version gets no report for it.
        shutil.copytree(chat_model, tmp_path / "letters", dirs_exist_ok=True)
        run_gate("letters", workspace=workspace, num_prompts=1, max_tokens=MAX_TOKENS)
        assert len(workspace.registry.reports("letters@1", "parity")) == 1


def check(
    directory: Path,
    prompts: list[ParityPrompt],
    completions: list[Completion],
    model: torch.nn.Module | None = None,
) -> ParityReport:
    model = model or load_model(directory, dtype="float32")
    return check_continuations(
        model,
        prompts,
        completions,
        dtype="float32",
        stop_ids=generation_stop_ids(model),
        max_tokens=MAX_TOKENS,
    )


def test_a_tie_is_counted_not_failed(
    chat_model: Path, served: tuple[list[ParityPrompt], list[Completion]]
) -> None:
    prompts, completions = served
    model = load_model(chat_model, dtype="float32")
    with torch.no_grad():
        # All tokens equally likely: whatever the engine chose ties with the best.
        model.get_output_embeddings().weight.zero_()
    strict = check(chat_model, prompts, completions, model=model)
    assert not strict.passed  # the log-probabilities differ
    assert all(prompt.tokens_equal for prompt in strict.prompts)
    assert sum(prompt.num_ties for prompt in strict.prompts) > 0


def test_the_gate_guards_promotion(chat_model: Path, workspace_dir: Path) -> None:
    with Workspace.open() as workspace:
        version = workspace.registry.create_version("tiny", chat_model)
        with pytest.raises(GateError, match="tiny@1"):
            workspace.registry.promote(version.ref, "production", actor="test")
        report = run_gate("tiny@1", workspace=workspace, num_prompts=8, max_tokens=MAX_TOKENS)
        assert report.passed
        workspace.registry.promote(version.ref, "production", actor="test")
        assert workspace.registry.get("tiny@production").version == 1
        with pytest.raises(NotFoundError, match="nobody"):
            run_gate("nobody", workspace=workspace)


def test_a_gate_of_the_first_token_is_none(chat_model: Path, workspace_dir: Path) -> None:
    with Workspace.open() as workspace:
        version = workspace.registry.create_version("tiny", chat_model)
        with pytest.raises(InputError, match="of 1 token"):
            run_gate("tiny@1", workspace=workspace, max_tokens=1)
        with pytest.raises(GateError):
            workspace.registry.promote(version.ref, "production", actor="test")


def test_a_template_that_serving_renders_differently_is_seen(chat_model: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(chat_model, changed)
    template = changed / "chat_template.jinja"
    template.write_text("{{ '<|im_start|>' }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    prompts = make_prompts(
        DataTokenizer.open(chat_model),
        load_tokenizer(changed),
        num_prompts=1,
        max_prompt_tokens=100,
        vocab_size=10_000,
    )
    by_name = {prompt.name: prompt for prompt in prompts}
    assert all(by_name[name].trained_ids == by_name[name].served_ids for name in TEXTS)
    assert all(by_name[name].trained_ids != by_name[name].served_ids for name in CONVERSATIONS)
