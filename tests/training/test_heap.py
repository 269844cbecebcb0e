"""Freed memory stays with the process while it trains, and only then."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from hearth.training.heap import _glibc, kept_heap

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or _glibc() is None, reason="this system's heap is another one"
)


def faults_of_a_step() -> int:
    """Page faults of allocating, filling and freeing 192 MiB, 49,152 pages, in blocks that fit into the heap."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.full((4 << 20,), 1.0) for _ in range(12)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_second_step_takes_no_new_pages() -> None:
    with kept_heap(torch.device("cpu")):
        faults_of_a_step()
        assert faults_of_a_step() < 10_000  # some of the blocks may find no gap
    # Given back at the end: the pages have to come again.
    assert faults_of_a_step() > 40_000


def test_a_gpu_leaves_the_heap_alone() -> None:
    with kept_heap(torch.device("cuda")):
        pass
