"""`hearth launch` as a user sees it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.parallel.health.heartbeat import Heartbeat, JobRun, announce_run
from hearth.parallel.launch.jobs import JobStore
from hearth.parallel.launch.spec import JobSpec, Rendered

Hearth = Callable[..., Any]
RECIPE = "train: {steps: 5}\n"


@pytest.fixture
def recipe(tmp_path: Path, workspace_dir: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_dry_run_prints_what_would_be_submitted_and_leaves_nothing(
    hearth: Hearth, recipe: Path, workspace_dir: Path
) -> None:
    done = hearth(
        "launch", recipe, "train.steps=7", "--on", "slurm", "--nodes", 2, "--gpus-per-node", 4, "--dry-run"
    )
    assert done.code == 0, done.err
    assert "#SBATCH --nodes=2" in done.out
    assert "#SBATCH --gpus-per-node=4" in done.out
    assert "--nproc-per-node=4 --rdzv-backend=c10d" in done.out
    assert f"{recipe} train.steps=7 &" in done.out
    assert re.search(r"sbatch --parsable \S+/jobs/tiny-\w{8}/rendered/job.sbatch", done.out)
    assert "layout over 8 processes: pipeline 1 x data 8" in done.err
    assert "nothing was submitted" in done.err
    assert not workspace_dir.exists()


def test_dry_run_as_json(hearth: Hearth, recipe: Path) -> None:
    done = hearth("launch", recipe, "--processes", 3, "--env", "A=b", "--dry-run", "--json", "--name", "j-1")
    assert done.json["job"]["processes"] == 3
    assert done.json["job"]["environment"] == [["A", "b"]]
    assert "hearth.parallel.launch.start" in done.json["files"]["command.sh"]
    assert any("recipe loads" in line for line in done.json["checked"])


@pytest.mark.parametrize("kind", ["trainjob", "jobset", "job"])
def test_kubernetes_pods_have_a_workspace_of_their_own(hearth: Hearth, recipe: Path, kind: str) -> None:
    options = [
        "--on",
        "kubernetes",
        "--image",
        "i:1",
        "--option",
        f"kind={kind}",
        "--name",
        "j-1",
        "--dry-run",
    ]
    done = hearth("launch", recipe, *options)
    assert done.code == 0, done.err
    assert "value: /hearth/.hearth\n" in done.out
    assert "/hearth/j-1.yaml" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe given"),
        (["none.yaml"], "there is no recipe none.yaml"),
        (["RECIPE", "--on", "lsf"], "--on 'lsf' is no backend\n  fix: use one of local, torchrun, slurm"),
        (["RECIPE", "--on", "slurm", "--nodes", "0"], "--nodes: 0 is less than 1"),
        (["RECIPE", "--processes", "0"], "processes of a node: 0 is less than 1"),
        (["RECIPE", "--processes", "2", "--nodes", "2"], "--processes is of a single node"),
        (["RECIPE", "--nodes", "2"], "--on local is this machine alone"),
        (["RECIPE", "--gpus-per-node", "-1"], "--gpus-per-node -1 is less than 0"),
        (["RECIPE", "--memory-per-node", "lots"], "'lots' is no size of memory"),
        (["RECIPE", "--time-limit", "soon"], "'soon' is no time"),
        (["RECIPE", "--env", "A"], "--env 'A' is not NAME=VALUE"),
        (["RECIPE", "--option", "prot=1"], "--on local --option has no 'prot' here"),
        (["RECIPE", "--option", "port=high"], "port=high: no positive whole number"),
        (["RECIPE", "--name", "My_Job"], "--name 'My_Job' cannot name a job"),
        (["RECIPE", "--name", "x" * 41], "cannot name a job\n  fix: use at most 40"),
        (["RECIPE", "--on", "torchrun", "--nodes", "2"], "--on torchrun with several nodes needs --name"),
        (["RECIPE", "--workspace", "/w"], "processes of --on local see it as we do"),
        (["RECIPE", "--on", "kubernetes"], "--on kubernetes needs an image"),
        (["RECIPE", "--on", "azureml"], "--on azureml needs an environment"),
        (["RECIPE", "train.stepz=1"], "stepz"),
        (["RECIPE", "--name", "7b"], "--name '7b' cannot name a job"),
        (["RECIPE", "--env", "RANK=1"], "--env RANK is set by the launcher"),
        (
            ["RECIPE", "--time-limit", "1h", "--image", "i:1"],
            "--on local makes no use of --image, --time-limit",
        ),
        (["RECIPE", "--on", "slurm", "--image", "i:1"], "--on slurm makes no use of --image"),
        (["RECIPE", "parallel.tensor=4", "--processes", "2"], "2 processes cannot be laid out"),
    ],
)
def test_garbage_is_refused_before_anything_starts(
    hearth: Hearth, recipe: Path, workspace_dir: Path, arguments: list[str], message: str
) -> None:
    done = hearth("launch", *(str(recipe) if word == "RECIPE" else word for word in arguments))
    assert done.code == 2, done.err
    assert message in done.err
    assert not workspace_dir.exists()


def test_a_missing_tool_is_told_and_the_job_recorded_as_failed(
    hearth: Hearth, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = hearth("launch", recipe, "--on", "slurm", "--name", "j-1")
    assert done.code == 2
    assert "sbatch was not found" in done.err
    assert "fix: run this where Slurm's commands are" in done.err
    assert hearth("launch", "list", "--json").json[0]["state"] == "failed"
    again = hearth("launch", recipe, "--on", "slurm", "--name", "j-1")
    assert (again.code, "there is a job j-1 already" in again.err) == (1, True)


@pytest.fixture
def job(workspace_dir: Path) -> Any:
    spec = JobSpec("tiny-1", "r.yaml", str(workspace_dir), processes=2)
    return JobStore(workspace_dir).create("local", spec, Rendered())


def test_list_status_and_logs_of_a_job(hearth: Hearth, job: Any, workspace_dir: Path) -> None:
    run = workspace_dir / "runs" / "r1"
    announce_run(job.dir, JobRun("r1", run))
    for rank in (0, 1):
        Heartbeat(run, run_id="r1", rank=rank).beat(7 + rank, "training", 0.5)
    (job.dir / "attempt-0").mkdir()
    (job.dir / "attempt-0" / "rank-1.log").write_text("hello\n")
    listed = hearth("launch", "list")
    assert "tiny-1" in listed.out
    found = hearth("launch", "status", "tiny", "--json").json
    assert (found["state"], found["run"]) == ("unknown", "r1")
    assert [each["step"] for each in found["ranks"]] == [7, 8]
    assert "training" in hearth("launch", "status", "tiny-1").out
    assert hearth("launch", "logs", "tiny-1").out == "── attempt-0, rank-1 ──\nhello\n"


def test_a_job_whose_launcher_was_killed_is_not_listed_as_running(
    hearth: Hearth, job: Any, workspace_dir: Path
) -> None:
    program = """
