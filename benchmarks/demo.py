"""The main job's wall time by stage, in a workspace of its own: `hearth demo`, cold and then again.

python benchmarks/demo.py                  # the default demo, at most six minutes, and a second run
python benchmarks/demo.py --minutes 0.1    # a smoke test
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import hardware, write_result


def run_demo(home: str, minutes: float | None) -> dict[str, Any]:
    """One demo as a user starts it; its report and the wall time of the whole command."""
    command = [sys.executable, "-m", "hearth", "demo", "--json"]
    if minutes is not None:
        command += ["--minutes", str(minutes)]
    started = time.perf_counter()
    result = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "HEARTH_HOME": home}
    )
    report: dict[str, Any] = json.loads(result.stdout)
    return report | {"wall_seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="minutes of training; default: the demo's own")
    options = parser.parse_args()
    machine = hardware()
    with tempfile.TemporaryDirectory() as home:
        cold, warm = run_demo(home, options.minutes), run_demo(home, options.minutes)
    print("\n| stage | seconds, first run | seconds, second run |\n|---|---|---|")
    for stage in cold["seconds"]:
        print(f"| {stage} | {cold['seconds'][stage]:.1f} | {warm['seconds'][stage]:.1f} |")
    print(f"| whole command | {cold['wall_seconds']:.1f} | {warm['wall_seconds']:.1f} |")
    print("\n| bits per byte, held-out source files | |\n|---|---|")
    for key in ("model", "xz", "order0"):
        print(f"| {key} | {cold['compression'][f'{key}_bits_per_byte']:.3f} |")
    path = write_result("demo", {"first": cold, "second": warm}, settings=vars(options), machine=machine)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
