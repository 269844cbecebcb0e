"""Main loop of a worker process: read a call from standard input, write its result to standard output.

Ends when its input ends, so it never outlives the process that started it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

from hearth.data.process import BatchProcessor
from hearth.data.workers import read_frame, write_frame
from hearth.errors import HearthError


def main() -> None:
    """Serve calls until the pipe closes."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inputs = os.fdopen(os.dup(0), "rb")
    outputs = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up among the frames
    processor: BatchProcessor | None = None
    while True:
        try:
            method, args = read_frame(inputs)
        except EOFError:
            return
        try:
            if method == "start":
                processor, value = BatchProcessor(*args), None
            else:
                value = getattr(processor, method)(*args)
            reply: tuple[bool, object] = (True, value)
        except HearthError as error:
            reply = (False, error)
        except Exception:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            reply = (False, HearthError(f"a worker process failed:\n{traceback.format_exc()}"))
        try:
            write_frame(outputs, reply)
        except BrokenPipeError:
            os._exit(1)  # the parent is gone; flushing at exit would only fail again


if __name__ == "__main__":
    main()
    sys.exit(0)
