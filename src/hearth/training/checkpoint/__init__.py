"""Checkpoints that are whole or absent, and what continues from them.

    step-000123.tmp/   safetensors and state.json, hashed while they are written; manifest.json last
    fsync of every file and of the folder → rename to step-000123/ → fsync of the parent
    `latest` (and `best`) rewritten by rename → old ones pruned

Nothing is pickled. ``stateful``: who has something to save. ``staging`` and ``saver``: copies on the host,
and the thread that writes them. ``store``: the folder of a run's checkpoints. ``files``: one pass over the
bytes. ``export``: a plain model directory from any checkpoint.
"""

from hearth.training.checkpoint.parts import Counters, OptimizerState, Weights
from hearth.training.checkpoint.saver import CheckpointSaver, Saved
from hearth.training.checkpoint.stateful import Contents, HasTensors, HasValues, Stateful, collect, restore
from hearth.training.checkpoint.store import Checkpoint, CheckpointStore, checkpoint_name

__all__ = [
    "Checkpoint",
    "CheckpointSaver",
    "CheckpointStore",
    "Contents",
    "Counters",
    "HasTensors",
    "HasValues",
    "OptimizerState",
    "Saved",
    "Stateful",
    "Weights",
    "checkpoint_name",
    "collect",
    "restore",
]