import json, time
from hearth.workspace.processes import ProcessIdentity
print(json.dumps(vars(ProcessIdentity.current())), flush=True)
time.sleep(100)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    identity = json.loads(launcher.stdout.readline())
    JobStore(workspace_dir).update(job, state="running", handle={"launcher": identity})
    assert hearth("launch", "list", "--json").json[0]["state"] == "running"
    launcher.kill()
    launcher.communicate()
    (listed,) = hearth("launch", "list", "--json").json
    assert (listed["state"], listed["detail"]) == ("failed", f"its launcher, process {launcher.pid}, is gone")
    assert hearth("launch", "status", "tiny-1", "--json").json["state"] == "failed"


def test_jobs_that_are_not_there(hearth: Hearth, workspace_dir: Path) -> None:
    for verb in ("status", "logs", "cancel"):
        done = hearth("launch", verb, "nope")
        assert (done.code, "no job 'nope'" in done.err) == (2, True)
    assert "no jobs yet" in hearth("launch", "list").err


def test_a_job_that_has_ended_is_not_cancelled(hearth: Hearth, job: Any, workspace_dir: Path) -> None:
    JobStore(workspace_dir).update(job, state="finished")
    done = hearth("launch", "cancel", "tiny-1")
    assert (done.code, "has ended already: finished" in done.err) == (0, True)


def test_help_is_that_of_starting_a_job(hearth: Hearth) -> None:
    done = hearth("launch", "--help")
    assert done.code == 0
    assert "--dry-run" in done.out
    assert "status JOB" in done.out
    assert " launch [OPTIONS] [RECIPE]" in re.sub(r"\s+", " ", done.out)
    assert "--json" in hearth("launch", "status", "--help").out


