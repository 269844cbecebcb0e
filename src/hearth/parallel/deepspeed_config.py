"""What DeepSpeed is told, from the section ``parallel`` of a recipe. Pure: neither torch nor DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hearth.config.parallel import ParallelSection

# Weights of that many times the hidden size stay whole in every process: norms and biases.
_SMALL = 10
_LARGEST_GROUP = 100_000_000  # elements that one process updates at once, where states rest on the host
_BUFFERS = 5  # weights of a layer that are read ahead


@dataclass(frozen=True)
class Sizes:
    """Of a model, in elements."""

    hidden: int  # its hidden size
    total: int  # all weights
    largest: int  # the largest weight
    num_layers: int


def deepspeed_config(
    section: ParallelSection, sizes: Sizes, *, num_processes: int, grad_clip: float, folder: str | None = None
) -> dict[str, Any]:
    """ZeRO stage 3 with float32 weights; the loop accumulates, autocasts and sets the rate itself.

    ``folder``: where weights and optimizer states rest with offload: nvme.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": _SMALL * sizes.hidden,
        # Gradients must be ready when the backward pass returns, for their norm.
        "overlap_comm": False,
        "offload_param": _offload(section, folder),
        "offload_optimizer": _offload(section, folder),
    }
    if section.offload != "none":
        # About a layer at a time: what is updated at once is what the host must hold besides.
        each = max(sizes.largest, sizes.total // sizes.num_layers) // num_processes
        zero["sub_group_size"] = max(1, min(each, _LARGEST_GROUP))
    if section.offload == "nvme":
        part = -(-sizes.largest // num_processes)
        zero["offload_param"] |= {"buffer_count": _BUFFERS, "buffer_size": part, "max_in_cpu": 0}
        # A weight, its gradient and both moments.
        zero["offload_optimizer"] |= {"buffer_count": 4}
    return {
        # Hearth hands over micro-batches of any size; DeepSpeed counts them and no more.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip,
        "communication_data_type": "bf16" if section.reduce == "bf16" else "fp32",
        # torch's fused AdamW also runs on the host, and is the one of every other layout.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _offload(section: ParallelSection, folder: str | None) -> dict[str, Any]:
    if section.offload == "none":
        return {"device": "none"}
    found: dict[str, Any] = {"device": section.offload, "pin_memory": True}
    if section.offload == "nvme":
        assert folder is not None, "the folder was made before"
        found["nvme_path"] = folder
    return found
