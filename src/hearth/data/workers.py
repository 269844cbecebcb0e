"""A pool of worker processes with results in the order of the tasks.

Workers are plain child processes that run ``hearth.data.worker`` and talk over their pipes. Unlike
``multiprocessing`` with spawn or forkserver they never import the caller's main module, so a training script
that imports torch does not make every tokenising process load it, and needs no ``__name__`` guard. They run
with the Rust threads of tokenizers off: processes times threads is slower than either.
"""

from __future__ import annotations

import os
import pickle
import queue
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Self

from hearth.data.process import BatchProcessor, ProcessOptions
from hearth.errors import HearthError

_LENGTH = struct.Struct("<Q")
TASKS_PER_WORKER = 2  # one at work, one waiting: enough to hide the pipe, few enough to bound memory


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_frame(stream: IO[bytes], value: Any) -> None:
    """Send one object through a pipe."""
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any:
    """Receive one object; EOFError when the other side is gone."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(header)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)  # noqa: S301 - from our own child process, over its own pipe


class _Worker:
    """One child process."""

    def __init__(self, options: ProcessOptions) -> None:
        package_parent = str(Path(__file__).resolve().parents[2])
        environment = dict(os.environ)
        environment["TOKENIZERS_PARALLELISM"] = "false"
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [package_parent, environment.get("PYTHONPATH")])
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hearth.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.call("start", options)

    def call(self, method: str, *args: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            write_frame(self.process.stdin, (method, args))
            ok, value = read_frame(self.process.stdout)
        except (EOFError, OSError, ValueError) as error:
            code = self.process.poll()
            how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise HearthError(
                f"a worker process died while preparing the data ({how})",
                fix="the usual cause is too little memory: set data.num_workers to fewer processes",
            ) from error
        if not ok:
            raise value
        return value

    def close(self, *, kill: bool) -> None:
        if kill:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                continue  # the child went away with data unread
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class WorkerPool:
    """Runs methods of ``BatchProcessor``. With one worker the work is done in this process."""

    def __init__(self, num_workers: int, options: ProcessOptions) -> None:
        self.num_workers = num_workers
        self._local = BatchProcessor(options) if num_workers == 1 else None
        self._workers: list[_Worker] = []
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._executor: ThreadPoolExecutor | None = None
        if self._local is None:
            self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="hearth-data")
            try:
                for worker in self._executor.map(_Worker, [options] * num_workers):
                    self._workers.append(worker)
                    self._free.put(worker)
            except BaseException:
                self._close(kill=True)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._close(kill=kind is not None)

    def broadcast(self, method: str, *args: Any) -> None:
        """Call a method in every worker; none may be at work."""
        if self._local is not None:
            getattr(self._local, method)(*args)
        for worker in self._workers:
            worker.call(method, *args)

    def map(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in the order of the tasks, which are drawn as they are needed."""
        if self._local is not None:
            call = getattr(self._local, method)
            for arguments in tasks:
                yield call(*arguments)
            return
        assert self._executor is not None
        waiting: deque[Future[Any]] = deque()
        for arguments in tasks:
            waiting.append(self._executor.submit(self._run, method, arguments))
            if len(waiting) >= TASKS_PER_WORKER * self.num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _run(self, method: str, arguments: tuple[Any, ...]) -> Any:
        worker = self._free.get()
        try:
            return worker.call(method, *arguments)
        finally:
            self._free.put(worker)

    def _close(self, *, kill: bool) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close(kill=kill)
        if self._executor is not None:
            self._executor.shutdown(wait=True)
