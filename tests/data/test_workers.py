"""The pool: results in order, errors as they were raised, death noticed."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from hearth.config.recipe import FilterSection
from hearth.data.parse import ParseOptions
from hearth.data.process import ProcessOptions
from hearth.data.sources import RawDocument
from hearth.data.workers import WorkerPool
from hearth.errors import DataError, HearthError

OPTIONS = ProcessOptions(
    sources=(ParseOptions("x", "text", "messages", None, None),),
    filters=FilterSection(),
    fail_on_bad_file=True,
    seed=0,
    control_tokens=(),
)


def batch(number: int, size: int = 10) -> list[RawDocument]:
    return [RawDocument(0, "text", f"{number}", "", b"x" * size + b"%d" % number, "x")]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks(num_workers: int) -> None:
    tasks = (
        (batch(number, 200_000 if number % 5 == 0 else 1), np.ones(1, dtype=np.bool_)) for number in range(40)
    )
    with WorkerPool(num_workers, OPTIONS) as pool:
        texts = [texts[0].lstrip("x") for texts in pool.map("texts", tasks)]
    assert texts == [str(number) for number in range(40)]


def test_tasks_are_drawn_only_as_they_are_needed() -> None:
    drawn = 0

    def tasks():
        nonlocal drawn
        for number in range(1000):
            drawn += 1
            yield (batch(number),)

    with WorkerPool(2, OPTIONS) as pool:
        results = pool.map("scan", tasks())
        next(results)
        assert drawn <= 4


def test_an_input_error_arrives_as_itself() -> None:
    bad = [RawDocument(0, "text", "bad", "", b"\xff", "some/file.txt")]
    with WorkerPool(2, OPTIONS) as pool, pytest.raises(DataError, match=r"some/file\.txt") as caught:
        list(pool.map("scan", [(batch(0),), (bad,)]))
    assert caught.value.fix is not None


def test_a_fault_arrives_with_its_traceback() -> None:
    with WorkerPool(2, OPTIONS) as pool, pytest.raises(HearthError, match="AttributeError"):
        list(pool.map("no_such_method", [()]))


def test_a_dead_worker_is_noticed() -> None:
    with WorkerPool(2, OPTIONS) as pool:
        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
        time.sleep(0.1)
        with pytest.raises(HearthError, match=r"worker process died .*signal 9.*\n.*num_workers"):
            list(pool.map("scan", [(batch(0),)]))
