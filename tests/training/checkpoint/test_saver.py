"""Saving in the background: the state of its step is saved, and nobody believes too early that it is."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.errors import StorageError
from hearth.training.checkpoint import CheckpointSaver, CheckpointStore, Contents, store


class Gate:
    """Holds the writer before its first tensor, until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        original = store.write_tensors

        def wait(*args: Any) -> Any:
            self.reached.set()
            assert self.open.wait(20)
            return original(*args)

        monkeypatch.setattr(store, "write_tensors", wait)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path: Path, said: list[str]) -> CheckpointSaver:
    return CheckpointSaver(CheckpointStore(tmp_path), background=True, say=said.append)


def contents_of(weight: torch.Tensor) -> Any:
    return lambda: (Contents({"model": {"w": weight}}, {"training": {"step": 1}}), {"about": "test"})


def value_in(path: Path) -> float:
    return float(CheckpointStore(path).load_newest().tensors["model"]["w"][0])


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path, saver: CheckpointSaver, gate: Gate) -> None:
    weight, values = torch.full((1000,), 1.0), {"step": 1}
    saver.save(1, lambda: (Contents({"model": {"w": weight}}, {"training": values}), {}))
    assert gate.reached.wait(10)
    weight.fill_(2.0)
    values["step"] = 2
    gate.open.set()
    (saved,) = saver.wait()
    loaded = saver.store.load(saved.path)
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((1000,), 1.0))
    assert loaded.state == {"parts": {"training": {"step": 1}}}


def test_nothing_points_to_a_checkpoint_before_it_is_whole(
    tmp_path: Path, saver: CheckpointSaver, gate: Gate
) -> None:
    gate.open.set()
    saver.save(1, contents_of(torch.ones(10)))
    saver.wait()
    gate.open.clear()
    gate.reached.clear()
    saver.save(2, contents_of(torch.ones(10)), best=True)
    assert gate.reached.wait(10)
    assert saver.poll() == []
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    assert saver.store.best() is None
    assert [path.name for path in saver.store.list()] == ["step-000001"]
    gate.open.set()
    assert [saved.step for saved in saver.wait()] == [2]
    assert (tmp_path / "latest").read_text() == "step-000002\n"


def test_a_second_save_waits_and_says_so(
    tmp_path: Path, saver: CheckpointSaver, gate: Gate, said: list[str]
) -> None:
    weight = torch.full((10,), 1.0)
    saver.save(1, contents_of(weight))
    assert gate.reached.wait(10)
    weight.fill_(2.0)
    threading.Timer(0.2, gate.open.set).start()
    saver.save(2, contents_of(weight))
    first, second = saver.wait()
    assert said == ["the checkpoint of step 2 waits for the one before it, which is still written"]
    assert (first.step, second.step) == (1, 2)
    assert second.stall_seconds > 0.1  # the wait is part of what training stood still
    assert float(saver.store.load(first.path).tensors["model"]["w"][0]) == 1.0
    assert value_in(tmp_path) == 2.0


def test_the_stall_is_the_copy_alone(saver: CheckpointSaver, gate: Gate) -> None:
    started = time.perf_counter()
    saver.save(1, contents_of(torch.ones(1000)))
    returned = time.perf_counter() - started
    assert gate.reached.wait(10)
    time.sleep(0.3)
    gate.open.set()
    (saved,) = saver.wait()
    assert saved.stall_seconds <= returned
    assert saved.seconds > saved.stall_seconds + 0.25
    assert saved.num_bytes == 4000


def test_host_buffers_are_used_again(saver: CheckpointSaver, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = store.write_tensors

    def record(path: Path, tensors: dict[str, torch.Tensor], *rest: Any) -> Any:
        written.append(tensors["w"].data_ptr())
        return original(path, tensors, *rest)

    monkeypatch.setattr(store, "write_tensors", record)
    weight = torch.ones(1000)
    for step in (1, 2, 3):
        saver.save(step, contents_of(weight))
    saver.wait()
    assert len(written) == 3
    assert len({*written}) == 1
    assert weight.data_ptr() not in written
    saver.save(4, contents_of(torch.ones(2000)))  # another shape: a new buffer
    saver.wait()
    assert saver.store.load_newest().tensors["model"]["w"].shape == (2000,)


@pytest.mark.parametrize("surface", ["poll", "wait", "save"])
def test_an_error_of_the_writer_surfaces_once_in_the_trainer(
    tmp_path: Path, saver: CheckpointSaver, monkeypatch: pytest.MonkeyPatch, surface: str
) -> None:
    saver.save(1, contents_of(torch.full((10,), 1.0)))
    saver.wait()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_tensors", fail)
        saver.save(2, contents_of(torch.full((10,), 2.0)))
        assert saver._thread is not None
        saver._thread.join()
    call: Any = {
        "poll": saver.poll,
        "wait": saver.wait,
        "save": lambda: saver.save(3, contents_of(torch.ones(10))),
    }[surface]
    with pytest.raises(StorageError, match=r"step-000002: Input/output error \(40 bytes needed"):
        call()
    assert value_in(tmp_path) == 1.0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    saver.save(4, contents_of(torch.full((10,), 4.0)))
    assert [saved.step for saved in saver.wait()] == [4]


def test_giving_up_leaves_the_previous_one_alone(tmp_path: Path, saver: CheckpointSaver, gate: Gate) -> None:
    gate.open.set()
    saver.save(1, contents_of(torch.full((10,), 1.0)))
    saver.wait()
    gate.open.clear()
    gate.reached.clear()
    saver.save(2, contents_of(torch.full((10,), 2.0)))
    assert gate.reached.wait(10)
    threading.Timer(0.1, gate.open.set).start()
    saver.cancel()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert saver.wait() == []
    assert value_in(tmp_path) == 1.0


def test_in_the_foreground(tmp_path: Path) -> None:
    saver = CheckpointSaver(CheckpointStore(tmp_path), background=False)
    saver.save(1, contents_of(torch.ones(10)), metrics={"eval_loss": 2.5}, best=True)
    (saved,) = saver.poll()
    assert saved.seconds == saved.stall_seconds
    assert set(saved.metrics()) == {"checkpoint_seconds", "checkpoint_stall_seconds"}
    loaded = saver.store.find("best")
    assert (loaded.step, loaded.metrics) == (1, {"eval_loss": 2.5})


def test_the_last_one_needs_no_copy(tmp_path: Path, saver: CheckpointSaver) -> None:
    saver.save(1, contents_of(torch.full((10,), 1.0)))
    saver.save(2, contents_of(torch.full((10,), 2.0)), last=True)
    assert saver._thread is None
    assert [saved.step for saved in saver.poll()] == [1, 2]
    assert value_in(tmp_path) == 2.0
    alone = CheckpointSaver(CheckpointStore(tmp_path), background=True)
    alone.save(3, contents_of(torch.ones(10)), last=True)
    assert alone._stager._buffers == {}


def test_ctrl_c_in_the_foreground_leaves_nothing_half_written(
    tmp_path: Path, saver: CheckpointSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.save(1, contents_of(torch.full((10,), 1.0)), last=True)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        saver.save(2, contents_of(torch.ones(10)), last=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert value_in(tmp_path) == 1.0


def test_a_number_that_json_cannot_hold_is_refused_at_once(saver: CheckpointSaver) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        saver.save(1, lambda: (Contents({}, {"training": {"loss": float("nan")}}), {}))
