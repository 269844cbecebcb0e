"""`python -m hearth.parallel.launch.start [--resume RUN] [RECIPE] [KEY=VALUE]…`: one process of a job.

It is `hearth train`, with three things before it: the process goes when its parent does, it writes its stacks
when it is asked to, and after a restart it goes on with the run that the job had begun.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hearth.parallel.health.heartbeat import JOB_DIR_VARIABLE, JobRun, read_run
from hearth.parallel.health.stacks import STACKS_VARIABLE, dump_on_signal
from hearth.workspace.lifeline import ask_kernel_to_follow_parent, die_with_parent

LIFELINE_VARIABLE = "HEARTH_LIFELINE"  # "stdin": whoever started this process holds its standard input open


def train_arguments(arguments: Sequence[str], run: JobRun | None) -> list[str]:
    """The arguments of `hearth`: of the first start, or, once there is a checkpoint, to go on from it.

    A job that began with `--resume RUN` goes on with the same words: a start that failed before it had
    written down what they change must not lose it. All processes of a start decide the same: the run is
    written after they have met, so it cannot change between the first that looks and the last.
    """
    if run is not None and run.has_checkpoint and "--resume" not in arguments:
        return ["train", "--resume", run.id]
    return ["train", *arguments]


def prepare(environ: Mapping[str, str]) -> None:
    """Tie this process to its parent and make it answer when it is asked where it is."""
    if environ.get(LIFELINE_VARIABLE) == "stdin":
        die_with_parent()
    else:
        # torchrun passes signals on. In a group of its own this process gets them once, not from the terminal
        # or the scheduler as well: a second one would mean not to save.
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        ask_kernel_to_follow_parent()
    stacks = environ.get(STACKS_VARIABLE)
    if stacks is None and (job_dir := environ.get(JOB_DIR_VARIABLE)):
        stacks = str(Path(job_dir) / "stacks" / f"rank-{environ.get('RANK', '0')}.stacks")
    if stacks is not None:
        with contextlib.suppress(OSError):  # a folder that cannot be written is no reason not to train
            dump_on_signal(Path(stacks))


def main() -> None:
    """Prepare, then become `hearth train`."""
    prepare(os.environ)
    job_dir = os.environ.get(JOB_DIR_VARIABLE)
    run = read_run(Path(job_dir)) if job_dir else None
    sys.argv = ["hearth", *train_arguments(sys.argv[1:], run)]
    runpy.run_module("hearth", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
