"""Batch scripts: their text, bash's opinion, and a real Slurm of one node where its packages can be had."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from hearth.errors import ConfigError, NotFoundError
from hearth.parallel.launch.backend import Watch
from hearth.parallel.launch.jobs import Job, JobStore
from hearth.parallel.launch.slurm import SlurmBackend
from hearth.parallel.launch.spec import JobSpec, Rendered, Resources
from hearth.parallel.launch.torchrun import MODULE

PROCESS = Path(__file__).with_name("job_process.py")
SLURM_PORT = 26817  # in the configuration that the installer writes
INSTALLER = Path(__file__).resolve().parents[4] / "shared" / "tools" / "slurm-one-node.sh"


def headers(spec: JobSpec) -> list[str]:
    script = SlurmBackend().render(spec).files["job.sbatch"]
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_the_script_asks_for_what_the_job_needs(bare_spec: Callable[..., JobSpec]) -> None:
    spec = bare_spec(
        nodes=4, processes=8, workspace="/shared/ws", time_limit=90_000,
        resources=Resources(8, 96, 512 * 1024),
        options={"partition": "gpu", "account": "lab", "save-seconds": "600"},
    )  # fmt: skip
    assert headers(spec) == [
        "--job-name=job-1",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--output=/shared/ws/jobs/job-1/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        "--cpus-per-task=96",
        "--mem=524288M",
        "--gpus-per-node=8",
        "--time=1-01:00:00",
        "--signal=B:USR1@600",
        "--partition=gpu",
        "--account=lab",
    ]
    script = SlurmBackend().render(spec).files["job.sbatch"]
    assert (
        '--nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"'
        in script
    )
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in script


def test_without_requeue_it_does_not_queue_itself(bare_spec: Callable[..., JobSpec]) -> None:
    spec = bare_spec(requeue=False)
    assert "--no-requeue" in headers(spec)
    assert "scontrol requeue" not in SlurmBackend().render(spec).files["job.sbatch"]


@pytest.mark.parametrize("word", ["it's", 'a "b"', "$HOME", "a\nb", "`id`", "a;b", "{x}"])
def test_bash_takes_any_word_of_a_user(bare_spec: Callable[..., JobSpec], word: str, tmp_path: Path) -> None:
    spec = bare_spec(f"track.name={word}", environment=(("WORD", word),))
    script = SlurmBackend().render(spec).files["job.sbatch"]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    # And hands it on as it was: with the commands of Slurm replaced, srun shows its arguments.
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": 'printf "%s\\0" "$WORD" "${@: -1}"', "scontrol": "echo here"}.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "x",
    }
    done = subprocess.run(["bash"], input=script, text=True, env=environ, capture_output=True, check=True)
    assert done.stdout.partition("\n")[2].split("\0")[:2] == [word, f"track.name={word}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_limit": 300}, "--time-limit is 300 s, of which the last 300 are for saving"),
        ({"workspace": "/my files"}, "has a space in it"),
        ({"options": {"partition": "a b"}}, "--option partition='a b' is no word"),
        ({"options": {"save-seconds": "0"}}, "no positive whole number"),
    ],
)
def test_what_slurm_cannot_be_asked(
    bare_spec: Callable[..., JobSpec], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SlurmBackend().render(bare_spec(**changes))


def test_without_slurm_the_fix_is_told(
    bare_spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = bare_spec()
    rendered = SlurmBackend().render(spec)
    with pytest.raises(ConfigError, match="sbatch was not found") as caught:
        SlurmBackend().submit(spec, rendered, Watch())
    assert "login node" in str(caught.value.fix)
    job = JobStore(Path(spec.workspace)).create("slurm", spec, rendered)
    with pytest.raises(NotFoundError, match="never submitted"):
        SlurmBackend().status(job)


# ── the real thing ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables for a Slurm of one node in user space; skips where its packages cannot be had."""
    if not INSTALLER.is_file() or shutil.which("apt-get") is None:
        pytest.skip(f"no Slurm: {INSTALLER} is not there, or this is no Debian")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", SLURM_PORT)) == 0:
            pytest.skip(f"another Slurm runs here, at port {SLURM_PORT}")
    folder = tmp_path_factory.mktemp("slurm")
    log = folder / "install.log"
    with log.open("w") as file:
        done = subprocess.run(
            ["bash", str(INSTALLER), str(folder)],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )
    daemons = [pid for path in folder.glob("run/*.mypid") if psutil.pid_exists(pid := int(path.read_text()))]
    try:
        if done.returncode or len(daemons) != 2:
            pytest.skip(f"no Slurm: {log.read_text()[-300:]}")
        root = folder / "root" / "usr"
        libraries = f"{root}/lib/x86_64-linux-gnu"
        yield {
            "SLURM_CONF": f"{folder}/slurm.conf",
            "LD_LIBRARY_PATH": f"{libraries}:{libraries}/slurm-wlm",
            "PATH": f"{root}/bin:{root}/sbin:{os.environ['PATH']}",
        }
    finally:
        for pid in daemons:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def submit(
    slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch, bare_spec: Callable[..., JobSpec]
) -> Callable[..., Job]:
    """Submit the script of a job, with test processes in the place of training."""
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)

    def give(*orders: str, **changes: Any) -> Job:
        spec = bare_spec(*orders, **changes)
        rendered = SlurmBackend().render(spec)
        script = rendered.files["job.sbatch"].replace(f"-m {MODULE}", str(PROCESS))
        job = JobStore(Path(spec.workspace)).create("slurm", spec, Rendered({"job.sbatch": script}))
        return replace(job, handle=SlurmBackend().submit(spec, rendered, Watch()).handle)

    return give


