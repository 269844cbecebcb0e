"""Brings the ranks of an engine up: rank 0's part here, the others in processes of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from hearth.engine.config import EngineConfig, default_num_threads
from hearth.engine.tp.collectives import Collectives
from hearth.engine.tp.leader import Leader, check_devices, device_of
from hearth.engine.tp.loading import load_part


def start_ranks(
    path: Path, config: EngineConfig, device: torch.device
) -> tuple[PreTrainedModel, Leader, Collectives]:
    """The part of rank 0, connected with those of the other ranks; whoever takes it closes the leader.

    Raises what any rank raised: `ConfigError` if heads or GPUs do not go round, `UnsupportedModelError` for
    a model without a plan, `ModelError` for damaged files, `EngineDeadError` for a rank that died.
    """
    check_devices(config, device)
    threads = config.num_threads or max(1, default_num_threads() // config.tensor_parallel)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    own = device_of(0, device)
    leader = Leader(path, config.with_(num_threads=threads))
    try:
        model, connect = load_part(path, config, 0, own)
        group = leader.meet(own)
        connect(group)
    except BaseException:
        leader.close()
        raise
    return model, leader, group
