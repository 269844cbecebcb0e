"""A process of a job, without torch: steps together with the others, heartbeats, checkpoints.

It misbehaves on order: WHAT:RANK:STEP happens once, always-WHAT:RANK:STEP at every start.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hearth.parallel.health.heartbeat import Heartbeat, read_run, write_atomically
from hearth.parallel.launch.start import prepare

STEPS, EVERY, STEP_SECONDS = 30, 5, 0.03

prepare(os.environ)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
job_dir = Path(os.environ["HEARTH_JOB_DIR"])
run_dir = job_dir / "run"
run_dir.mkdir(exist_ok=True)
found = read_run(job_dir)
first = int((run_dir / "latest").read_text()) if found is not None and found.has_checkpoint else 0
orders = [order.split(":") for order in sys.argv[1:] if order.count(":") == 2]
is_impatient = any(what == "impatient" and int(who) == rank for what, who, _at in orders)
stopping: list[int] = []
agreed = job_dir / f"stop-{os.environ['MASTER_PORT']}"  # the step after which all stop
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))


def say(text: str) -> None:
    """A whole line at once: processes under torchrun write into one pipe."""
    os.write(1, f"{text}\n".encode())


def reached(step: int) -> Path:
    return job_dir / f"start-{os.environ['MASTER_PORT']}-step-{step}"


def together(step: int) -> None:
    """Wait until all are at this step, as in a collective."""
    with reached(step).open("a") as file:
        file.write("x")
    begun = time.monotonic()
    while len(reached(step).read_text()) < size:
        time.sleep(0.005)
        if is_impatient and time.monotonic() - begun > 1.0:
            raise RuntimeError(
                f"rank {rank} of {size} lost a process in step {step}: Timed out waiting 1000ms"
            )


def misbehave(what: str) -> None:
    if what == "raise":
        raise RuntimeError(f"rank {rank} has had enough")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "refuse":
        os._exit(2)
    if what == "port":
        say("RuntimeError: EADDRINUSE, address already in use")
        os._exit(1)
    if what == "hang":
        while True:
            time.sleep(1000)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


def obey(moment: str) -> None:
    for what, who, at in orders:
        once = job_dir / f"was-{what}"
        if int(who) == rank and at == moment and not once.exists():
            if not what.startswith("always-"):
                once.touch()
            misbehave(what.removeprefix("always-"))


say(f"rank {rank} of {size} begins at step {first}")
obey("start")
heart = Heartbeat(run_dir, run_id="r1", rank=rank, interval=0.0)
heart.beat(first, "starting")
# Told to be endless, a job ends in the start after that in which it was told to stop.
endless = any(what == "endless" for what, _who, _at in orders)
last = STEPS if not endless else first + 10 if first else 1_000_000
for step in range(first, last):
    slow = any(what == "slow" and int(who) == rank for what, who, _at in orders)
    seconds = STEP_SECONDS * (4 if slow else 1)
    time.sleep(seconds)
    obey(str(step))
    together(step)
    heart.beat(step + 1, "training", seconds)
    if rank == 0 and (step + 1) % EVERY == 0:
        (run_dir / "latest").write_text(str(step + 1))
    if stopping and not agreed.exists():
        write_atomically(agreed, str(step + 3))  # the others are at most a step ahead
    if agreed.exists() and step + 1 >= int(agreed.read_text()):
        say(f"rank {rank} saved at step {step + 1}")
        (run_dir / "latest").write_text(str(step + 1))
        sys.exit(130)
heart.beat(last, "finishing")
say(f"rank {rank} is done")
