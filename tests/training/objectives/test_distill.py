"""Distillation: by logits however a step is cut and packed, by sequences that a teacher writes; refusals."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hearth.config import Recipe
from hearth.data import Dataset
from hearth.engine import Engine
from hearth.errors import ConfigError, DataError, HearthError, Interrupted
from hearth.models import encode_chat, load_model, load_tokenizer
from hearth.training import Callback, Trainer
from hearth.training.batches import IGNORE
from hearth.training.objectives.distill import Distillation
from hearth.training.teacher import Teacher
from hearth.training.written import WrittenDataset, write_answers
from hearth.workspace import Workspace

MakeTrainer = Callable[..., Trainer]
VOCAB = 64


def make_model(seed: int, hidden: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double()


@pytest.fixture
def distilled(pack: Callable[..., dict[str, Any]]) -> Callable[..., tuple[Tensor, dict[str, Tensor], Any]]:
    """Loss, gradients and metrics of one step over the same documents, packed and cut as asked."""
    rng = np.random.default_rng(5)
    documents = [rng.integers(3, VOCAB, size).tolist() for size in rng.integers(3, 15, 12)]
    masks = [[at >= len(document) // 3 for at in range(len(document))] for document in documents]

    def run(
        micro: int, per_row: int, *, model: Any = None, teacher: Any = None, **distill: Any
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        rows = [
            pack(documents[first : first + per_row], 64, masks[first : first + per_row])
            for first in range(0, len(documents), per_row)
        ]
        train = {
            "objective": "distill",
            "steps": 1,
            "batch_size": len(rows),
            "micro_batch_size": micro,
            "precision": "fp32",
            "distill": distill,
        }
        config = Recipe.model_validate({"train": train, "data": {"sequence_length": 64}})
        model = copy.deepcopy(model or make_model(0))
        trainer = Trainer(model=model, train_dataset=rows, config=config, progress=False, device="cpu")
        assert isinstance(trainer.objective, Distillation)
        trainer.objective.teacher = Teacher(teacher or make_model(1, 32))
        trainer.start_objective()
        batches = trainer.objective.batches(trainer, 0, trainer.step_rows(0))
        expected = {"tokens": float(sum(batch.num_valid for batch in batches))}
        loss, metrics = trainer._accumulate(batches, expected)
        return loss, {name: w.grad for name, w in model.named_parameters() if w.grad is not None}, metrics

    return run


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_step_is_the_same_however_it_is_cut_and_packed(distilled: Any, divergence: str) -> None:
    settings = {"divergence": divergence, "temperature": 1.7, "weight": 0.6}
    whole = distilled(12, 1, **settings)
    assert whole[1].keys() == dict(make_model(0).named_parameters()).keys()
    for micro, per_row in ((1, 1), (3, 1), (1, 2), (2, 3), (1, 4)):
        loss, gradients, metrics = distilled(micro, per_row, **settings)
        torch.testing.assert_close(loss, whole[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients, whole[1], rtol=1e-8, atol=1e-10)
        assert metrics == pytest.approx(whole[2], rel=1e-9)
    assert whole[2].keys() == {"jsd" if divergence == "jsd" else "kl", "ce", "top1_agreement"}
    term = 0.6 * 1.7**2 * whole[2]["jsd" if divergence == "jsd" else "kl"] + 0.4 * whole[2]["ce"]
    assert float(whole[0]) == pytest.approx(term)


def test_models_that_cap_their_logits_take_the_long_way(distilled: Any) -> None:
    def capped(seed: int) -> Any:
        torch.manual_seed(seed)
        config = Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            final_logit_softcapping=2.0,
            attn_implementation="eager",
        )
        return Gemma2ForCausalLM(config).double()

    whole = distilled(12, 1, model=capped(0), teacher=capped(1))
    cut = distilled(2, 3, model=capped(0), teacher=capped(1))
    torch.testing.assert_close(whole[0], cut[0], rtol=1e-9, atol=1e-12)
    # Its norms are computed in float32 whatever the model's type.
    torch.testing.assert_close(whole[1], cut[1], rtol=1e-5, atol=1e-7)


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────────


class Stop(Callback):
    """Keeps the losses, and asks to stop after a step."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.losses: list[float] = []

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        self.losses.append(metrics["loss"])
        if step == self.at:
            trainer.request_stop()


@pytest.fixture
def teacher_dir(train_parts: MakeTrainer, tmp_path: Path) -> Path:
    run = train_parts(train={"steps": 30}).fit()
    return Path(shutil.copytree(run.dir / "model", tmp_path / "teacher"))


