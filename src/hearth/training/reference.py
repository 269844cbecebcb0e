"""Log-probabilities under the weights that training starts from: what preference learning compares with.

Three ways to have them, with the same precision as training and without dropout: a frozen copy of the model,
the model with its adapter off, or a table made once before the first step. The table is made in the
micro-batches in which training meets the rows first, so that it holds bit for bit what a frozen copy would
give there; it is kept in the run's directory and read again when the run is resumed.

Shape suffixes: S sequences.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hearth.errors import ConfigError, TrainingError
from hearth.parallel.frozen import is_spread, spread_frozen
from hearth.parallel.sharding import LossModule
from hearth.parallel.tensor import gathered
from hearth.training.batches import Batch, Rows, describe_row
from hearth.training.identity import tokenizer_hash
from hearth.training.logprobs import sequence_logprobs
from hearth.training.loss import split_head
from hearth.training.progress import TrainingProgress
from hearth.training.reference_file import StoredTables, read_tables, write_tables
from hearth.training.shares import own_turns

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer

Result = TypeVar("Result")
REFERENCE = "reference"  # Batch.extras: reference_S
_SECONDS_BETWEEN_LINES = 15.0
# Part of the key → how a message calls it.
_KEY_NAMES = {
    "weights": "the weights that training starts from",
    "dataset": "the dataset",
    "tokenizer": "the tokenizer or its chat template",
    "precision": "train.precision",
    "sequence_length": "data.sequence_length or data.truncate",
    "order": "train.batch_size or train.seed",
}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """The adapter is off. PEFT lets nothing of it train then, and all when it is on again.

    What trains stays as it is, within too: FSDP makes whole weights at their first use and remembers.
    """
    adapted: Any = model
    off = adapted.disable_adapter()
    with _what_trains_stays(model):
        off.__enter__()
    try:
        yield
    finally:
        with _what_trains_stays(model):
            off.__exit__(None, None, None)


@contextlib.contextmanager
def _what_trains_stays(model: nn.Module) -> Iterator[None]:
    trains = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for weight, did in trains:
            weight.requires_grad_(did)


@dataclass(frozen=True)
class Table:
    """Sequences whose reference log-probabilities are needed.

    ``slots`` gives, in groups that share a micro-batch, which of ``size`` entries of ``num_parts`` values are
    needed; ``batch`` makes the micro-batch of a group. ``rows``: the rows that the slots number, if they do.
    """

    name: str
    size: int
    num_parts: int
    slots: Callable[[], Iterator[Sequence[int]]]
    batch: Callable[[Sequence[int]], Batch]
    rows: Rows | None = None


class Reference:
    """The reference of a run. ``frozen``: a copy of the starting model; None: the model without adapter."""

    def __init__(self, frozen: LossModule | None = None) -> None:
        self._frozen = frozen

    def attach(self, batch: Batch, table: str | Rows, slots: Sequence[int]) -> Batch:  # noqa: ARG002
        """The batch with what is known of it before the model runs; here nothing."""
        return batch

    def sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the log-probabilities of each sequence's labels, sums_S."""
        known = batch.extras.get(REFERENCE)
        return known if known is not None else self.run(model, sequence_logprobs, batch)[0]

    def run(self, model: nn.Module, function: Callable[[nn.Module, Batch], Result], batch: Batch) -> Result:
        """``function(reference, batch)`` without gradients: by the frozen copy, or ``model`` with its adapter
        off. Where the model is spread over processes, all must ask.
        """
        if self._frozen is not None:
            with evaluating(self._frozen):
                result: Result = self._frozen(function, batch)
            return result
        with evaluating(model), _without_adapter(model):
            return function(model, batch)


class FrozenReference(Reference):
    """A frozen copy of the starting model, and its hash; part of a checkpoint.

    A checkpoint brings the weights that train, not those that they are compared with: a resumed run whose
    base has become another one would go on towards other answers.
    """

    def __init__(self, frozen: LossModule, sha256: str) -> None:
        super().__init__(frozen)
        self._sha256 = sha256

    def state_values(self) -> Mapping[str, Any]:
        """Its hash."""
        return {"sha256": self._sha256}

    def load_state_values(self, values: Mapping[str, Any], /) -> None:
        """Raises ConfigError where the run began with other weights."""
        if values["sha256"] != self._sha256:
            raise ConfigError(
                "the reference is not the model that the run began with: its weights differ",
                fix="resume with the model.base of the run, in the same version, or start a new run",
            )


