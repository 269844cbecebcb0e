"""How much memory there is for the KV cache, and giving back what is not needed any more."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path

import torch

from hearth.telemetry.hardware import available_host_memory

# Part of the free memory that the KV cache may take when nothing is said: the rest is for activations, for
# the operating system's file cache, and for others.
DEFAULT_SHARE = 0.4


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on this device, within the limits of the container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_host_memory()


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
