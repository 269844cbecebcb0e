"""What the machine does while a model trains: processor, memory, disk and GPUs, from a thread."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import psutil
import torch


class GpuReader(Protocol):
    """Reads what GPUs do."""

    def read(self) -> dict[str, float]:
        """Figures by name: gpu0_utilization_percent, gpu0_memory_bytes, gpu0_power_watts, ..."""


class NvmlReader:
    """The GPUs that this process may use, by NVIDIA's management library."""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles

    @classmethod
    def open(cls, uuids: list[str]) -> NvmlReader | None:
        """None where the library or its driver is absent. ``uuids`` as torch names the visible GPUs."""
        try:
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
            return cls(nvml, [nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids])
        except Exception:  # noqa: BLE001 - not installed, no driver, or a driver of another version
            return None

    def read(self) -> dict[str, float]:
        """Utilisation, memory of all processes, and power; what a card does not measure is left out."""
        found: dict[str, float] = {}
        for index, handle in enumerate(self._handles):
            with contextlib.suppress(self._nvml.NVMLError):
                rates = self._nvml.nvmlDeviceGetUtilizationRates(handle)
                found[f"gpu{index}_utilization_percent"] = float(rates.gpu)
            with contextlib.suppress(self._nvml.NVMLError):
                found[f"gpu{index}_memory_bytes"] = float(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
            with contextlib.suppress(self._nvml.NVMLError):
                found[f"gpu{index}_power_watts"] = self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000.0
        return found


class TorchReader:
    """Memory of the GPUs by torch alone."""

    def read(self) -> dict[str, float]:
        """Memory in use by all processes."""
        found = {}
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found[f"gpu{index}_memory_bytes"] = float(total - free)
        return found


def open_gpu_reader() -> GpuReader | None:
    """NVML where it works, else torch; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
    return NvmlReader.open(uuids) or TorchReader()


def read_system(process: psutil.Process, folder: Path, gpus: GpuReader | None) -> dict[str, float]:
    """One sample. cpu_percent is of the whole machine since the last call, 100 when all cores are busy."""
    found = {
        "cpu_percent": psutil.cpu_percent(interval=None),
        "process_rss_bytes": float(process.memory_info().rss),
        "memory_available_bytes": float(psutil.virtual_memory().available),
        "disk_free_bytes": float(psutil.disk_usage(str(folder)).free),
        **({} if gpus is None else gpus.read()),
    }
    return {f"system/{name}": value for name, value in found.items()}


class SystemSampler:
    """While open, gives a sample to ``log`` every so many seconds, and one at the end. 0 seconds: none."""

    def __init__(
        self,
        log: Callable[[Mapping[str, float]], None],
        *,
        every: float,
        folder: Path,
        warn: Callable[[str], None],
    ) -> None:
        self._log, self._every, self._folder, self._warn = log, every, folder, warn
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._every > 0:
            self._process, self._gpus = psutil.Process(), open_gpu_reader()
            psutil.cpu_percent(interval=None)  # the first call only starts the measurement
            self._thread = threading.Thread(target=self._work, name="hearth-system-metrics", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def _work(self) -> None:
        for _ in self._times():
            try:
                self._log(read_system(self._process, self._folder, self._gpus))
            except Exception as error:  # noqa: BLE001 - a sensor that fails must not end a training run
                self._warn(f"system metrics end here: {type(error).__name__}: {error}")
                return

    def _times(self) -> Iterator[None]:
        while not self._stopping.wait(self._every):
            yield
        yield
