"""Answers that a teacher writes to the prompts of a data set before its student is trained on them.

Sequence-level distillation (Kim and Rush 2016, section 3.2): the student learns from what the teacher would
say, not from what is in the data. The teacher may have another vocabulary and template: only text is passed
on. The answers are kept in the workspace under a key of all that they depend on, row by row, so that a run
that is cut off goes on where it stopped, and a second run finds them there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.config.recipe import DataSection, Recipe
from hearth.data import Dataset, TokenSplit, prepare_in_folder
from hearth.errors import ConfigError, DataError, RequestError, StorageError
from hearth.models import encode_chat, load_tokenizer, resolve_reference
from hearth.training.identity import base_hash, tokenizer_hash
from hearth.training.preparing import PreparationProgress
from hearth.training.progress import TrainingProgress
from hearth.workspace.artifacts import write_atomically
from hearth.workspace.locks import file_lock

if TYPE_CHECKING:
    from hearth.workspace import Workspace

_FORMAT = 1
_BATCH = 256  # prompts between two saves
_SECONDS_BETWEEN_LINES = 15.0
_TOO_LONG = "too long for the teacher"


class WrittenDataset:
    """A data set to train on what a teacher wrote, and to be measured on the held-out data as they are."""

    def __init__(self, original: Dataset, written: Dataset) -> None:
        self.original, self.written = original, written
        both = f"{original.fingerprint} {written.fingerprint}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()
        self.path = original.path  # whose held-out documents count
        self.tokenizer_dir = original.tokenizer_dir
        self.manifest = original.manifest

    @property
    def lineage_edges(self) -> list[tuple[str, str, str]]:
        """Both data sets lead to this one."""
        node = f"dataset:{self.fingerprint}"
        return [
            (f"dataset:{self.original.fingerprint}", node, "held out"),
            (f"dataset:{self.written.fingerprint}", node, "trained"),
        ]

    def split(self, name: str) -> TokenSplit:
        """``train``: the teacher's answers; ``validation``: the data's own."""
        return (self.written if name == "train" else self.original).split(name)


def write_answers(
    dataset: Dataset, recipe: Recipe, workspace: Workspace, *, progress: bool
) -> WrittenDataset:
    """Let ``train.distill.teacher`` answer the training conversations of ``dataset``, and prepare the result.

    The last answer of each conversation is written anew; earlier turns stay. The teacher takes the likeliest
    token each time, or draws with ``sampling_temperature`` and a seed for each row. Answers that are empty or
    do not end within ``max_new_tokens`` are left out. Raises ConfigError for data without conversations,
    DataError where no answer is left, NotFoundError or ModelError where there is no such teacher.
    """
    if dataset.manifest.kind != "chat":
        raise ConfigError(
            f"train.distill.mode is sequence, but the dataset holds {dataset.manifest.kind}, not chat",
            fix="give chat data (data.sources[].format: chat), or use mode: logits",
        )
    directory = resolve_reference(str(recipe.train.distill.teacher), workspace)
    key = answers_key(dataset, recipe, directory)
    path = workspace.root / "answers" / key[:16] / "answers.jsonl"
    say = TrainingProgress(first_step=0, total_steps=0, enabled=progress)
    # One process writes; what else wants the same answers, such as trials of a sweep, waits for them.
    with file_lock(path.with_name("lock")):
        if not path.is_file():
            _write(dataset.split("train"), recipe, directory, path, say)
    source = {"path": str(path), "format": "chat"}
    data = DataSection.model_validate(
        {"sources": (source,), "validation_fraction": 0.0, "deduplicate": "none", "seed": recipe.data.seed}
    )
    with PreparationProgress(enabled=progress) as shown:
        folder = workspace.root / "datasets"
        simple = recipe.model_copy(update={"data": data})
        written = prepare_in_folder(simple, folder, tokenizer_dir=dataset.tokenizer_dir, progress=shown)
    found = WrittenDataset(dataset, written)
    workspace.lineage.add_many([*written.lineage_edges, *found.lineage_edges])
    return found


def answers_key(dataset: Dataset, recipe: Recipe, directory: Path) -> str:
    """sha256 of all that the answers depend on."""
    section, tokenizer = recipe.train.distill, load_tokenizer(directory)
    parts = {
        "format": _FORMAT,
        "dataset": dataset.fingerprint,
        "teacher": base_hash(directory),
        "tokenizer": tokenizer_hash(tokenizer),
        "template": str(tokenizer.chat_template),
        "max_new_tokens": section.max_new_tokens,
        "temperature": section.sampling_temperature,
        "seed": recipe.train.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write(split: TokenSplit, recipe: Recipe, directory: Path, path: Path, say: TrainingProgress) -> None:
    from hearth.engine import Engine

    if load_tokenizer(directory).chat_template is None:
        raise ConfigError(
            f"train.distill.teacher {recipe.train.distill.teacher!r} has no chat template to be asked with",
            fix="use a teacher that was trained on conversations, or mode: logits",
        )
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = _whole_rows(partial)
        say.say(f"the teacher writes {len(split) - len(rows)} answers" + (" more" if rows else ""))
        with Engine.load(directory) as engine, partial.open("a", encoding="utf-8") as file:
            last = time.monotonic()
            for first in range(len(rows), len(split), _BATCH):
                indices = range(first, min(first + _BATCH, len(split)))
                new = list(_answer(engine, split, indices, recipe))
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
                file.flush()
                rows += new
                if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                    last = time.monotonic()
                    say.say(f"answers {len(rows)}/{len(split)}")
        _keep(rows, recipe, path, say)
        partial.unlink()
    except OSError as error:
        raise StorageError(f"the teacher's answers cannot be written to {path.parent}: {error}") from error


def _whole_rows(partial: Path) -> list[dict[str, Any]]:
    """What an earlier run has written; a last line that was cut off is taken away."""
    if not partial.is_file():
        return []
    raw = partial.read_bytes()  # cut off anywhere, in the middle of a character too
    end = raw.rfind(b"\n") + 1
    if end < len(raw):
        os.truncate(partial, end)
    return [json.loads(line) for line in raw[:end].splitlines()]


def _answer(engine: Any, split: TokenSplit, indices: range, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """A row for each conversation: its messages with the teacher's answer, or why there is none."""
    from hearth.engine import SamplingParams

    section = recipe.train.distill
    prompts: list[list[int]] = []
    asked: list[tuple[int, list[dict[str, Any]]]] = []
    refused: dict[int, str] = {}
    for index in indices:
        messages = split.messages(index)
        last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
        try:
            ids = encode_chat(engine.tokenizer, messages[:last])
        except RequestError:
            refused[index] = "refused by the teacher's template"
            continue
        if len(ids) + section.max_new_tokens > engine.max_model_len:
            refused[index] = _TOO_LONG
            continue
        prompts.append(ids)
        asked.append((index, messages[:last]))
    params = [
        SamplingParams(
            max_tokens=section.max_new_tokens,
            temperature=section.sampling_temperature,
            seed=((recipe.train.seed & 0x7FFFFFFF) << 32) + index,  # other rows do not matter
        )
        for index, _ in asked
    ]
    found = engine.generate(prompts, params) if prompts else []
    answers = {index: (talk, one) for (index, talk), one in zip(asked, found, strict=True)}
    for index in indices:
        if index in refused:
            yield {"left_out": refused[index]}
            continue
        talk, completion = answers[index]
        text = completion.text.strip()
        if completion.finish_reason != "stop":
            yield {"left_out": "longer than max_new_tokens"}
        elif not text:
            yield {"left_out": "empty"}
        else:
            yield {"messages": [*talk, {"role": "assistant", "content": text}]}


def _keep(rows: list[dict[str, Any]], recipe: Recipe, path: Path, say: TrainingProgress) -> None:
    """Write the conversations that have an answer, by one rename; say how many have none, and why."""
    reasons: dict[str, int] = {}
    for row in rows:
        if "left_out" in row:
            reasons[row["left_out"]] = reasons.get(row["left_out"], 0) + 1
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    kept = [row for row in rows if "messages" in row]
    if not kept:
        raise DataError(
            f"train.distill.teacher {recipe.train.distill.teacher!r} gave no usable answer to {len(rows)} "
            f"prompts: {why}",
            fix="lower train.distill.max_new_tokens: prompt and answer share the teacher's context"
            if reasons.keys() == {_TOO_LONG}
            else "raise train.distill.max_new_tokens, or choose a teacher that ends its answers",
        )
    if reasons:
        say.warn(f"{len(rows) - len(kept)} of {len(rows)} answers of the teacher are left out: {why}")
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
