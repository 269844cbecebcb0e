from __future__ import annotations

import math
import os
import signal
from datetime import timedelta

import pytest

from hearth.errors import ConflictError, InputError, Interrupted, NotFoundError, StorageError
from hearth.workspace.processes import SILENCE, ProcessIdentity
from hearth.workspace.schema import runs, utcnow


def test_a_run_from_start_to_end(workspace):
    run = workspace.runs.create(
        "train", name="first", recipe={"train": {"steps": 3}}, recipe_hash="ab", tags={"who": "me"}
    )
    assert run.status == "running"
    assert run.dir.is_dir()
    for step in range(3):
        run.log_metrics({"loss": 3.0 - step, "tokens": step * 100}, step=step)
    run.finish(summary={"loss": 1.0, "checkpoint": run.dir / "step-3"})
    found = workspace.runs.get(run.id)
    assert (found.status, found.kind, found.name) == ("finished", "train", "first")
    assert found.recipe == {"train": {"steps": 3}}
    assert found.tags == {"who": "me"}
    assert found.summary == {"loss": 1.0, "checkpoint": str(run.dir / "step-3")}
    assert found.finished_at >= found.created_at
    assert [(p.step, p.value) for p in found.metrics("loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert len(found.metrics()) == 6
    assert found.metrics("none") == []


def test_values_that_are_not_finite_survive(workspace):
    run = workspace.runs.create("train", name="x")
    run.log_metrics({"a": float("nan")}, step=0)
    run.log_metrics({"a": float("inf")}, step=1)
    run.log_metrics({"a": float("-inf")}, step=2)
    run.finish(summary={"loss": float("nan")})
    values = [point.value for point in run.metrics("a")]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf]
    assert workspace.runs.get(run.id).summary == {"loss": None}


def test_points_wait_in_memory_until_a_flush_or_200(workspace, monkeypatch):
    monkeypatch.setattr("hearth.workspace.runs._FLUSH_SECONDS", 3600.0)
    run = workspace.runs.create("train", name="x")
    for step in range(199):
        run.log_metrics({"a": step}, step=step)
    assert run.metrics() == []
    run.log_metrics({"a": 199}, step=199)
    assert len(run.metrics()) == 200
    run.log_metrics({"a": 200}, step=200)
    run.flush()
    assert len(run.metrics()) == 201


def test_points_are_written_by_themselves_after_a_while(workspace, monkeypatch):
    monkeypatch.setattr("hearth.workspace.runs._FLUSH_SECONDS", 0.01)
    run = workspace.runs.create("train", name="x")
    run.log_metrics({"a": 1}, step=1)
    for _ in range(1000):
        if run.metrics():
            break
        signal.sigtimedwait([], 0.01)
    assert [point.value for point in run.metrics()] == [1.0]


def test_a_crash_loses_at_most_the_buffer(workspace, child):
    process = child("die_with_a_buffer")
    out, _ = process.communicate(timeout=60)
    run = workspace.runs.get(out.strip())
    assert [point.step for point in run.metrics("loss")][:10] == list(range(10))
    assert run.status == "interrupted"
    assert "is gone" in run.error


def test_a_killed_process_leaves_an_interrupted_run(workspace, child):
    process = child("run_until_killed")
    run_id = process.stdout.readline().strip()
    assert workspace.runs.get(run_id).status == "running"
    with pytest.raises(ConflictError, match=f"still running as process {process.pid}"):
        workspace.runs.resume(run_id)
    process.kill()
    process.wait()
    run = workspace.runs.get(run_id)
    assert run.status == "interrupted"
    assert f"process {process.pid}" in run.error
    assert [r.id for r in workspace.runs.list(status="interrupted")] == [run_id]
    assert workspace.runs.list(status="running") == []


def test_leaving_without_finishing_writes_what_waits(workspace, child, outcome):
    run = workspace.runs.get(outcome(child("leave_without_finishing")).strip())
    assert [point.value for point in run.metrics()] == [1.0]
    assert run.status == "interrupted"


def test_resuming_goes_on_without_double_points(workspace):
    run = workspace.runs.create("train", name="x")
    for step in range(6):
        run.log_metrics({"loss": step}, step=step)
    run.finish("interrupted")
    again = workspace.runs.resume(run.id)
    assert again.status == "running"
    assert again.finished_at is None
    again.discard_metrics_after(3)
    again.log_metrics({"loss": 40}, step=4)
    again.finish()
    assert [(p.step, p.value) for p in again.metrics("loss")] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    with pytest.raises(NotFoundError):
        workspace.runs.resume("nope")


def test_a_run_of_this_process_cannot_be_resumed_twice(workspace):
    run = workspace.runs.create("train", name="x")
    with pytest.raises(ConflictError, match="still running"):
        workspace.runs.resume(run.id)


def test_only_the_owner_logs(workspace):
    run = workspace.runs.create("train", name="x")
    other = workspace.runs.get(run.id)
    with pytest.raises(ConflictError, match="belongs to another process"):
        other.log_metrics({"a": 1}, step=1)
    run.finish()
    with pytest.raises(ConflictError, match="has ended"):
        run.log_metrics({"a": 1}, step=1)
    with pytest.raises(ConflictError, match="has ended"):
        run.finish()


@pytest.mark.parametrize("status", ["running", "done"])
def test_a_run_ends_in_a_known_state(workspace, status):
    run = workspace.runs.create("train", name="x")
    with pytest.raises(InputError, match=f"cannot end as '{status}'"):
        run.finish(status)
    assert workspace.runs.get(run.id).status == "running"


def test_a_block_ends_its_run(workspace):
    with workspace.runs.create("train", name="good") as good:
        good.log_metrics({"a": 1}, step=1)
    with pytest.raises(ValueError, match="bad luck"), workspace.runs.create("train", name="bad"):
        raise ValueError("bad luck")
    with pytest.raises(KeyboardInterrupt), workspace.runs.create("train", name="stopped"):
        raise KeyboardInterrupt
    with pytest.raises(Interrupted), workspace.runs.create("train", name="saved"):
        raise Interrupted("stopped after saving")
    states = {run.name: (run.status, run.error) for run in workspace.runs.list()}
    assert states["saved"] == ("interrupted", "stopped after saving")
    assert states["good"] == ("finished", None)
    assert states["bad"] == ("failed", "bad luck")
    assert states["stopped"] == ("interrupted", "KeyboardInterrupt")


def test_lists_are_newest_first_and_filtered(workspace):
    first = workspace.runs.create("train", name="a")
    second = workspace.runs.create("eval", name="b")
    third = workspace.runs.create("train", name="c")
    second.finish("failed")
    assert [run.id for run in workspace.runs.list()] == [third.id, second.id, first.id]
    assert [run.id for run in workspace.runs.list(kind="train")] == [third.id, first.id]
    assert [run.id for run in workspace.runs.list(status="failed")] == [second.id]
    assert [run.id for run in workspace.runs.list(status="running", limit=1)] == [third.id]
    with pytest.raises(InputError, match="no run status 'lost'"):
        workspace.runs.list(status="lost")


def test_the_beginning_of_an_id_is_enough_when_it_is_unambiguous(workspace):
    runs_ = [workspace.runs.create("train", name=str(i)) for i in range(2)]
    with workspace.database.write() as connection:
        for run, new in zip(runs_, ("xaa11111", "xab22222"), strict=True):
            connection.execute(runs.update().where(runs.c.id == run.id).values(id=new))
    assert workspace.runs.get("xaa").id == "xaa11111"
    with pytest.raises(NotFoundError, match=r"several runs begin with 'xa': xaa11111, xab22222"):
        workspace.runs.get("xa")
    for nothing in ("y", "", "%", "_"):
        with pytest.raises(NotFoundError, match="no run"):
            workspace.runs.get(nothing)


def test_a_parent_must_exist(workspace):
    parent = workspace.runs.create("train", name="a")
    assert workspace.runs.create("train", name="b", parent=parent.id).parent == parent.id
    with pytest.raises(NotFoundError):
        workspace.runs.create("train", name="c", parent="nope")


def test_two_processes_log_at_once(workspace, child, outcome):
    processes = [child("log_metrics", f"run-{i}", 300) for i in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        run = workspace.runs.get(outcome(process).strip())
        assert run.status == "finished"
        assert [p.step for p in run.metrics("loss")] == list(range(300))
        assert [p.value for p in run.metrics("rate")] == list(range(300))


def test_a_failed_write_keeps_the_points_for_the_next(workspace, monkeypatch):
    run = workspace.runs.create("train", name="x")
    run.log_metrics({"a": 1}, step=1)
    with monkeypatch.context() as patch:

        def fail():
            raise StorageError("the disk is full")

        patch.setattr(workspace.database, "write", fail)
        with pytest.raises(StorageError):
            run.flush()
        for step in range(2, 300):  # going past the batch size must not stop the work
            run.log_metrics({"a": step}, step=step)
    run.finish()
    assert [point.step for point in run.metrics("a")] == list(range(1, 300))


def test_a_process_is_told_from_a_later_one_with_its_number():
    me = ProcessIdentity.current()
    now = utcnow()
    assert me.is_alive(now - timedelta(days=9), now), "a visible process needs no heartbeat"
    assert not ProcessIdentity(me.host, me.system_id, me.pid, me.started - 60).is_alive(now, now)
    assert not ProcessIdentity(me.host, me.system_id, 2**22 + 1, me.started).is_alive(now, now)


def test_a_process_elsewhere_lives_by_its_heartbeat():
    far = ProcessIdentity("far", "another boot", 1, 0.0)
    now = utcnow()
    assert far.is_alive(now - SILENCE / 2, now)
    assert not far.is_alive(now - SILENCE * 2, now)


def test_a_running_run_beats(workspace, monkeypatch):
    monkeypatch.setattr("hearth.workspace.runs._FLUSH_SECONDS", 0.01)
    monkeypatch.setattr("hearth.workspace.runs._HEARTBEAT_SECONDS", 0.01)
    run = workspace.runs.create("train", name="x")
    first = workspace.runs.row(run.id).heartbeat_at
    for _ in range(1000):
        if workspace.runs.row(run.id).heartbeat_at > first:
            break
        signal.sigtimedwait([], 0.01)
    assert workspace.runs.row(run.id).heartbeat_at > first


def test_a_forked_child_writes_none_of_its_parents_points(workspace, monkeypatch):
    monkeypatch.setattr("hearth.workspace.runs._FLUSH_SECONDS", 3600.0)
    run = workspace.runs.create("train", name="x")
    run.log_metrics({"a": 1}, step=1)
    pid = os.fork()
    if pid == 0:  # as a data loader's worker that ends the normal way
        workspace.runs.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert run.metrics() == []
    run.finish()
    assert len(run.metrics()) == 1
