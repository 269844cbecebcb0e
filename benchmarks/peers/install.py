"""Install the peers that Hearth is measured beside, each in an environment of its own.

    python benchmarks/peers/install.py                 # all that are missing; llama.cpp compiles for minutes
    python benchmarks/peers/install.py vllm llamacpp   # these

An environment lies in ``benchmarks/peers/NAME/.venv``; it is complete when ``.complete`` exists in it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parent
NAMES = ("transformers", "llamacpp", "vllm", "trl")
# llama-cpp-python reads CMAKE_ARGS; GGML_NATIVE compiles for this processor. Without pip's cache, because a
# wheel in it may have been built with other arguments.
_INCLUDE = shlex.quote(f"-DCMAKE_CXX_FLAGS=-include {PEERS / 'llamacpp' / 'gcc_amx.h'}")
BUILD_ENVIRONMENT = {
    "llamacpp": {"CMAKE_ARGS": f"-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF {_INCLUDE}", "PIP_NO_CACHE_DIR": "1"}
}


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, which need not exist."""
    return PEERS / name / ".venv" / "bin" / "python"


def is_installed(name: str) -> bool:
    """Whether the environment is there and was finished."""
    return (PEERS / name / ".venv" / ".complete").exists()


def install(name: str) -> None:
    """Make the environment and install what its requirement files name; a second call finishes a first."""
    environment = {**os.environ, **BUILD_ENVIRONMENT.get(name, {})}
    python = python_of(name)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS / name / ".venv")], check=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(PEERS / name / "requirements.txt")], check=True, env=environment)
    unresolved = PEERS / name / "unresolved.txt"
    if unresolved.exists():
        subprocess.run([*pip, "--no-deps", "-r", str(unresolved)], check=True, env=environment)
    (PEERS / name / ".venv" / ".complete").touch()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    names = parser.parse_args().names or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    failed = []
    for name in names:
        if is_installed(name):
            print(f"{name}: installed already")
            continue
        print(f"== {name}", flush=True)
        try:
            install(name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
