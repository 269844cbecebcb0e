"""`--on slurm`: a batch script that saves before its time is over, and queues itself again."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from hearth.errors import ConfigError, TrainingError
from hearth.parallel.launch.backend import JobStatus, Submitted, Watch, run_tool
from hearth.parallel.launch.jobs import Job
from hearth.parallel.launch.local import parse_number, require_recipe
from hearth.parallel.launch.spec import JobSpec, Rendered, State
from hearth.parallel.launch.torchrun import SAVE_SECONDS, torchrun_arguments, torchrun_variables

_FIX = "run this where Slurm's commands are (a login node), or use --dry-run and submit the script yourself"
_STATES: Mapping[str, State] = {
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_HOLD": "pending",
    "SUSPENDED": "pending",
    "RUNNING": "running",
    "COMPLETING": "running",
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
    "PREEMPTED": "interrupted",
    "FAILED": "failed",
    "TIMEOUT": "failed",
    "NODE_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
}
# Options that become a line of their own.
_LINES = {"partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint"}
# The step ids of a job that was queued again begin anew; ports of one are not taken up by the next at once.
_BODY = """\
set -u
{exports}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${{nodes%%$'\\n'*}}
MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * ${{SLURM_RESTART_COUNT:-0}}) % 10000))
echo "start ${{SLURM_RESTART_COUNT:-0}} of job $SLURM_JOB_ID on" $nodes

why=
# Only this script gets the signals; srun hands TERM to torchrun, and torchrun to its processes, which save.
pass_on() {{
  why=$1
  echo "$why: asking the processes to save"
  scancel --signal=TERM "$SLURM_JOB_ID.0"
}}
trap 'pass_on time' USR1
trap 'pass_on cancelled' TERM

srun --kill-on-bad-exit=0 {command} &
step=$!
while kill -0 "$step" 2>/dev/null; do
  wait "$step"  # which a signal ends, not the step
