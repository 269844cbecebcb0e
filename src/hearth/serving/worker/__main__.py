"""Start a worker: `python -m hearth.serving.worker --model DIR --uds PATH` (or `--port N`).

Light on purpose: what is heavy is imported once the arguments are known to be sound.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the worker and exit with its code."""
    from hearth.serving.worker.run import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