def wait_for(job: Job, words: str | None = None, *, state: str | None = None, seconds: float = 90.0) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        log = "\n".join(SlurmBackend().logs(job))
        if (words is None or words in log) and (state is None or SlurmBackend().status(job).state == state):
            return log
        time.sleep(0.5)
    raise AssertionError(f"no {words!r} or {state} after {seconds} s: {SlurmBackend().status(job)}\n{log}")


@pytest.mark.slow
def test_before_its_time_is_over_a_job_saves_and_is_queued_again(submit: Callable[..., Job]) -> None:
    job = submit("endless:0:0", time_limit=3600)
    wait_for(job, "rank 1 of 2 begins at step 0", state="running")
    slurm_job = str(job.handle["slurm_job"])
    subprocess.run(["scancel", "--batch", "--signal=USR1", slurm_job], check=True)  # as Slurm does itself
    log = wait_for(job, "time is over: the job is queued again", state="pending")
    assert log.count("saved at step") == 2
    # Slurm holds a job that was queued again back for two minutes.
    subprocess.run(["scontrol", "update", f"JobId={slurm_job}", "StartTime=now"], check=True)
    log = wait_for(job, state="finished")
    saved = (job.dir / "run" / "latest").read_text()
    assert "start 1 of job" in log
    assert "rank 0 of 2 begins at step 0" in log
    assert log.count("is done") == 2
    assert int(saved) > 0


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_queued_again(submit: Callable[..., Job]) -> None:
    job = submit("endless:0:0")
    wait_for(job, "rank 1 of 2 begins at step 0", state="running")
    assert "to save and end" in SlurmBackend().cancel(job)
    log = wait_for(job, "saved at step", state="failed")  # its exit code is that of torchrun
    assert "cancelled: asking the processes to save" in log
    assert "queued again" not in log


@pytest.mark.slow
def test_a_job_that_waits_is_cancelled_at_once(submit: Callable[..., Job]) -> None:
    job = submit(resources=Resources(cpus=2, memory=1900))
    other = submit("endless:0:0", name="job-2", resources=Resources(cpus=2, memory=1900))
    assert SlurmBackend().status(other).state == "pending"
    assert SlurmBackend().cancel(other).startswith("cancelled Slurm job")
    wait_for(other, state="cancelled")
    wait_for(job, state="finished")
