"""How much memory is free: the limit of a container counts, and files that were read do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hearth.engine.memory import MappedFiles, available_memory
from hearth.telemetry.hardware import _cgroup_free


def test_a_container_leaves_its_limit_without_what_can_be_dropped(tmp_path: Path) -> None:
    assert _cgroup_free(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\nactive_file 150\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_free(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert _cgroup_free(tmp_path) == 550


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000\n")
    (folder / "memory.usage_in_bytes").write_text("700\n")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 250\n")
    assert _cgroup_free(tmp_path) == 550


def test_some_memory_is_free_here() -> None:
    assert available_memory(torch.device("cpu")) > 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_pages_of_weight_files_are_let_go_and_come_back(tmp_path: Path) -> None:
    def resident_file_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssFile")).split()[1])

    weights = torch.randn(4 << 20, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weights}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["weight"]
    assert torch.equal(mapped, weights)
    before = resident_file_kib()
    released = MappedFiles().release(mapped)
    assert released > 0.99 * mapped.nbytes
    assert before - resident_file_kib() > 0.9 * mapped.nbytes / 1024
    assert torch.equal(mapped, weights)


def test_other_memory_is_never_let_go() -> None:
    weights = torch.randn(1 << 20)
    copy = weights.clone()
    assert MappedFiles().release(weights) == 0
    assert torch.equal(weights, copy)
