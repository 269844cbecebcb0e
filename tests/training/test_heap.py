"""Freed memory stays with the process while it trains, and only then."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from hearth.training.heap import _glibc, kept_heap

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or _glibc() is None, reason="this system's heap is another one"
)

# In a process of its own, whose heap nothing else has cut into pieces. A step: 192 MiB, 49,152 pages, in
# blocks that are small enough for the heap.
PROGRAM = """
import json, resource
import torch
from hearth.training.heap import kept_heap

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.full((4 << 20,), 1.0) for _ in range(12)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with kept_heap(torch.device("cpu")):
    within = [faults_of_a_step() for _ in range(3)]
print(json.dumps([within[-1], faults_of_a_step()]))
"""


def test_a_second_step_takes_no_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    within, afterwards = json.loads(done.stdout)
    assert within < 10_000
    # Given back at the end: the pages have to come again.
    assert afterwards > 20_000


def test_a_gpu_leaves_the_heap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hearth.training.heap._glibc", lambda: pytest.fail("the heap was asked for"))
    with kept_heap(torch.device("cuda")):
        pass
