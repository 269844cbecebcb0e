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


def _cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group of this process leaves, if it has a limit (cgroup v2, then v1).

    Its usage counts files that were read, such as the weights; what the kernel would drop of them is free.
    """
    for limit, usage, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            left = int((root / limit).read_text()) - int((root / usage).read_text())
            counts = dict(line.split() for line in (root / stat).read_text().splitlines())
            return max(0, left + int(counts.get(cached, 0)))
        except (OSError, ValueError):
            continue  # absent, or the word "max"
    return None