def test_a_run_to_resume_must_be_there_and_fit(hearth: Hearth, recipe: Path, workspace_dir: Path) -> None:
    from hearth.workspace import Workspace

    with Workspace.open(workspace_dir) as workspace:
        run = workspace.runs.create("train", name="r")
        (run.dir / "recipe.yaml").write_text("parallel: {shard: 2}\n")
        run.finish("interrupted")
    done = hearth("launch", "--resume", "nowhere")
    assert (done.code, "no run 'nowhere'" in done.err) == (2, True)
    done = hearth("launch", "--resume", run.id, "--processes", 3)
    assert (done.code, "3 processes cannot be laid out" in done.err) == (2, True)
    done = hearth("launch", "--resume", run.id, "--processes", 2, "--dry-run")
    assert done.code == 0, done.err
    assert f"run {run.id} is there" in done.err
    assert not (workspace_dir / "jobs").exists()


def test_values_of_variables_are_not_listed(hearth: Hearth, workspace_dir: Path) -> None:
    spec = JobSpec("tiny-1", "r.yaml", str(workspace_dir), environment=(("HF_TOKEN", "hf_secret"),))
    JobStore(workspace_dir).create("local", spec, Rendered())
    done = hearth("launch", "list", "--json")
    assert done.json[0]["spec"]["environment"] == ["HF_TOKEN"]
    assert "hf_secret" not in done.out


def test_a_job_asked_to_end_is_not_called_ended_before(
    hearth: Hearth, workspace_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's commands in shell: the job runs until somebody removes the file."""
    store, alive = JobStore(workspace_dir), tmp_path / "alive"
    store.create("slurm", JobSpec("tiny-1", "r.yaml", str(workspace_dir)), Rendered())
    store.update(store.get("tiny-1"), handle={"slurm_job": "7"}, state="pending")
    tools = tmp_path / "bin"
    tools.mkdir()
    state = f"[ -e {alive} ] && echo JobState=RUNNING || echo JobState=FAILED"
    for name, text in {"scontrol": state, "scancel": "true"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    alive.touch()
    assert "asked Slurm job 7" in hearth("launch", "cancel", "tiny-1").out
    assert hearth("launch", "status", "tiny-1", "--json").json["state"] == "running"
    assert "asked Slurm job 7" in hearth("launch", "cancel", "tiny-1").out  # and may be asked again
    alive.unlink()
    assert hearth("launch", "status", "tiny-1", "--json").json["state"] == "cancelled"
    assert "has ended already: cancelled" in hearth("launch", "cancel", "tiny-1").err


@pytest.mark.slow
def test_a_recipe_that_training_refuses_ends_the_job_with_its_words(hearth: Hearth, recipe: Path) -> None:
    """Through real processes: what `hearth train` says reaches the user, and nothing is tried again."""
    done = hearth("launch", recipe, "data.dataset=nowhere", "--processes", 2, "--name", "j-1")
    assert done.code == 1
    assert "rank 0 failed: exit code 2" in done.err or "rank 1 failed: exit code 2" in done.err
    assert "nowhere" in done.err
    assert "restart" not in done.err.replace("failed after 0 restarts", "")
    record = json.loads((Path(os.environ["HEARTH_HOME"]) / "jobs" / "j-1" / "job.json").read_text())
    assert record["state"] == "failed"


@pytest.mark.slow
def test_cancel_from_another_terminal(hearth: Hearth, recipe: Path, workspace_dir: Path) -> None:
    """The processes are still importing when they are told to end, which they do at once."""
    command = [sys.executable, "-m", "hearth", "launch", str(recipe), "--processes", "2", "--name", "j-1"]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60.0
    while not list(workspace_dir.glob("jobs/j-1/attempt-0/rank-1.log")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    assert hearth("launch", "status", "j-1", "--json").json["state"] == "running"
    assert "asked process" in hearth("launch", "cancel", "j-1").out
    _, words = launcher.communicate(timeout=120)
    assert launcher.returncode == 130, words
    assert hearth("launch", "status", "j-1", "--json").json["state"] == "interrupted"
    assert signal.SIGTERM.name in words
