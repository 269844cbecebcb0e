"""How much memory is free: the limit of a container counts, and files that were read do not."""

from __future__ import annotations

from pathlib import Path

import torch

from hearth.engine.memory import _cgroup_free, available_memory


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