done
wait "$step"
code=$?
{requeue}exit "$code"
"""
_REQUEUE = """\
if [ "$why" = time ] && [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
  echo "time is over: the job is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
"""


class SlurmBackend:
    """One task a node, each with torchrun for the processes of the node."""

    name: ClassVar[str] = "slurm"
    UNUSED: ClassVar[frozenset[str]] = frozenset(("--image",))
    WORKSPACE: ClassVar[str | None] = None
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "partition": "Slurm's partition",
        "account": "the account to charge",
        "qos": "quality of service",
        "constraint": "features that nodes must have",
        "save-seconds": f"seconds before the time limit at which the run begins to save ({SAVE_SECONDS})",
        "setup": "a shell command before the start, such as 'module load cuda'",
        "python": "the Python of the nodes (this one)",
    }

    def render(self, spec: JobSpec) -> Rendered:
        """The batch script."""
        script = "\n".join(["#!/bin/bash", *self._headers(spec), "", self._body(spec)])
        path = f"{spec.job_dir}/rendered/job.sbatch"
        return Rendered({"job.sbatch": script}, (("sbatch", "--parsable", path),))

    def validate(self, spec: JobSpec, rendered: Rendered) -> list[str]:
        """The recipe loads, and bash can parse the script. What a cluster allows, only sbatch knows."""
        checked = require_recipe(spec)
        if shutil.which("bash") is None:
            return [*checked, "the script was not checked: there is no bash here"]
        script = rendered.files["job.sbatch"]
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"bash does not take the script: {done.stderr.strip()}")
        return [*checked, "bash -n takes the script"]

    def submit(self, spec: JobSpec, rendered: Rendered, watch: Watch) -> Submitted:  # noqa: ARG002
        """sbatch; returns at once."""
        printed = run_tool(rendered.commands[0], what="submitting to Slurm", fix=_FIX)
        job_id = printed.strip().split(";")[0]
        if not job_id.isdecimal():
            raise TrainingError(f"sbatch answered {printed.strip()!r} and no job id")
        return Submitted({"slurm_job": job_id})

    def status(self, job: Job) -> JobStatus:
        """From scontrol, or from sacct once Slurm's controller has forgotten the job."""
        job_id = job.require_handle("slurm_job")
        try:
            shown = run_tool(["scontrol", "--oneliner", "show", "job", job_id], what="asking Slurm", fix=_FIX)
        except TrainingError:
            return self._accounted(job_id)
        fields = dict(re.findall(r"(\w+)=(\S*)", shown))
        word = fields.get("JobState", "")
        detail = f"Slurm job {job_id}: {word}"
        if fields.get("Reason", "None") != "None":
            detail += f" ({fields['Reason']})"
        if fields.get("Restarts", "0") != "0":
            detail += f", queued again {fields['Restarts']} times"
        return JobStatus(_STATES.get(word, "unknown"), detail)

    def logs(self, job: Job) -> Iterator[str]:
        """The script's output, of all its starts."""
        path = Path(job.spec.job_dir) / f"slurm-{job.require_handle('slurm_job')}.log"
        if not path.is_file():
            yield f"nothing yet: {path} is not there"
            return
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()

    def cancel(self, job: Job) -> str:
        """A job that runs saves first; it is not queued again."""
        job_id = job.require_handle("slurm_job")
        if self.status(job).state != "running":
            run_tool(["scancel", job_id], what="cancelling", fix=_FIX)
            return f"cancelled Slurm job {job_id}"
        run_tool(["scancel", "--batch", "--signal=TERM", job_id], what="cancelling", fix=_FIX)
        return f"asked Slurm job {job_id} to save and end; `scancel {job_id}` ends it at once"

    def _accounted(self, job_id: str) -> JobStatus:
        if shutil.which("sacct") is None:
            return JobStatus("unknown", f"Slurm does not know job {job_id} any more, and there is no sacct")
        command = ["sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State"]
        try:
            words = run_tool(command, what="asking sacct", fix=_FIX).split()
        except TrainingError as error:
            return JobStatus("unknown", f"Slurm does not know job {job_id} any more: {error.message}")
        return JobStatus(_STATES.get(words[0], "unknown") if words else "unknown", f"Slurm job {job_id}")

    def _headers(self, spec: JobSpec) -> list[str]:
        resources = spec.resources
        lines = [
            f"--job-name={spec.name}",
            f"--nodes={spec.nodes}",
            "--ntasks-per-node=1",
            f"--output={spec.job_dir}/slurm-%j.log",
            "--open-mode=append",
            "--requeue" if spec.requeue else "--no-requeue",
        ]
        if resources.cpus is not None:
            lines.append(f"--cpus-per-task={resources.cpus}")
        if resources.memory is not None:
            lines.append(f"--mem={resources.memory}M")
        if resources.gpus:
            lines.append(f"--gpus-per-node={resources.gpus}")
        if spec.time_limit is not None:
            lines.append(f"--time={_slurm_time(spec.time_limit)}")
            lines.append(f"--signal=B:USR1@{self._save_seconds(spec)}")
        for option, flag in _LINES.items():
            if (value := spec.option(option)) is not None:
                if not re.fullmatch(r"[\w.,&|()*\[\]-]+", value):
                    raise ConfigError(f"--option {option}={value!r} is no word", fix="give a plain name")
                lines.append(f"--{flag}={value}")
        if any(re.search(r"\s", line) for line in lines):
            raise ConfigError(
                f"the workspace {spec.workspace!r} has a space in it, which #SBATCH lines cannot hold",
                fix="choose another folder with HEARTH_HOME",
            )
        return [f"#SBATCH {line}" for line in lines]

    def _body(self, spec: JobSpec) -> str:
        variables = {**torchrun_variables(self._save_seconds(spec)), **spec.variables()}
        exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
        if (setup := spec.option("setup")) is not None:
            exports.append(setup)
        arguments = torchrun_arguments(spec, endpoint="@ENDPOINT@")
        python = spec.option("python") or sys.executable
        command = shlex.join([python, "-m", "torch.distributed.run", *arguments])
        command = command.replace("@ENDPOINT@", '"$MASTER_ADDR:$MASTER_PORT"')
        return _BODY.format(
            exports="\n".join(exports), command=command, requeue=_REQUEUE if spec.requeue else ""
        )

    def _save_seconds(self, spec: JobSpec) -> int:
        seconds = int(parse_number(spec.option("save-seconds") or str(SAVE_SECONDS), "save-seconds", int))
        if spec.time_limit is not None and seconds >= spec.time_limit:
            raise ConfigError(
                f"--time-limit is {spec.time_limit} s, of which the last {seconds} are for saving",
                fix="raise --time-limit, or lower --option save-seconds=N",
            )
        return seconds


def _slurm_time(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3_600)
    return f"{days}-{hours:02}:{rest // 60:02}:{rest % 60:02}"