class PrecomputedReference(Reference):
    """The reference as a table: values by name, an entry for each row; NaN where none was needed."""

    def __init__(self, tables: Sequence[Table], values: Mapping[str, npt.NDArray[np.float64]]) -> None:
        super().__init__()
        self._tables, self._values = tables, values

    def attach(self, batch: Batch, table: str | Rows, slots: Sequence[int]) -> Batch:
        """The batch with its reference log-probabilities."""
        names = [each.name for each in self._tables if each.name == table or each.rows is table]
        found = [self._values[name][list(slots)] for name in names]
        usable = next((each for each in found if not np.isnan(each).any()), None)
        if usable is None:
            raise TrainingError(
                f"rows {list(slots)[:3]} have no precomputed reference log-probabilities",
                fix="use train.preference.reference: model to train on rows of your own choice",
            )
        extras = {**batch.extras, REFERENCE: torch.from_numpy(usable.reshape(-1))}
        return dataclasses.replace(batch, extras=extras)


def make_reference(trainer: Trainer, tables: Sequence[Table], run_dir: Path | None) -> Reference:
    """What ``train.preference.reference`` asks for, from the weights as they are now.

    Raises ConfigError where the model has no adapter to take off, or where the table in ``run_dir`` was made
    from other weights or data.
    """
    mode = trainer.config.train.preference.reference
    has_adapter = callable(getattr(trainer.model, "disable_adapter", None))
    if mode == "auto":
        mode = "adapter" if has_adapter else "precompute"
    if mode == "adapter":
        if not has_adapter:
            raise ConfigError(
                "train.preference.reference is adapter, but the model has no adapter",
                fix="add model.adapter, or use reference: precompute or model",
            )
        return Reference()
    if mode == "model":
        return frozen_reference(trainer)
    return precompute(trainer, tables, run_dir)


def frozen_reference(trainer: Trainer) -> Reference:
    """A copy of the model as it is now, which checkpoints recognise from now on.

    It is spread over processes as the model is. Raises UnsupportedModelError where that needs a model that
    transformers makes from its configuration, and this one is not.
    """
    found = FrozenReference(_frozen_copy(trainer), weights_hash(trainer.model))
    trainer.stateful["reference"] = found
    return found


def _frozen_copy(trainer: Trainer) -> LossModule:
    from hearth.training.rollouts.weights import plain_copy

    if not is_spread(trainer.model):
        frozen = LossModule(copy.deepcopy(trainer.model))
        return frozen.requires_grad_(False).eval()
    dtype = next(trainer.model.parameters()).dtype
    made = plain_copy(trainer.model, dtype=dtype)  # where the weights are: on the host, if they rest there
    split_head(made)  # tries the model while it is whole
    return spread_frozen(made, trainer.world, trainer.config.parallel)


def precompute(trainer: Trainer, tables: Sequence[Table], run_dir: Path | None) -> PrecomputedReference:
    """Fill the tables, or take them from ``run_dir`` where an earlier part of the run has left them.

    Of several processes the main one reads and writes the file; all have the tables.
    """
    world = trainer.world
    path = None if run_dir is None else run_dir / "reference.safetensors"
    key = {} if path is None else reference_key(trainer)  # hashes all weights
    progress = TrainingProgress(first_step=0, total_steps=0, enabled=trainer._show_progress and world.is_main)
    values = {table.name: np.full((table.size, table.num_parts), np.nan) for table in tables}
    is_there, stored = world.on_main(lambda: _read(path))
    if is_there and stored is None and world.is_main:
        progress.warn(f"{path} is damaged; its reference log-probabilities are computed again")
    if stored is not None:
        assert path is not None
        _require_same_key(path, stored.key, key)
        for name, kept in stored.tables.items():
            if name in values and kept.shape[1:] == values[name].shape[1:]:
                shared = min(len(kept), len(values[name]))
                values[name][:shared] = kept[:shared]
    if _fill(trainer, tables, values, progress) and path is not None:
        world.on_main(lambda: write_tables(path, key, values))
    return PrecomputedReference(tables, values)


def _read(path: Path | None) -> tuple[bool, StoredTables | None]:
    """Whether there is a file, and what is in it if it is whole."""
    if path is None or not path.exists():
        return False, None
    return True, read_tables(path)


