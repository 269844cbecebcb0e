"""A plain model directory from any checkpoint, the same bytes as at the end of the run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.errors import ConfigError, HearthError, IntegrityError, NotFoundError, StorageError
from hearth.models import load_model, load_tokenizer, saving
from hearth.training import Callback, Trainer
from hearth.training.checkpoint import CheckpointStore
from hearth.training.checkpoint.export import export_checkpoint
from hearth.workspace import Run, Workspace

MakeTrainer = Callable[..., Trainer]


class Keep(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
        named = trainer.model.named_parameters()
        self.weights[step] = {name: weight.detach().clone() for name, weight in named}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


SECTIONS: dict[str, Any] = {
    "train": {"steps": 8, "evaluate_every": 2, "learning_rate": 3e-3},
    "checkpoint": {"every": 2, "keep": 4},
}


@pytest.mark.parametrize("model", ["tied", "untied", "averaged", "experts"])
def test_any_checkpoint_of_a_whole_model(
    train_parts: MakeTrainer, workspace: Workspace, tmp_path: Path, model: str
) -> None:
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": model == "tied"}
    if model == "experts":  # which are one tensor here and many in the files
        shape |= {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16}
        shape |= {"num_experts_per_tok": 2, "num_key_value_heads": 2}
    keep = Keep()
    sections = {**SECTIONS, "model": {"size": None, "context_length": None, "config": shape}}
    if model == "averaged":
        sections["train"] = {**SECTIONS["train"], "ema_decay": 0.9}
    run = train_parts(callbacks=[keep], **sections).fit()
    state = torch.get_rng_state()
    exported = export_checkpoint(run, tmp_path / "last", workspace=workspace)
    assert (exported.step, exported.directory) == (8, tmp_path / "last")
    assert files(tmp_path / "last") == files(run.dir / "model")
    assert torch.equal(state, torch.get_rng_state())
    export_checkpoint(run.id, tmp_path / "deep" / "fourth", step=4, workspace=workspace)
    opened = dict(load_model(tmp_path / "deep" / "fourth").named_parameters())
    same = [torch.equal(opened[name], weight) for name, weight in keep.weights[4].items()]
    assert all(same) if model != "averaged" else not all(same)
    assert (
        load_tokenizer(tmp_path / "deep" / "fourth").get_vocab()
        == load_tokenizer(run.dir / "model").get_vocab()
    )


def test_an_adapter_is_merged(train_parts: MakeTrainer, workspace: Workspace, tmp_path: Path) -> None:
    base = train_parts().fit().dir / "model"
    sections = {**SECTIONS, "model": {"size": None, "base": str(base), "adapter": {"rank": 4, "alpha": 8}}}
    run = train_parts(**sections).fit()
    export_checkpoint(run, tmp_path / "last", workspace=workspace, adapter_dir=tmp_path / "adapter")
    assert files(tmp_path / "last") == files(run.dir / "model")
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (run.dir / "adapter" / name).read_bytes()
    export_checkpoint(run, tmp_path / "second", step=2, workspace=workspace)
    assert files(tmp_path / "second")["model.safetensors"] != files(tmp_path / "last")["model.safetensors"]
    # The adapter of another base would give a model that nobody has trained.
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(IntegrityError, match=r"the base model .* is not the one that checkpoint"):
        export_checkpoint(run, tmp_path / "wrong", workspace=workspace)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_keeps_its_head(
    train_parts: MakeTrainer, workspace: Workspace, tmp_path: Path, adapter: bool
) -> None:
    rows = [
        {"prompt": f"say {word} {number}", "chosen": f"{word}.", "rejected": "no " * (1 + number % 3)}
        for number in range(30)
        for word in ("dog", "cat")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = train_parts().fit().dir / "model"
    model: dict[str, Any] = {"size": None, "base": str(base)}
    run = train_parts(
        model={**model, "adapter": {"rank": 4}} if adapter else model,
        data={
            "sources": [{"path": str(tmp_path / "pairs.jsonl"), "format": "preference"}],
            "sequence_length": 63,
        },
        train={"objective": "reward", "steps": 4},
        checkpoint={"every": 2},
    ).fit()
    export_checkpoint(run, tmp_path / "last", workspace=workspace)
    assert files(tmp_path / "last") == files(run.dir / "model")
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]


@pytest.fixture
def finished(train_parts: MakeTrainer) -> Run:
    return train_parts(**SECTIONS).fit()


def test_damage_is_found_first(finished: Run, workspace: Workspace, tmp_path: Path, capsys: Any) -> None:
    newest = CheckpointStore(finished.dir).list()[0]
    os.truncate(newest / "model.safetensors", 100)
    with pytest.raises(IntegrityError, match=r"model\.safetensors has 100 bytes"):
        export_checkpoint(finished, tmp_path / "out", step=8, workspace=workspace)
    assert not (tmp_path / "out").exists()
    assert export_checkpoint(finished, tmp_path / "out", workspace=workspace).step == 6
    assert "step-000008 is damaged and is not used" in capsys.readouterr().err


def test_another_tokenizer_or_configuration_is_refused(
    finished: Run, workspace: Workspace, tmp_path: Path
) -> None:
    config = finished.dir / "skeleton" / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"intermediate_size": ', '"intermediate_size": 1'))
    with pytest.raises(IntegrityError, match=r"the configuration in .* is not the one"):
        export_checkpoint(finished, tmp_path / "out", workspace=workspace)
    config.write_text(original)
    tokenizer = finished.dir / "skeleton" / "tokenizer.json"
    before = tokenizer.read_text()
    tokenizer.write_text(before.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert tokenizer.read_text() != before
    with pytest.raises(IntegrityError, match=r"the tokenizer in .* is not the one"):
        export_checkpoint(finished, tmp_path / "out", workspace=workspace)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(finished: Run, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    cases: list[tuple[type[HearthError], str, Callable[[], object]]] = [
        (ConfigError, "exists and is not empty", lambda: export_checkpoint(finished, tmp_path / "full")),
        (NotFoundError, "no run 'nope'", lambda: export_checkpoint("nope", tmp_path / "o")),
        (NotFoundError, "has no step 5", lambda: export_checkpoint(finished, tmp_path / "o", step=5)),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()
    with (
        workspace.runs.create("evaluate", name="other") as other,
        pytest.raises(NotFoundError, match="skeleton"),
    ):
        export_checkpoint(other, tmp_path / "o")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    assert not (tmp_path / "o").exists()


def test_a_full_disk_leaves_nothing(
    finished: Run, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "fsync_tree", full)
    with pytest.raises(StorageError, match="cannot write the model to"):
        export_checkpoint(finished, tmp_path / "empty", workspace=workspace)
    assert not (tmp_path / "empty").exists()
    assert not list(tmp_path.glob(".empty*"))


def test_from_the_command_line(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], workspace: Workspace
) -> None:
    from hearth.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["runs", "export", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    out = tmp_path / "out"
    code, said, _ = call(finished.id[:5], out, "--step", "best")
    best = CheckpointStore(finished.dir).find("best").step
    assert (code, said) == (0, f"step {best} of run {finished.id} is in {out}\n")
    assert load_model(out).config.model_type == "qwen3"
    code, said, _ = call(finished.id, tmp_path / "two", "--json", "--step", 2)
    assert (code, json.loads(said)) == (
        0,
        {"run": finished.id, "step": 2, "dir": str(tmp_path / "two")},
    )
    for arguments, message in (
        ((finished.id, out), "exists and is not empty"),
        ((finished.id, tmp_path / "x", "--step", "newest"), "'newest' is neither a step nor best nor latest"),
        ((finished.id, tmp_path / "x", "--step", "-1"), "neither a step nor best nor latest"),
        ((finished.id, tmp_path / "x", "--step", 77), "has no step 77"),
        (("zzz", tmp_path / "x"), "no run 'zzz'"),
    ):
        code, said, error = call(*arguments)
        assert (code, said) == (2, ""), arguments
        assert message in error
    assert not (tmp_path / "x").exists()
