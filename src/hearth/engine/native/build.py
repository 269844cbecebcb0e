"""Compile the C++ kernels beside this file with the user's compiler, once, and load them.

All ``*.cpp`` here become one shared object in the user's cache, named by a hash of everything that decides
its content: sources, flags, compiler and CPU. OpenMP's functions are not linked but found at load in the
runtime that torch brought along, so that torch and these kernels share one pool of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hearth.engine.caching import cache_folder
from hearth.errors import ConfigError

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
NEEDED_CPU_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")
_ISA_NUMBERS = {"": 0, "avx512": 1, "amx": 2}
_COMPILE_SECONDS = 300.0


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded kernels. ``isa`` is "amx" or "avx512": which of the two forms of each kernel is in use."""

    path: Path
    isa: str
    functions: ctypes.CDLL


class _Unavailable(Exception):
    """Why there are no compiled kernels here."""


def library() -> NativeLibrary | None:
    """The compiled kernels, compiled now if they are not in the cache; None if they cannot be had.

    ``HEARTH_NATIVE=0`` in the environment switches them off, ``HEARTH_NATIVE_ISA=avx512`` makes them leave
    AMX alone (another value raises `ConfigError`). The answer is kept for the life of the process.
    """
    return _outcome()[0]


def why_not() -> str:
    """Why `library` returned None; empty if it did not."""
    return _outcome()[1]


@functools.cache
def _outcome() -> tuple[NativeLibrary | None, str]:
    try:
        return _load(), ""
    except _Unavailable as error:
        logger.info("no compiled kernels: %s", error)
        return None, str(error)


def _load() -> NativeLibrary:
    if os.environ.get("HEARTH_NATIVE", "") == "0":
        raise _Unavailable("switched off by HEARTH_NATIVE=0")
    isa = os.environ.get("HEARTH_NATIVE_ISA", "")
    if isa not in _ISA_NUMBERS:
        raise ConfigError(f"HEARTH_NATIVE_ISA is {isa!r}", fix="use avx512 or amx, or leave it unset")
    cpu_flags = _cpu_flags()
    missing = [flag for flag in NEEDED_CPU_FLAGS if flag not in cpu_flags]
    if missing:
        raise _Unavailable(f"the CPU has no {', '.join(missing)}")
    openmp = _openmp_runtime()
    path = build(_compiler(), cpu_flags)
    try:
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unavailable(f"{path} cannot be loaded: {error}") from error
    chosen = functions.hearth_init(_ISA_NUMBERS[isa])
    return NativeLibrary(path, "amx" if chosen == _ISA_NUMBERS["amx"] else "avx512", functions)


def _cpu_flags() -> tuple[str, ...]:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise _Unavailable(
            f"they are written for Linux on x86-64, not {platform.system()} {platform.machine()}"
        )
    with Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("flags"):
                return tuple(sorted(line.partition(":")[2].split()))
    raise _Unavailable("/proc/cpuinfo lists no CPU flags")


def _openmp_runtime() -> Path:
    """The OpenMP library that torch uses in this process."""
    import torch

    home = Path(torch.__file__).parent
    maps = Path("/proc/self/maps").read_text(errors="replace")
    mapped = {Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines()}
    loaded = {path for path in mapped if path.name.startswith(("libgomp", "libiomp5", "libomp"))}
    # Other packages bring runtimes of their own; torch's lies with it (or, if built by hand, anywhere).
    candidates = sorted(loaded, key=lambda path: (home not in path.parents, str(path)))
    if not candidates:
        raise _Unavailable("torch was built without OpenMP")
    return candidates[0]


def _compiler() -> list[str]:
    """The compiler's command line: $CXX, else the first of g++ and clang++."""
    command = shlex.split(os.environ.get("CXX", "")) or [c for c in ("g++", "clang++") if shutil.which(c)][:1]
    if not command or not shutil.which(command[0]):
        raise _Unavailable(f"no C++ compiler ({command[0] if command else 'g++, clang++'}) on the PATH")
    return command


def build(compiler: list[str], cpu_flags: tuple[str, ...]) -> Path:
    """The shared object for this compiler and CPU, from the cache or compiled now; raises `_Unavailable`."""
    name = f"hearth-{_fingerprint(compiler, cpu_flags)}.so"
    try:
        path = cache_folder("native") / name
        if path.exists():
            return path
        with _one_at_a_time(path.parent):
            if not path.exists():
                started = time.perf_counter()
                logger.warning("compiling the CPU kernels, once (with %s) …", compiler[0])
                _compile(compiler, path)
                logger.info("compiled %s in %.1f s", path, time.perf_counter() - started)
    except OSError as error:  # a full disk, or no folder at all that can be written
        raise _Unavailable(f"no room for compiled kernels: {error}") from error
    return path


def _fingerprint(compiler: list[str], cpu_flags: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for source in sorted(SOURCE_FOLDER.glob("*.[ch]*")):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = _run([*compiler, "--version"])
    digest.update("\0".join([*compiler, version, *FLAGS, *cpu_flags]).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process compile and others wait for it. Where locks do not work (some network drives), all
    compile, which is slower and as right: the result appears by a rename."""
    with (folder / "lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        sources = sorted(SOURCE_FOLDER.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, *FLAGS, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / path.name
        _run([*compiler, "-shared", *map(str, objects), "-o", str(linked)])
        linked.replace(path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"{command[0]} failed: {error}") from error
    if done.returncode:
        raise _Unavailable(f"`{shlex.join(command)}` failed: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(stderr: str) -> str:
    lines = stderr.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line), lines[0])