def student(teacher: Path | None, **changes: Any) -> dict[str, Any]:
    """Sections of a run that learns from ``teacher`` with its tokenizer."""
    distill = {"teacher": None if teacher is None else str(teacher), **changes.pop("distill", {})}
    return {
        "model": {"size": "60K", "context_length": 64},
        "tokenizer": {"base": None if teacher is None else str(teacher)},
        "train": {"objective": "distill", "distill": distill, **changes},
    }


def test_the_teacher_stays_as_it_is_and_evaluations_tell_of_it(
    train_parts: MakeTrainer, teacher_dir: Path
) -> None:
    trainer = train_parts(**student(teacher_dir, evaluate_every=4))
    run = trainer.fit()
    teacher = trainer.objective.teacher  # type: ignore[attr-defined]
    assert not teacher.model.training
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    assert all(
        torch.equal(weight, teacher.model.state_dict()[name])
        for name, weight in load_model(teacher_dir).state_dict().items()
    )
    names = {point.name for point in run.metrics()}
    assert names >= {"kl", "ce", "top1_agreement", "eval_kl", "eval_ce", "eval_top1_agreement"}
    assert run.summary["eval_loss"] > 0


def test_a_run_goes_on_with_its_teacher_only(
    train_parts: MakeTrainer, teacher_dir: Path, workspace: Workspace, tmp_path: Path
) -> None:
    whole, first, second = Stop(99), Stop(3), Stop(99)
    sections = student(teacher_dir)
    train_parts(callbacks=[whole], **sections).fit()
    with pytest.raises(Interrupted):
        train_parts(callbacks=[first], **sections).fit()
    run = workspace.runs.list(status="interrupted")[0]
    other = train_parts(train={"steps": 3}).fit().dir / "model"
    kept = tmp_path / "kept"
    shutil.move(teacher_dir, kept)
    shutil.copytree(other, teacher_dir)
    with pytest.raises(
        ConfigError, match=r"train\.distill\.teacher is not the model that the run began with"
    ):
        train_parts(resume=run.id, **sections).fit()
    shutil.rmtree(teacher_dir)
    shutil.move(kept, teacher_dir)
    train_parts(resume=run.id, callbacks=[second], **sections).fit()
    assert first.losses + second.losses == whole.losses


def test_what_cannot_be_distilled_is_refused(
    train_parts: MakeTrainer, teacher_dir: Path, tmp_path: Path
) -> None:
    def refusal(sections: dict[str, Any]) -> HearthError:
        with pytest.raises(HearthError) as caught:
            train_parts(**sections).fit()
        return caught.value

    assert "train.distill.teacher is missing" in str(refusal(student(None)))
    absent = student(teacher_dir)
    absent["train"]["distill"]["teacher"] = str(tmp_path / "nothing")
    assert f"no model directory at {tmp_path / 'nothing'}" in str(refusal(absent))
    other = student(teacher_dir)
    other["tokenizer"] = {"vocab_size": 300}
    message = str(refusal(other))
    assert "another vocabulary than the student: the teacher's has 320 tokens, the student's 300" in message
    long = student(teacher_dir)
    long["model"]["context_length"] = 128
    long["data"] = {"sequence_length": 128}
    assert "exceeds the context of train.distill.teacher" in str(refusal(long))
    assert "distill.sampling_temperature is 0.5, but mode logits does not read it" in str(
        refusal(student(teacher_dir, distill={"sampling_temperature": 0.5}))
    )
    assert "distill.divergence is jsd, but mode sequence does not read it" in str(
        refusal(chat_student(teacher_dir, tmp_path, divergence="jsd"))
    )
    texts = student(teacher_dir, distill={"mode": "sequence"})
    assert "the dataset holds text, not chat" in str(refusal(texts))


def test_a_teacher_that_cuts_texts_otherwise_is_refused(
    train_parts: MakeTrainer, teacher_dir: Path, tmp_path: Path
) -> None:
    trainer = train_parts(**student(teacher_dir))
    path = teacher_dir / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["merges"] = described["model"]["merges"][::-1]
    path.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="cuts texts into tokens differently"):
        trainer.start_objective()


# ── by sequences ─────────────────────────────────────────────────────────────────────────────────────────


def write_chats(path: Path, count: int = 24) -> Path:
    rows = []
    for number in range(count):
        talk = [
            {"role": "user", "content": f"say dog {number}"},
            {"role": "assistant", "content": "dog dog."},
        ]
        if number % 5 == 0:
            talk += [
                {"role": "user", "content": "and cat?"},
                {"role": "assistant", "content": "cat\u2028cat."},
            ]
        rows.append({"messages": talk})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_student(teacher: Path, folder: Path, **distill: Any) -> dict[str, Any]:
    found = student(teacher, distill={"mode": "sequence", "max_new_tokens": 8, **distill})
    chats = write_chats(folder / "chats.jsonl")
    found["data"] = {
        "sources": [{"path": str(chats), "format": "chat"}],
        "sequence_length": 64,
        "validation_fraction": 0.2,
    }
    return found


