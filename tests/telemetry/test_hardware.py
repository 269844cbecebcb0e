"""The hardware probe reads what the system says and invents nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hearth.telemetry import hardware


def test_this_machine() -> None:
    found = hardware.find_hardware()
    assert found.num_cores == len(os.sched_getaffinity(0))
    assert found.memory_bytes > 1 << 28
    assert found.to_dict()["architecture"] == found.architecture


def test_cpuinfo_of_other_machines(tmp_path: Path) -> None:
    arm = tmp_path / "cpuinfo"
    arm.write_text("processor : 0\nFeatures : fp asimd i8mm bf16\n", encoding="utf-8")
    name, flags = hardware._read_cpuinfo(arm)
    assert name == ""
    assert {"asimd", "bf16"} <= flags
    assert hardware._read_cpuinfo(tmp_path / "absent") == ("", frozenset())


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 81559, 570.1'", [("NVIDIA H100 80GB HBM3", 81559 << 20, "570.1")]),
        ("echo 'NVIDIA GB10, [N/A], 580.95'", [("NVIDIA GB10", 0, "580.95")]),
        ("echo 'No devices were found'", []),
        ("echo broken >&2; exit 9", []),
    ],
)
def test_gpus_as_the_driver_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: list[tuple[str, int, str]]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert [(gpu.name, gpu.memory_bytes, gpu.driver) for gpu in hardware._find_gpus()] == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1048576"}, 1 << 20),
        ({"memory.max": "max"}, None),
        ({"memory/memory.limit_in_bytes": "2097152"}, 2 << 20),
        ({}, None),
    ],
)
def test_the_whole_memory_is_that_of_the_container(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    import psutil

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    whole = psutil.virtual_memory().total if expected is None else expected
    assert hardware.whole_host_memory(tmp_path) == whole + psutil.swap_memory().total