def _fill(
    trainer: Trainer,
    tables: Sequence[Table],
    values: Mapping[str, npt.NDArray[np.float64]],
    progress: TrainingProgress,
) -> bool:
    """Compute what is missing, each process some of it; whether anything was."""
    missing = {table.name: _missing(table, values[table.name]) for table in tables}
    num = sum(len(slots) for groups in missing.values() for _, slots in groups)
    if not num:
        return False
    world = trainer.world
    done, last = 0, time.monotonic()
    progress.say(f"computing the reference log-probabilities of {num} samples")
    with evaluating(trainer.model):
        for table in tables:
            own = np.zeros_like(values[table.name])
            turns = ((turn, table.batch(turn[0][0])) for turn in own_turns(world, missing[table.name]))
            for turn, (sums, _) in trainer.passes.run_on_each(sequence_logprobs, turns):
                (group, new), counts = turn
                if not counts:
                    continue
                found = sums.double().cpu().numpy().reshape(len(group), table.num_parts)
                if world.size == 1:
                    _require_finite(found, table, group)  # the others would wait
                own[np.asarray(group)[new]] = found[new]
                done += len(new)
                if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                    last = time.monotonic()
                    progress.say(f"reference log-probabilities {done * world.layout.batch_ranks}/{num}")
            whole = world.sum_over_batch(torch.from_numpy(own).to(trainer.device)).cpu().numpy()
            slots = [group[place] for group, new in missing[table.name] for place in new]
            _require_finite(whole[slots], table, slots)
            values[table.name][slots] = whole[slots]
    return True


def _missing(table: Table, known: npt.NDArray[np.float64]) -> list[tuple[Sequence[int], list[int]]]:
    """Groups with something that nobody knows yet, and the places of that in the group, each slot once."""
    claimed = set(np.flatnonzero(~np.isnan(known).any(1)).tolist())
    found = []
    for group in table.slots():
        new = [place for place, slot in enumerate(group) if slot not in claimed]
        if new:
            found.append((group, list({group[place]: place for place in new}.values())))
            claimed.update(group)
    return found


def _require_finite(found: npt.NDArray[np.float64], table: Table, group: Sequence[int]) -> None:
    broken = np.flatnonzero(~np.isfinite(found).all(1))
    if len(broken):
        slot = group[int(broken[0])]
        where = f"sample {slot}" if table.rows is None else describe_row(table.rows, slot)
        raise TrainingError(
            f"the reference log-probabilities of {where} are not finite",
            fix="look at the sample with `hearth data inspect`, or use train.precision: fp32",
        )


def reference_key(trainer: Trainer) -> dict[str, str]:
    """Hashes of all that the reference log-probabilities depend on."""
    config = trainer.config
    template = str(getattr(trainer.tokenizer, "chat_template", None))
    whole = hashlib.sha256((tokenizer_hash(trainer.tokenizer) + template).encode())
    return {
        "weights": weights_hash(trainer.model),
        "dataset": _rows_hash(trainer),
        "tokenizer": whole.hexdigest(),
        "precision": trainer.precision,
        "sequence_length": json.dumps([config.data.sequence_length, config.data.truncate]),
        "order": json.dumps([config.train.batch_size, config.train.seed]),
    }


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights, however they are spread; all must ask."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        flat = gathered(weight.detach()).cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rows_hash(trainer: Trainer) -> str:
    """The fingerprint of a prepared dataset; of samples in memory a hash of every token and mask."""
    digest = hashlib.sha256(trainer.dataset_fingerprint.encode())
    for rows in (trainer.rows, trainer.eval_rows):
        if rows is None or getattr(rows, "split", None) is not None:
            continue
        for index in range(len(rows)):
            for tokens, mask in rows[index].parts:
                digest.update(np.asarray(tokens, "<i8").tobytes() + np.packbits(mask).tobytes())
    return digest.hexdigest()


def _require_same_key(path: Path, stored: Mapping[str, str], key: Mapping[str, str]) -> None:
    differing = [_KEY_NAMES[name] for name in key if stored.get(name) != key[name]]
    if differing:
        raise ConfigError(
            f"{path} cannot be used any more: {', '.join(differing)} differs from when the run began",
            fix="resume with what the run began with, or start a new run",
        )
