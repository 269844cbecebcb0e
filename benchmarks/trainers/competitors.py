"""Who trains, in which environment, and one measurement: a process that trains a job and leaves its facts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.install import PEERS, is_installed, python_of

# By name: whose folder has its train.py. Hearth comes first in the tables.
PEER_OF = {
    "hearth": "hearth",
    "overhead": "hearth",
    "transformers": "transformers",
    "torch": "transformers",
    "trl-default": "trl",
    "trl-padding": "trl",
    "trl-packing": "trl",
}
TIMEOUT = 900.0


class TrainerFailed(Exception):
    """The process died, or took too long."""


def interpreter(name: str) -> str | None:
    """Of a competitor's environment. transformers may also run in ours, which has it; None where absent."""
    peer = PEER_OF[name]
    if peer == "hearth":
        return sys.executable
    if is_installed(peer):
        return str(python_of(peer))
    if peer == "transformers" and (name == "torch" or importlib.util.find_spec("accelerate")):
        return sys.executable
    return None


def missing(name: str) -> str:
    """How to get a competitor that is not there."""
    return f"{name} is not installed: python benchmarks/peers/install.py {PEER_OF[name]}"


def measure(name: str, job: Path) -> dict[str, Any]:
    """Train a job in a process of its own; its facts. Raises TrainerFailed with its last words."""
    python = interpreter(name)
    assert python is not None, name
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        command = [python, str(PEERS / PEER_OF[name] / "train.py"), str(job), name, str(out)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise TrainerFailed(f"{name} took more than {TIMEOUT:.0f} s") from None
        if done.returncode:
            raise TrainerFailed(f"{name} failed:\n{done.stderr[-3000:]}")
        facts: dict[str, Any] = json.loads(out.read_text())
    return facts
