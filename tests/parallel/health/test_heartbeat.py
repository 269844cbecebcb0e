"""Files by which a process tells its launcher that it lives."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from hearth.parallel.health.heartbeat import Heartbeat, JobRun, announce_run, read_beats, read_run


def test_a_heartbeat_has_the_documented_fields(tmp_path: Path) -> None:
    Heartbeat(tmp_path, run_id="r1", rank=3, clock=lambda: 12.5).beat(7, "training", 0.25)
    written = json.loads((tmp_path / "health" / "rank-3.json").read_text())
    place = {"rank": 3, "pid": os.getpid(), "host": socket.gethostname()}
    assert written == {**place, "step": 7, "phase": "training", "time": 12.5, "step_seconds": 0.25}
    assert read_beats(tmp_path)[3].step == 7


def test_at_most_one_a_second_but_every_change_of_phase(tmp_path: Path) -> None:
    now = [100.0]
    heart = Heartbeat(tmp_path, run_id="r1", rank=0, clock=lambda: now[0])
    seen = []
    for seconds, step, phase in [
        (0.0, 1, "training"), (0.5, 2, "training"), (0.6, 2, "saving"), (0.7, 3, "training"),
        (1.6, 4, "training"), (1.8, 5, "training"), (-50.0, 6, "training"),
    ]:  # fmt: skip
        now[0] = 100.0 + seconds
        heart.beat(step, phase)  # type: ignore[arg-type]
        seen.append((read_beats(tmp_path)[0].step, read_beats(tmp_path)[0].phase))
    # The clock was set back at the end, which must not silence the process.
    assert [step for step, _ in seen] == [1, 1, 2, 3, 3, 5, 6]
    assert seen[2][1] == "saving"


def test_a_phase_ends_with_what_it_was_for(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, run_id="r1", rank=0, clock=lambda: 100.0)
    heart.beat(4, "training", 0.5)
    seen = []

    def save() -> None:
        with heart.during(4, "saving"):
            seen.append(read_beats(tmp_path)[0].phase)
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        save()
    assert seen == ["saving"]
    assert (read_beats(tmp_path)[0].phase, read_beats(tmp_path)[0].step) == ("training", 4)


def test_readers_never_see_half_a_heartbeat(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, run_id="r1", rank=0, interval=0.0)
    heart.beat(0, "training")
    stop = threading.Event()

    def write() -> None:
        for step in range(500):
            heart.beat(step, "training", 0.1)
        stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    steps = []
    while not stop.is_set():
        steps.append(json.loads((tmp_path / "health" / "rank-0.json").read_text())["step"])
    thread.join()
    assert steps == sorted(steps)
    assert [path.name for path in (tmp_path / "health").iterdir()] == ["rank-0.json"]


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "health").write_text("in the way")
    Heartbeat(tmp_path, run_id="r1", rank=0).beat(1, "training")
    assert read_beats(tmp_path) == {}


def test_what_is_no_heartbeat_is_left_out(tmp_path: Path) -> None:
    Heartbeat(tmp_path, run_id="r1", rank=0).beat(1, "training")
    for number, text in enumerate(["", "{", "[]", '{"rank": 5}', '"x"'], start=1):
        (tmp_path / "health" / f"rank-{number}.json").write_text(text)
    assert list(read_beats(tmp_path)) == [0]


def test_what_an_earlier_job_of_the_run_left_is_removed_by_rank_0(tmp_path: Path) -> None:
    for rank in range(4):
        Heartbeat(tmp_path, run_id="r1", rank=rank).beat(900, "training")
    (tmp_path / "health" / ".rank-3.json.77").write_text("{")  # of a writer that was killed
    Heartbeat(tmp_path, run_id="r1", rank=1)
    assert sorted(read_beats(tmp_path)) == [0, 1, 2, 3]
    Heartbeat(tmp_path, run_id="r1", rank=0)
    assert list((tmp_path / "health").iterdir()) == []


def test_rank_0_tells_the_launcher_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "jobs" / "j"
    monkeypatch.setenv("HEARTH_JOB_DIR", str(job))
    Heartbeat(tmp_path / "runs" / "r1", run_id="r1", rank=1)
    assert read_run(job) is None
    Heartbeat(tmp_path / "runs" / "r1", run_id="r1", rank=0)
    assert read_run(job) == JobRun("r1", tmp_path / "runs" / "r1")
    assert not read_run(job).has_checkpoint  # type: ignore[union-attr]
    (job / "run.json").write_text("{}")
    assert read_run(job) is None
    announce_run(Path("/proc/no/such/place"), JobRun("r1", tmp_path))  # cannot be written: no error