@pytest.fixture
def talker(train_parts: MakeTrainer, tmp_path: Path) -> Path:
    """A teacher that has learnt to answer."""
    folder = tmp_path / "talker-data"
    folder.mkdir()
    chats = write_chats(folder / "chats.jsonl", 80)
    sections: dict[str, Any] = {
        "data": {"sources": [{"path": str(chats), "format": "chat"}], "sequence_length": 64},
        "train": {"objective": "sft", "steps": 60, "learning_rate": 2e-2},
    }
    return Path(shutil.copytree(train_parts(**sections).fit().dir / "model", tmp_path / "talker"))


def train_texts(dataset: Any) -> list[list[dict[str, Any]]]:
    split = dataset.split("train")
    return [split.messages(index) for index in range(len(split))]


def test_the_teacher_writes_once_and_a_second_run_finds_it(
    train_parts: MakeTrainer, talker: Path, tmp_path: Path, workspace: Workspace, monkeypatch: Any
) -> None:
    sections = chat_student(talker, tmp_path)
    trainer = train_parts(**sections)
    rows = trainer.rows
    written = rows.split.dataset  # type: ignore[attr-defined]
    talks = train_texts(written)
    model, tokenizer = load_model(talker), load_tokenizer(talker)
    for talk in talks[:4]:
        prompt = torch.tensor([encode_chat(tokenizer, talk[:-1])])
        wanted = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert talk[-1]["content"] == tokenizer.decode(wanted, skip_special_tokens=True).strip()
    original = trainer.eval_rows.split.dataset  # type: ignore[union-attr]
    assert original.fingerprint != written.fingerprint
    assert {talk[-1]["content"] for talk in train_texts(original)} <= {"dog dog.", "cat\u2028cat."}
    supervised = np.concatenate([rows[index].labels for index in range(len(rows))]) != IGNORE
    assert 0 < supervised.sum() < len(supervised)
    first = trainer.fit()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the answers are there already")

    monkeypatch.setattr(Engine, "load", never)
    again = train_parts(**sections)
    assert again.dataset_fingerprint == trainer.dataset_fingerprint
    second = again.fit()
    assert first.summary["loss"] == second.summary["loss"]


def test_answers_that_were_cut_off_go_on_where_they_stopped(
    train_parts: MakeTrainer, talker: Path, tmp_path: Path, workspace: Workspace, monkeypatch: Any
) -> None:
    import hearth.training.written as written

    monkeypatch.setattr(written, "_BATCH", 4)
    sections = chat_student(talker, tmp_path, sampling_temperature=1.0)
    whole = train_texts(train_parts(**sections).rows.split.dataset)  # type: ignore[attr-defined]
    shutil.rmtree(workspace.root / "answers")
    asked: list[int] = []
    generate = Engine.generate

    def breaking(self: Engine, prompts: Sequence[Any], params: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(self, prompts, params)

    monkeypatch.setattr(Engine, "generate", breaking)
    with pytest.raises(KeyboardInterrupt):
        train_parts(**sections)
    (partial,) = (workspace.root / "answers").glob("*/answers.partial")
    with partial.open("ab") as file:
        file.write('{"messages": [{"role": "ä'.encode()[:-1])  # the power went here, inside of a character
    monkeypatch.setattr(Engine, "generate", generate)
    assert train_texts(train_parts(**sections).rows.split.dataset) == whole  # type: ignore[attr-defined]


def test_a_teacher_that_never_ends_is_refused(train_parts: MakeTrainer, talker: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gave no usable answer to \d+ prompts: \d+ longer than max_new"):
        train_parts(**chat_student(talker, tmp_path, max_new_tokens=1))


def test_rows_that_no_teacher_wrote_are_refused(
    train_parts: MakeTrainer, talker: Path, tmp_path: Path, workspace: Workspace
) -> None:
    recipe = Recipe.model_validate(
        {"train": {"objective": "distill", "distill": {"mode": "sequence", "teacher": str(talker)}}}
    )
    trainer = train_parts(**chat_student(talker, tmp_path))
    original = Dataset.open(str(trainer.dataset_dir))
    with pytest.raises(ConfigError, match="not written by a teacher"):
        Trainer(model=make_model(0), train_dataset=original, config=recipe, progress=False)
    # By hand it takes one call more.
    dataset = write_answers(original, trainer.config, workspace, progress=False)
    assert isinstance(dataset, WrittenDataset)
    Trainer(model=make_model(0), train_dataset=dataset, config=trainer.config, progress=False)
