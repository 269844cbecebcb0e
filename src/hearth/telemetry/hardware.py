"""What machine this is, read from the operating system without loading torch.

Every benchmark and every run records it, so that a number can be compared with another one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Features that decide which CPU kernels are used, in the spelling of /proc/cpuinfo.
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Hardware:
    """The machine. ``num_cores`` is what this process may use, not what the machine has."""

    cpu: str
    architecture: str
    num_cores: int
    features: tuple[str, ...]
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    system: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_hardware() -> Hardware:
    """Describe this machine; what cannot be read is left empty or zero, never guessed."""
    name, flags = _read_cpuinfo()
    return Hardware(
        cpu=name or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        num_cores=_num_usable_cores(),
        features=tuple(feature for feature in FEATURES if feature in flags),
        memory_bytes=_memory_bytes(),
        gpus=tuple(_find_gpus()),
        system=f"{platform.system()} {platform.release()}",
    )


def _num_usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    name, flags = "", frozenset[str]()
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and not name:
                name = value.strip()
            if key.strip() in {"flags", "Features"} and not flags:
                flags = frozenset(value.split())
    return name, flags


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def available_host_memory() -> int:
    """Bytes of memory that can still be allocated, within the limits of the container."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit = _cgroup_free()
    return available if limit is None else min(available, limit)


def whole_host_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that all processes here could ever hold together: memory within the container's limit, and swap.

    What others hold of it now does not count.
    """
    import psutil

    memory = int(psutil.virtual_memory().total)
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # absent, or the word "max"
            memory = min(memory, int((root / limit).read_text()))
    return memory + int(psutil.swap_memory().total)


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


def _find_gpus() -> list[Gpu]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = []
    for line in result.stdout.splitlines() if result.returncode == 0 else []:
        cells = [cell.strip() for cell in line.rsplit(",", 2)]
        if len(cells) == 3:  # anything else is a message, not a GPU
            # A GPU that shares the machine's memory has "[N/A]" of its own.
            gpus.append(Gpu(cells[0], int(cells[1]) << 20 if cells[1].isdigit() else 0, cells[2]))
    return gpus
