"""The trainer on real data: it learns, resumes exactly, stops cleanly, and refuses what cannot be right."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.config import Recipe
from hearth.errors import ConfigError, DataError, Interrupted, NonFiniteError, TrainingError
from hearth.models import load_model, load_tokenizer
from hearth.training import Batch, Callback, Trainer, measure_step_seconds
from hearth.training.batches import fingerprint_of
from hearth.workspace import Run, Workspace

Make = Callable[..., Any]

MakeTrainer = Callable[..., Trainer]


class StopAt(Callback):
    """Asks to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            trainer.request_stop("test")


class Record(Callback):
    """Keeps the exact losses."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.events: list[str] = []

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        self.losses[step] = metrics["loss"]

    def on_evaluate(self, trainer: Trainer, step: int, figures: Mapping[str, float]) -> None:
        self.events.append(f"evaluate {step}")

    def on_checkpoint(self, trainer: Trainer, step: int, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        self.events.append(f"checkpoint {step}")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def test_learns_and_leaves_everything_behind(train_parts: MakeTrainer, workspace: Workspace) -> None:
    record = Record()
    trainer = train_parts(
        callbacks=[record],
        train={"steps": 30, "evaluate_every": 10},
        checkpoint={"every": 15},
        register={"name": "tiny", "tags": {"kind": "test"}},
    )
    run = trainer.fit()
    assert run.status == "finished"
    summary = run.summary
    assert record.losses[30] < record.losses[1] - 1.0
    assert summary["loss"] == record.losses[30]
    assert summary["steps"] == 30
    assert summary["eval_loss"] == summary["best_eval_loss"] < 5.0
    assert summary["tokens_per_second"] > 0
    assert 0 < summary["mfu"] < 1
    series = {point.name for point in run.metrics()}
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "eval_loss"} <= series
    assert [point.value for point in run.metrics("loss")] == list(record.losses.values())
    # A checkpoint is told when it is on disk, by when the training may be further.
    assert [event for event in record.events if event.startswith("evaluate")] == [
        f"evaluate {step}" for step in (10, 20, 30)
    ]
    assert [event for event in record.events if event.startswith("checkpoint")] == [
        f"checkpoint {step}" for step in (10, 15, 20, 30)
    ]
    for step in (10, 20, 30):
        assert record.events.index(f"evaluate {step}") < record.events.index(f"checkpoint {step}")
    model, tokenizer = load_model(run.dir / "model"), load_tokenizer(run.dir / "model")
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, dict(model.named_parameters())[name])
    assert tokenizer("the dog").input_ids
    generation = json.loads((run.dir / "model" / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    version = workspace.registry.get("tiny")
    assert version.ref == "tiny@1" == summary["version"]
    upstream = workspace.lineage.up("model:tiny@1").refs()
    assert f"run:{run.id}" in upstream
    assert f"dataset:{trainer.dataset_fingerprint}" in upstream
    assert any(ref.startswith("source:") for ref in upstream)


def test_data_is_prepared_once(train_parts: MakeTrainer, workspace: Workspace) -> None:
    train_parts()
    folder = workspace.root / "datasets"
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    train_parts(train={"steps": 3})
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("where", ["mid-epoch", "at the epoch boundary", "in the second epoch"])
def test_resume_is_exact(train_parts: MakeTrainer, workspace: Workspace, where: str, dropout: float) -> None:
    shape: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_dropout": dropout,
        "max_position_embeddings": 64,
    }
    model = {"size": None, "context_length": None, "config": shape}
    num_rows = len(train_parts(model=model).rows)
    boundary = num_rows // 4
    # A batch size that divides the rows puts one step exactly at the end of the epoch.
    batch = next(size for size in (4, 3, 5, 7, 2) if num_rows % size == 0) if "boundary" in where else 4
    boundary = math.ceil(num_rows / batch)
    stop = {"mid-epoch": 3, "at the epoch boundary": boundary, "in the second epoch": boundary + 2}[where]
    train = {"steps": boundary + 5, "batch_size": batch, "micro_batch_size": 1, "evaluate_every": 4}
    sections: dict[str, Any] = {"model": model, "train": train, "checkpoint": {"every": 3}}

    straight_record = Record()
    straight = train_parts(callbacks=[straight_record], **sections)
    straight.fit()

    first_record, second_record = Record(), Record()
    with pytest.raises(Interrupted) as caught:
        train_parts(callbacks=[first_record, StopAt(stop)], **sections).fit()
    run = workspace.runs.list(status="interrupted")[0]
    assert f"hearth train --resume {run.id}" in str(caught.value)
    torch.manual_seed(12345)  # whatever the process did in between must not matter
    resumed = train_parts(resume=run.id, callbacks=[second_record], **sections)
    finished = resumed.fit()

    assert finished.id == run.id
    assert max(first_record.losses) == stop
    assert min(second_record.losses) == stop + 1
    assert {**first_record.losses, **second_record.losses} == straight_record.losses
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    assert [point.step for point in finished.metrics("loss")] == list(range(1, boundary + 6))
    assert finished.summary["num_tokens"] == straight.state.num_tokens


def test_resume_from_an_older_checkpoint_repeats_the_steps_in_between(
    train_parts: MakeTrainer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record()
    straight = train_parts(callbacks=[record], checkpoint={"every": 2})
    run = straight.fit()
    newest = run.dir / "checkpoints" / "step-000008"
    (newest / "model.safetensors").write_bytes(b"broken")
    again = Record()
    resumed = train_parts(resume=run.id, callbacks=[again], checkpoint={"every": 2})
    finished = resumed.fit()
    assert "step-000008 is damaged" in capsys.readouterr().err
    assert again.losses == {step: record.losses[step] for step in (7, 8)}
    assert [point.step for point in finished.metrics("loss")] == list(range(1, 9))
    assert all(torch.equal(a, weights(resumed)[name]) for name, a in weights(straight).items())


def interrupted(train_parts: MakeTrainer, workspace: Workspace) -> Run:
    with pytest.raises(Interrupted):
        train_parts(callbacks=[StopAt(3)]).fit()
    return workspace.runs.list(status="interrupted")[0]


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"tokenizer": {"vocab_size": 300}}, "the tokenizer"),
        ({"data": {"sequence_length": 16}}, "the number of training rows"),
        ({"data": {"validation_fraction": 0.3}}, "the dataset"),
        ({"model": {"size": "200K"}}, "the shape of the model"),
        ({"train": {"batch_size": 8}}, r"train\.batch_size \(4 then, 8 now\)"),
        ({"train": {"seed": 1}}, r"train\.seed"),
    ],
)
def test_resume_with_something_else_is_refused(
    train_parts: MakeTrainer, workspace: Workspace, sections: dict[str, Any], what: str
) -> None:
    run = interrupted(train_parts, workspace)
    with pytest.raises(ConfigError, match=rf"cannot be resumed: .*{what}"):
        train_parts(resume=run.id, **sections).fit()
    assert workspace.runs.get(run.id).status == "interrupted"
    assert train_parts(resume=run.id).fit().status == "finished"


def test_more_steps_are_allowed_on_resume(train_parts: MakeTrainer, workspace: Workspace) -> None:
    run = train_parts(train={"schedule": "constant"}).fit()
    longer = train_parts(resume=run.id, train={"schedule": "constant", "steps": 12}).fit()
    assert longer.summary["steps"] == 12


def test_micro_batches_do_not_change_training(train_parts: MakeTrainer) -> None:
    found = []
    for size in (4, 2, 1):
        record = Record()
        trainer = train_parts(callbacks=[record], train={"micro_batch_size": size, "steps": 4})
        trainer.model.double()
        trainer.fit()
        found.append((list(record.losses.values()), weights(trainer)))
    for losses, values in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-9)
        for name, value in values.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-6, atol=1e-9)


def test_early_stopping_keeps_the_best_weights(train_parts: MakeTrainer) -> None:
    class Worse(Trainer):
        def evaluate(self) -> dict[str, float]:
            kept.setdefault(self.state.step, weights(self))
            return {"eval_loss": 1.0 if self.state.step == 4 else 2.0 + self.state.step}

    kept: dict[int, dict[str, torch.Tensor]] = {}
    trainer = train_parts(train={"steps": 40, "evaluate_every": 2, "early_stopping_patience": 3})
    trainer.__class__ = Worse
    run = trainer.fit()
    assert run.summary["steps"] == 10
    assert (run.summary["best_step"], run.summary["model_step"]) == (4, 4)
    saved = dict(load_model(run.dir / "model").named_parameters())
    assert all(torch.equal(saved[name], value) for name, value in kept[4].items())


def test_sft_counts_only_answers(train_parts: MakeTrainer, chats: Path) -> None:
    data = {"sources": [{"path": str(chats), "format": "chat"}], "sequence_length": 64}
    record = Record()
    trainer = train_parts(callbacks=[record], data=data, train={"objective": "sft", "steps": 30})
    batch = trainer.objective.collate(trainer.rows, [0])
    assert 0 < batch.num_valid < batch.num_tokens
    run = trainer.fit()
    assert record.losses[30] < record.losses[1] - 1.0
    tokenizer = load_tokenizer(run.dir / "model")
    assert "<|im_start|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "say dog"}], tokenize=False, add_generation_prompt=True
    )
    generation = json.loads((run.dir / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_sft_on_plain_text_is_refused(train_parts: MakeTrainer) -> None:
    with pytest.raises(ConfigError, match="sft, but the dataset holds plain text"):
        train_parts(train={"objective": "sft"})


@pytest.fixture
def base_dir(train_parts: MakeTrainer) -> Path:
    """A model that a first run has made."""
    return train_parts().fit().dir / "model"


def test_continue_from_a_base_with_its_tokenizer(
    train_parts: MakeTrainer, base_dir: Path, chats: Path, workspace: Workspace
) -> None:
    trainer = train_parts(
        model={"size": None, "base": str(base_dir)},
        data={"sources": [{"path": str(chats), "format": "chat"}], "sequence_length": 64},
        train={"objective": "sft"},
    )
    base = load_model(base_dir)
    assert torch.equal(trainer.model.lm_head.weight, base.lm_head.weight)
    run = trainer.fit()
    assert load_tokenizer(run.dir / "model").get_vocab() == load_tokenizer(base_dir).get_vocab()
    assert load_tokenizer(run.dir / "model").chat_template == load_tokenizer(base_dir).chat_template


def test_conversations_keep_their_template_and_the_base_its_stop_tokens(
    train_parts: MakeTrainer, base_dir: Path, chats: Path, workspace: Workspace, tmp_path: Path
) -> None:
    generation = json.loads((base_dir / "generation_config.json").read_text())
    extra = 7  # as a published model that may also end with a token of its own
    generation |= {
        "eos_token_id": [*generation["eos_token_id"], extra],
        "do_sample": True,
        "temperature": 0.6,
    }
    (base_dir / "generation_config.json").write_text(json.dumps(generation))
    own = tmp_path / "own-template"
    own.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_dir / name, own / name)
    template = (base_dir / "chat_template.jinja").read_text() + "{#- mine -#}"
    (own / "chat_template.jinja").write_text(template)
    run = train_parts(
        model={"size": None, "base": str(base_dir)},
        tokenizer={"base": str(own)},
        data={"sources": [{"path": str(chats), "format": "chat"}], "sequence_length": 64},
        train={"objective": "sft"},
    ).fit()
    assert load_tokenizer(run.dir / "model").chat_template == template
    kept = json.loads((run.dir / "model" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == generation["eos_token_id"]
    assert kept["temperature"] == 0.6


def test_a_folder_called_like_a_model_is_not_its_parent(
    train_parts: MakeTrainer, base_dir: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.registry.create_version("twin", base_dir)
    sections: dict[str, Any] = {"model": {"size": None, "base": "twin"}, "register": {"name": "child"}}
    by_name = train_parts(train={"learning_rate": 1e-3}, **sections).fit().summary["version"]
    shutil.copytree(base_dir, base_dir.parent / "twin")
    monkeypatch.chdir(base_dir.parent)
    by_folder = train_parts(train={"learning_rate": 2e-3}, **sections).fit().summary["version"]
    assert by_name != by_folder
    assert "twin@1" in str(workspace.lineage.up(f"model:{by_name}"))
    assert "twin@1" not in str(workspace.lineage.up(f"model:{by_folder}"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by PEFT, opened bare
def test_lora_trains_the_adapter_alone_and_merges(train_parts: MakeTrainer, base_dir: Path) -> None:
    from peft import PeftModel

    base = load_model(base_dir)
    trainer = train_parts(
        model={"size": None, "base": str(base_dir), "adapter": {"rank": 4, "alpha": 8}},
        train={"steps": 12, "learning_rate": 2e-2},
    )
    plan = trainer.plan()
    assert 0 < plan.num_trainable_parameters < plan.num_parameters / 4
    run = trainer.fit()
    merged = load_model(run.dir / "model")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    unmerged = PeftModel.from_pretrained(load_model(base_dir), run.dir / "adapter").eval()
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        before, after = unmerged(input_ids=ids).logits, merged(input_ids=ids).logits
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base(input_ids=ids).logits, after, atol=1e-2)


def test_lora_resumes_exactly(train_parts: MakeTrainer, base_dir: Path, workspace: Workspace) -> None:
    sections: dict[str, Any] = {
        "model": {"size": None, "base": str(base_dir), "adapter": {"rank": 4, "dropout": 0.1}}
    }
    record, first, second = Record(), Record(), Record()
    train_parts(callbacks=[record], **sections).fit()
    with pytest.raises(Interrupted):
        train_parts(callbacks=[first, StopAt(3)], **sections).fit()
    run = workspace.runs.list(status="interrupted")[0]
    train_parts(resume=run.id, callbacks=[second], **sections).fit()
    assert {**first.losses, **second.losses} == record.losses


def test_adapter_that_matches_nothing(train_parts: MakeTrainer, base_dir: Path) -> None:
    adapter = {"target_modules": ["query_key_value"]}
    with pytest.raises(ConfigError, match=r"target_modules \[query_key_value\] matches no layer") as caught:
        train_parts(model={"size": None, "base": str(base_dir), "adapter": adapter})
    assert "q_proj" in str(caught.value)


class Poisoned(Trainer):
    """A loss that breaks on rows with a certain token in them."""

    poison = -1

    def compute_loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
        loss, count = super().compute_loss(model, batch)
        return loss * (float("nan") if self.poison in batch.rows else 1.0), count


def test_nan_stops_before_the_step_and_names_the_documents(
    train_parts: MakeTrainer, workspace: Workspace
) -> None:
    trainer = train_parts()
    trainer.__class__ = Poisoned
    trainer.poison = trainer.step_rows(3)[trainer.micro_batch_size]
    before: dict[str, torch.Tensor] = {}

    class Keep(Callback):
        def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
            before.update(weights(trainer))

    trainer.callbacks = (Keep(),)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert "loss nan in step 4" in message
    assert f"row {trainer.poison}: document" in message
    assert "docs.jsonl" in message
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    run = workspace.runs.list()[0]
    assert run.status == "failed"
    assert "loss nan in step 4" in (run.error or "")


def test_infinite_gradient_stops_too(train_parts: MakeTrainer) -> None:
    class Steep(Trainer):
        def compute_loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
            loss, count = super().compute_loss(model, batch)
            # sqrt at 0: a finite value with an infinite slope.
            return loss + torch.sqrt(0.0 * model.lm_head.weight.sum()), count

    trainer = train_parts()
    trainer.__class__ = Steep
    with pytest.raises(NonFiniteError, match=r"gradient norm .* in step 1.*points at the weights"):
        trainer.fit()


def test_own_loss_with_its_own_count_is_normalised_by_it(train_parts: MakeTrainer) -> None:
    class Halves(Trainer):
        def compute_loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
            loss, count = super().compute_loss(model, batch)
            return loss * 0.5, count // 2 if count % 2 == 0 else count

    plain, own = train_parts(), train_parts()
    own.__class__ = Halves
    batches = own.objective.batches(own, 0, own.step_rows(0))
    counted = sum(b.num_valid // 2 if b.num_valid % 2 == 0 else b.num_valid for b in batches)
    expected = sum(b.num_valid for b in batches)
    factor = 0.5 * expected / counted
    first, second = plain.train_step(0), own.train_step(0)
    assert second.loss == pytest.approx(first.loss * factor, rel=1e-5)
    assert second.grad_norm == pytest.approx(first.grad_norm * factor, rel=1e-4)


def test_own_model_and_rows(
    tiny_model: Any, documents: list[list[int]], workspace: Workspace, rows_of: Make
) -> None:
    config = Recipe.model_validate(
        {"train": {"steps": 5, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2}}
    )
    rows = rows_of(documents)
    trainer = Trainer(
        model=tiny_model,
        train_dataset=rows,
        eval_dataset=rows[:4],
        config=config,
        workspace=workspace,
        progress=False,
        device="cpu",
    )
    run = trainer.fit()
    assert run.summary["steps"] == 5
    assert run.summary["eval_loss"] is not None
    assert (run.dir / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("what", ["input_ids", "labels"])
def test_own_rows_are_told_from_others_by_one_in_the_middle(
    documents: list[list[int]], rows_of: Make, what: str
) -> None:
    rows = rows_of(documents)
    others = list(rows)
    others[len(rows) // 2] = {**others[len(rows) // 2], what: others[0][what]}
    assert fingerprint_of(rows, rows) == fingerprint_of(rows_of(documents), rows)
    assert fingerprint_of(others, others) != fingerprint_of(rows, rows)


def test_gpt2_trains_too(train_parts: MakeTrainer) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    record = Record()
    trainer = train_parts(
        callbacks=[record],
        model={"size": None, "context_length": None, "config": config},
        train={"steps": 20, "precision": "bf16"},
    )
    trainer.fit()
    assert record.losses[20] < record.losses[1] - 0.5


@pytest.mark.parametrize(
    ("sections", "error", "match"),
    [
        ({"data": {"sources": None}}, ConfigError, "the recipe has no data"),
        ({"model": {"size": None, "base": "absent/dir"}}, Exception, "no model directory at absent/dir"),
        (
            {
                "model": {
                    "size": None,
                    "config": {
                        "model_type": "gpt2",
                        "n_embd": 8,
                        "n_head": 1,
                        "n_layer": 1,
                        "n_positions": 16,
                    },
                }
            },
            ConfigError,
            "exceeds the model's context of 16",
        ),
    ],
)
def test_bad_recipes(
    train_parts: MakeTrainer, sections: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        train_parts(**sections)


def test_no_rows(tiny_model: Any) -> None:
    with pytest.raises(DataError, match="no rows"):
        Trainer(model=tiny_model, train_dataset=[])
    with pytest.raises(DataError, match="int is no dataset"):
        Trainer(model=tiny_model, train_dataset=3)


def test_a_step_without_any_label(
    tiny_model: Any, documents: list[list[int]], workspace: Workspace, rows_of: Make
) -> None:
    rows = rows_of(documents)
    for row in rows:
        row["labels"][:] = -100
        row["segment_ids"][:] = -1
    config = Recipe.model_validate({"train": {"steps": 2, "batch_size": 4, "micro_batch_size": 4}})
    trainer = Trainer(
        model=tiny_model, train_dataset=rows, config=config, workspace=workspace, progress=False
    )
    with pytest.raises(TrainingError, match="no token counts in step 1"):
        trainer.fit()


def test_measuring_changes_nothing(
    train_parts: MakeTrainer, make_recipe: Callable[..., Recipe], workspace: Workspace
) -> None:
    trainer = train_parts()
    before, state = weights(trainer), torch.get_rng_state()
    assert measure_step_seconds(trainer, 2) > 0
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.state.step == 0
    assert measure_step_seconds(make_recipe(), 1, workspace=workspace) > 0
    assert workspace.runs.list() == []


def test_fit_leaves_the_random_state_of_the_process(train_parts: MakeTrainer) -> None:
    trainer = train_parts()
    state = torch.get_rng_state()
    trainer.fit()
    assert torch.equal(state, torch.get_rng_state())


def test_plan(train_parts: MakeTrainer) -> None:
    plan = train_parts(train={"steps": None, "epochs": 2.0}).plan()
    assert plan.steps == math.ceil(2.0 * plan.num_rows / 4)
    assert plan.tokens_per_step == 4 * 32
    assert plan.epochs >= 2.0
    assert plan.memory_bytes > plan.num_parameters * 16
    assert json.dumps(plan.as_dict())
