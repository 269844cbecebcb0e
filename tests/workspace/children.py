"""What the tests run in processes of their own: children.py ROOT DATABASE_URL COMMAND ARGUMENTS…"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hearth.workspace import Workspace


def say(value: object) -> None:
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


def create_versions(workspace: Workspace, name: str, *folders: str) -> None:
    sys.stdin.readline()  # all start at once
    for folder in folders:
        say(workspace.registry.create_version(name, Path(folder)).version)


def log_metrics(workspace: Workspace, run_name: str, count: str) -> None:
    sys.stdin.readline()
    run = workspace.runs.create("train", name=run_name)
    for step in range(int(count)):
        run.log_metrics({"loss": 1.0 / (step + 1), "rate": step}, step=step)
        if step % 50 == 0:
            run.flush()
    run.finish()
    say(run.id)


def open_only(workspace: Workspace) -> None:
    say(workspace.database.shown)


def die_with_a_buffer(workspace: Workspace) -> None:
    run = workspace.runs.create("train", name="dies")
    for step in range(10):
        run.log_metrics({"loss": step}, step=step)
    run.flush()
    run.log_metrics({"loss": 10}, step=10)
    say(run.id)
    os._exit(9)


def run_until_killed(workspace: Workspace) -> None:
    run = workspace.runs.create("train", name="long")
    say(run.id)
    sys.stdin.readline()


def leave_without_finishing(workspace: Workspace) -> None:
    run = workspace.runs.create("train", name="left")
    run.log_metrics({"loss": 1.0}, step=1)
    say(run.id)


if __name__ == "__main__":
    root, database_url, command, *arguments = sys.argv[1:]
    if command == "open_only":
        sys.stdin.readline()
    opened = Workspace.open(root, database_url=database_url, environ={})
    globals()[command](opened, *arguments)
    if command != "leave_without_finishing":
        opened.close()
