"""How much memory there is for the KV cache."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

# Part of the free memory that the KV cache may take when nothing is said: the rest is for activations, for
# the operating system's file cache, and for others.
DEFAULT_SHARE = 0.4


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on this device, within the limits of the container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = int(psutil.virtual_memory().available)
    limit = _cgroup_free()
    return available if limit is None else min(available, limit)


def _cgroup_free() -> int | None:
    """What the control group of this process leaves, if it has a limit (cgroup v2, then v1)."""
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit = int(Path(limit_file).read_text())
            return max(0, limit - int(Path(usage_file).read_text()))
        except (OSError, ValueError):
            continue  # absent, or the word "max"
    return None
