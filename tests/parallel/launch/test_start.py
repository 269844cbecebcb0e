"""The first moments of each process of a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from hearth.parallel.health.heartbeat import JobRun, announce_run
from hearth.parallel.launch.start import train_arguments


def test_a_restart_goes_on_with_the_run_once_it_has_a_checkpoint(tmp_path: Path) -> None:
    first = ["recipe.yaml", "train.steps=5"]
    run = JobRun("r1", tmp_path)
    assert train_arguments(first, None) == ["train", *first]
    assert train_arguments(first, run) == ["train", *first]
    (tmp_path / "latest").write_text("5")
    assert train_arguments(first, run) == ["train", "--resume", "r1"]
    # What a job that resumes was given besides holds for all its starts.
    again = ["--resume", "r1", "parallel.shard=2"]
    assert train_arguments(again, run) == ["train", *again]


def test_it_becomes_hearth_train(tmp_path: Path) -> None:
    """With a job's run to go on with, and with a recipe: both are refused, for what they lack, by hearth."""
    job = tmp_path / "job"
    environ = {**os.environ, "HEARTH_HOME": str(tmp_path / "ws"), "HEARTH_JOB_DIR": str(job)}
    command = [sys.executable, "-m", "hearth.parallel.launch.start", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    assert (job / "stacks" / "rank-0.stacks").exists()

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text("5")
    announce_run(job, JobRun("zzzzzzz1", tmp_path / "run"))
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no run 'zzzzzzz1'" in done.stderr


def test_without_a_lifeline_it_follows_its_parent_and_leads_its_own_group(tmp_path: Path) -> None:
    """As under torchrun: signals for the group of the parent reach it through the parent alone."""
    code = (
        "import json, os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', '''\n"
        "import os, time\n"
        "from hearth.parallel.launch.start import prepare\n"
        "prepare({})\n"
        "print(os.getpid(), os.getpgid(0), flush=True)\n"
        "time.sleep(60)\n"
        "'''], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)\n"
        "print(child.stdout.readline(), end='', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, group = map(int, parent.stdout.readline().split())
    assert pid == group
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10.0
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)
