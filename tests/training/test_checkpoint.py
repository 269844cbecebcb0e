"""Checkpoints are whole or absent, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.errors import IntegrityError, NotFoundError, StorageError
from hearth.training import CheckpointStore


def tensors(value: float = 1.0, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((size,), value)}, "optimizer": {"w|step": torch.tensor(value)}}


def test_round_trip_and_layout(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(12, tensors(3.0), {"data": {"rows_consumed": 48}})
    assert path == tmp_path / "checkpoints" / "step-000012"
    assert (tmp_path / "latest").read_text() == "step-000012\n"
    assert {file.name for file in path.iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    loaded = store.load_newest()
    assert (loaded.step, loaded.state) == (12, {"data": {"rows_consumed": 48}})
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((1000,), 3.0))


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 7):
        store.save(step, tensors(step), {}, best=step == 2)
    assert [path.name for path in store.list()] == ["step-000006", "step-000005", "step-000002"]
    assert store.best() == tmp_path / "checkpoints" / "step-000002"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_one_flipped_bit_is_found_and_the_older_one_is_used(tmp_path: Path, name: str) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path, warn=said.append)
    store.save(1, tensors(1.0), {"a": 1})
    newest = store.save(2, tensors(2.0), {"a": 2})
    raw = bytearray((newest / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (newest / name).write_bytes(raw)
    assert store.load_newest().step == 1
    assert len(said) == 2
    assert "step-000002 is damaged" in said[0]
    assert "step-000001" in said[1]


@pytest.mark.parametrize("damage", ["truncate", "delete", "no manifest"])
def test_lost_files(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, tensors(), {})
    if damage == "truncate":
        os.truncate(path / "model.safetensors", 100)
    else:
        (path / ("model.safetensors" if damage == "delete" else "manifest.json")).unlink()
    with pytest.raises(IntegrityError, match="none of the 1 checkpoints"):
        store.load_newest()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no checkpoint in"):
        CheckpointStore(tmp_path).load_newest()


def test_same_step_twice_and_discarding_later_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1.0), {})
    store.save(2, tensors(2.0), {}, best=True)
    store.save(2, tensors(5.0), {})
    assert float(store.load_newest().tensors["model"]["w"][0]) == 5.0
    store.discard_after(1)
    assert [path.name for path in store.list()] == ["step-000001"]
    assert store.best() is None


def test_an_interrupted_replacement_of_a_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1.0), {})
    rename = Path.rename

    def fail_to_commit(path: Path, target: Path) -> Path:
        if path.name == "step-000001.tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail_to_commit)
        with pytest.raises(StorageError, match="Input/output error"):
            store.save(1, tensors(2.0), {})
    assert float(store.load(store.list()[0]).tensors["model"]["w"][0]) == 1.0
    # A kill between the two renames leaves the old one under its other name.
    store.list()[0].rename(tmp_path / "checkpoints" / "step-000001.old.tmp")
    assert float(CheckpointStore(tmp_path).load_newest().tensors["model"]["w"][0]) == 1.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_full_disk_leaves_the_previous_checkpoint(small_disk: Path) -> None:
    store = CheckpointStore(small_disk)
    store.save(1, tensors(1.0, size=100_000), {})
    with pytest.raises(StorageError, match=r"the disk is full \(800004 bytes needed, \d+ free\)"):
        store.save(2, tensors(2.0, size=200_000), {})
    assert (small_disk / "latest").read_text() == "step-000001\n"
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-000001"]
    assert store.load_newest().step == 1


WRITER = """
import os, signal, sys, torch
from pathlib import Path
from hearth.training import checkpoint
seen = 0
def die_at(name, original):
    def call(*args, **kwargs):
        global seen
        if armed:
            seen += 1
            if seen == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
armed = False
checkpoint.save_file = die_at("save_file", checkpoint.save_file)
checkpoint._hash_file = die_at("hash", checkpoint._hash_file)
checkpoint._fsync = die_at("fsync", checkpoint._fsync)
checkpoint._write_text = die_at("pointer", checkpoint._write_text)
Path.rename = die_at("rename", Path.rename)
store = checkpoint.CheckpointStore(Path(sys.argv[1]))
make = lambda v: {"model": {"w": torch.full((1000,), v)}, "optimizer": {"s": torch.tensor(v)}}
store.save(1, make(1.0), {"v": 1})
armed = True
store.save(2, make(2.0), {"v": 2})
print("survived")
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", range(1, 16))
def test_kill_at_any_point_of_a_save(tmp_path: Path, point: int) -> None:
    script = tmp_path / "writer.py"
    script.write_text(textwrap.dedent(WRITER))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), str(point)], capture_output=True, text=True
    )
    if done.returncode == 0:
        assert "survived" in done.stdout
        assert point > 11, "the save has more points than that"
    else:
        assert done.returncode == -signal.SIGKILL, done.stderr
    said: list[str] = []
    store = CheckpointStore(tmp_path / "run", warn=said.append)
    loaded = store.load_newest()
    assert loaded.step in (1, 2)
    assert float(loaded.tensors["model"]["w"][0]) == loaded.step == loaded.state["v"]
    assert said == []
    # The next save cleans up what the killed one left.
    store.save(3, tensors(3.0), {"v": 3})
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
