"""Checkpoints are whole or absent, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_pruning_counts_only_what_verifies(tmp_path: Path, damage: str) -> None:
    CheckpointStore(tmp_path).save(1, tensors(1.0), {})
    CheckpointStore(tmp_path).save(2, tensors(2.0), {})
    broken = tmp_path / "checkpoints" / "step-000002" / "model.safetensors"
    if damage == "truncate":
        os.truncate(broken, 100)
    else:
        raw = bytearray(broken.read_bytes())
        raw[-1] ^= 1
        broken.write_bytes(raw)
    said: list[str] = []
    resumed = CheckpointStore(tmp_path, keep=2, warn=said.append)  # a new process: it knows nothing yet
    resumed.save(3, tensors(3.0), {})
    # Two newest by number would be 3 and the broken 2.
    assert [path.name for path in resumed.list()] == ["step-000003", "step-000002", "step-000001"]
    assert "step-000002 is damaged and an older one is kept in its place" in said[0]
    resumed.save(4, tensors(4.0), {})
    assert [path.name for path in resumed.list()] == ["step-000004", "step-000003"]


def test_a_checkpoint_that_shrinks_under_the_run_is_noticed(tmp_path: Path) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path, keep=2, warn=said.append)
    for step in (1, 2):
        store.save(step, tensors(step), {})
    os.truncate(tmp_path / "checkpoints" / "step-000002" / "optimizer.safetensors", 10)
    store.save(3, tensors(3.0), {})
    assert [path.name for path in store.list()] == ["step-000003", "step-000002", "step-000001"]
    assert "step-000002 is damaged" in said[0]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_one_flipped_bit_is_found_and_the_older_one_is_used(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1.0), {"a": 1})
    newest = store.save(2, tensors(2.0), {"a": 2})
    raw = (newest / name).read_bytes()
    for position in range(0, len(raw), max(1, len(raw) // 37)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        (newest / name).write_bytes(damaged)
        said: list[str] = []
        assert CheckpointStore(tmp_path, warn=said.append).load_newest().step == 1, position
        assert len(said) == 2
        assert "step-000002 is damaged and is not used" in said[0]
        assert "going on from the older checkpoint step-000001" in said[1]
    (newest / name).write_bytes(raw)
    assert store.load_newest().step == 2


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


def test_same_step_twice(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1.0), {})
    store.save(1, tensors(5.0), {})
    assert float(store.load_newest().tensors["model"]["w"][0]) == 5.0
    assert [path.name for path in store.root.iterdir()] == ["step-000001"]


def test_later_ones_are_set_aside_until_there_are_new_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, tensors(1.0), {})
    store.save(2, tensors(2.0), {}, best=True)
    store.resume_from(1)
    assert [path.name for path in store.list()] == ["step-000001"]
    assert store.best() is None
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    assert (store.root / "step-000002.damaged" / "model.safetensors").is_file()
    store.save(2, tensors(2.5), {})
    assert {path.name for path in store.root.iterdir()} == {"step-000001", "step-000002"}


def test_pointers_follow_what_the_run_goes_on_from(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, tensors(1.0), {}, best=True)
    store.save(2, tensors(2.0), {}, best=True)
    store.save(3, tensors(3.0), {})
    # Killed after the rename of a best one and before its pointer was written.
    store.resume_from(3, best_step=3)
    assert store.find("best").step == 3
    # The newest best is damaged: the best before it is still there.
    store.resume_from(2, best_step=1)
    assert (store.find("best").step, store.find("latest").step) == (1, 2)


def test_a_folder_that_was_renamed_is_not_believed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, tensors(1.0), {})
    path.rename(path.with_name("step-000007"))
    with pytest.raises(IntegrityError, match="none of the 1 checkpoints"):
        CheckpointStore(tmp_path).load_newest()


def test_finding_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(step, tensors(step), {}, best=step == 2, metrics={"eval_loss": 1 / step})
    assert [store.find(which).step for which in (1, "best", "latest")] == [1, 2, 3]
    assert store.find("best").metrics == {"eval_loss": 0.5}
    with pytest.raises(NotFoundError, match="has no step 9") as caught:
        store.find(9)
    assert "it has steps 1, 2, 3" in str(caught.value)
    with pytest.raises(NotFoundError, match="no best checkpoint, as nothing was evaluated"):
        CheckpointStore(tmp_path / "other").find("best")
    os.truncate(tmp_path / "checkpoints" / "step-000001" / "state.json", 1)
    with pytest.raises(IntegrityError, match=r"state\.json has 1 bytes"):
        store.find(1)


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


def test_full_disk_leaves_the_previous_checkpoint(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(small_disk)
    store.save(1, tensors(1.0, size=100_000), {})
    for look_first in (True, False):
        if not look_first:  # somebody else takes the space meanwhile: the writer runs into the wall
            monkeypatch.setattr(CheckpointStore, "_require_space", lambda *_: None)
        with pytest.raises(StorageError, match=r"the disk is full \(800004 bytes needed, \d+ free\)"):
            store.save(2, tensors(2.0, size=200_000), {})
        assert (small_disk / "latest").read_text() == "step-000001\n"
        assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-000001"]
        assert store.load_newest().step == 1


WRITER = """
import os, signal, sys, torch
from pathlib import Path
from hearth.training.checkpoint import files, store as checkpoint

seen = kill_at = 0
def die_at(original):
    def call(*args, **kwargs):
        global seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call

def make(value):
    return {"model": {"w": torch.full((1000,), value)}, "optimizer": {"s": torch.tensor(value)}}

def save_and_die(root, point):
    global kill_at
    store = checkpoint.CheckpointStore(root)
    store.save(1, make(1.0), {"v": 1.0})
    store.save(2, make(2.0), {"v": 2.0})
    files.HashingFile.write = die_at(files.HashingFile.write)
    os.fsync = die_at(os.fsync)
    os.unlink = die_at(os.unlink)
    Path.rename = die_at(Path.rename)
    Path.replace = die_at(Path.replace)
    kill_at = point
    store.save(3, make(3.0), {"v": 3.0})  # prunes the first
    store.save(3, make(3.5), {"v": 3.5})  # replaces one of the same step

point, ended = 0, None
while ended != 0:
    point += 1
    child = os.fork()
    if child == 0:
        save_and_die(Path(sys.argv[1]) / str(point), point)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL), ended
print(point)
"""


def test_kill_at_every_point_of_a_save(tmp_path: Path) -> None:
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_points = int(done.stdout)
    assert num_points > 40  # every write, flush, rename and removal of two saves
    values = []
    for point in range(1, num_points + 1):
        said: list[str] = []
        store = CheckpointStore(tmp_path / str(point), warn=said.append)
        loaded = store.load_newest()
        value = float(loaded.tensors["model"]["w"][0])
        assert value == loaded.state["v"] == float(loaded.tensors["optimizer"]["s"])
        assert loaded.step == int(value)
        assert said == []
        values.append(value)
        # The next save cleans up what the killed one left.
        store.save(4, tensors(4.0), {"v": 4})
        assert not list((tmp_path / str(point) / "checkpoints").glob("*.tmp"))
        assert len(store.list()) == 2
    assert values == sorted(values)  # never back to an older one
    assert {*values} == {2.0, 3.0, 3.5}
