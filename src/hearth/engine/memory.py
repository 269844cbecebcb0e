"""How much memory there is for the KV cache, and giving back what is not needed any more."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
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


class MappedFiles:
    """The weight files that this process has mapped, so that their pages can be let go once they were read.

    transformers maps safetensors files; a page that was read counts as this process's memory until the last
    tensor of the file is gone, although nobody will look at it again.
    """

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        with contextlib.suppress(OSError):  # not Linux
            for line in Path("/proc/self/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].endswith(".safetensors"):
                    begin, end = (int(part, 16) for part in fields[0].split("-"))
                    self.ranges.append((begin, end))

    def release(self, tensor: torch.Tensor) -> int:
        """Let the pages of ``tensor`` go if they are a file's, and return how many bytes.

        They are read anew if anybody asks. Never on other memory, whose content would be lost.
        """
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return 0
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not any(low <= begin and end <= high for low, high in self.ranges):
            return 0
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if end <= begin:
            return 0
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
        return 0 if failed else end - begin
