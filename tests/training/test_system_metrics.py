"""What the machine does: sampled by a thread, beside the metrics of training."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from hearth.training import Callback, Trainer
from hearth.training.system_metrics import NvmlReader, SystemSampler, read_system

MakeTrainer = Callable[..., Trainer]
NAMES = {
    "system/cpu_percent",
    "system/process_rss_bytes",
    "system/memory_available_bytes",
    "system/disk_free_bytes",
}


def test_one_sample_is_what_the_system_says(tmp_path: Path) -> None:
    process = psutil.Process()
    psutil.cpu_percent(interval=None)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:  # keep a core busy
        pass
    found = read_system(process, tmp_path, None)
    assert set(found) == NAMES
    assert found["system/process_rss_bytes"] == pytest.approx(process.memory_info().rss, rel=0.2)
    assert found["system/disk_free_bytes"] == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.05)
    assert 0 < found["system/cpu_percent"] <= 100


def test_samples_come_in_time_and_once_more_at_the_end(tmp_path: Path) -> None:
    samples: list[Mapping[str, float]] = []
    with SystemSampler(samples.append, every=0.05, folder=tmp_path, warn=print):
        time.sleep(0.5)
    assert 3 <= len(samples) <= 12
    count = len(samples)
    time.sleep(0.15)
    assert len(samples) == count
    with SystemSampler(samples.append, every=60, folder=tmp_path, warn=print):
        pass
    assert len(samples) == count + 1


def test_zero_takes_none(tmp_path: Path) -> None:
    samples: list[Mapping[str, float]] = []
    with SystemSampler(samples.append, every=0, folder=tmp_path, warn=print):
        time.sleep(0.05)
    assert samples == []


def test_a_sensor_that_fails_ends_the_samples_and_nothing_else(tmp_path: Path) -> None:
    said: list[str] = []
    with SystemSampler(lambda _v: None, every=0.01, folder=tmp_path / "absent", warn=said.append):
        time.sleep(0.2)
    assert len(said) == 1
    assert "system metrics end here: FileNotFoundError" in said[0]


class NvmlError(Exception):
    pass


def nvml_of(**functions: Any) -> Any:
    """The part of pynvml that is used; without a card there is nothing real to ask."""
    module = types.ModuleType("pynvml")
    module.NVMLError = NvmlError  # type: ignore[attr-defined]
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def test_gpu_figures_in_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    def power(handle: str) -> int:
        if handle.endswith("b"):
            raise NvmlError("not supported")
        return 61_500

    module = nvml_of(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUtilizationRates=lambda _handle: types.SimpleNamespace(gpu=93),
        nvmlDeviceGetMemoryInfo=lambda _handle: types.SimpleNamespace(used=1 << 30),
        nvmlDeviceGetPowerUsage=power,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    reader = NvmlReader.open(["a", "b"])
    assert reader is not None
    assert reader.read() == {
        "gpu0_utilization_percent": 93.0,
        "gpu0_memory_bytes": float(1 << 30),
        "gpu0_power_watts": 61.5,
        "gpu1_utilization_percent": 93.0,
        "gpu1_memory_bytes": float(1 << 30),
    }


def test_without_driver_there_is_no_reader() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert NvmlReader.open([]) is None
    else:
        pytest.skip("this machine has a driver")


def test_a_run_has_them_at_its_steps(train_parts: MakeTrainer) -> None:
    class Slow(Callback):
        def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
            time.sleep(0.05)

    run = train_parts(callbacks=[Slow()], train={"steps": 5}, track={"system_metrics_every": 0.02}).fit()
    for name in NAMES:
        points = run.metrics(name)
        assert len(points) >= 3
        assert all(0 <= point.step <= 5 for point in points)
        assert points[-1].step == 5
    assert run.metrics("system/process_rss_bytes")[-1].value > 5e7
