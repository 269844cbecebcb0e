"""Compiling and loading the kernels: once, safely, and never fatally."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hearth.engine.native import build, library, why_not

needs_library = pytest.mark.skipif(library() is None, reason=why_not() or "-")

REPORT = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
from hearth.engine.native import library, why_not
native = library()
print("none:" if native is None else native.isa, why_not())
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def report(cache: Path, **environment: str) -> str:
    output, _ = start(cache, **environment).communicate(timeout=120)
    return output


def fake_compiler(folder: Path, body: str) -> str:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@needs_library
@pytest.mark.slow
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(3)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert all(output.splitlines()[-1].strip() in ("amx", "avx512") for output in outputs)
    assert sum("compiling" in output for output in outputs) == 1
    folder = tmp_path / "hearth" / "native"
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]  # the lock and the library
    assert "compiling" not in report(tmp_path)


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    assert report(tmp_path, HEARTH_NATIVE="0") == "none: switched off by HEARTH_NATIVE=0\n"
    assert not (tmp_path / "hearth").exists()


@needs_library
def test_without_a_compiler_the_reason_is_given(tmp_path: Path) -> None:
    assert "no C++ compiler (nothing-like-it) on the PATH" in report(tmp_path, CXX="nothing-like-it")


@needs_library
def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = fake_compiler(
        tmp_path, 'echo "version 1"; case "$*" in *-c*) echo "error: no such thing" >&2; exit 1; esac'
    )
    output = report(tmp_path, CXX=compiler)
    assert output.splitlines()[-1].startswith("none: `")
    assert "failed: error: no such thing" in output
    assert not list((tmp_path / "hearth" / "native").glob("*.so"))
    assert not list((tmp_path / "hearth" / "native").glob("build-*"))


@needs_library
def test_a_library_that_does_not_load_is_no_end(tmp_path: Path) -> None:
    body = 'while [ "$1" ]; do if [ "$1" = -o ]; then echo rubbish > "$2"; fi; shift; done; echo "version 1"'
    output = report(tmp_path, CXX=fake_compiler(tmp_path, body))
    assert output.splitlines()[-1].startswith("none:")
    assert "cannot be loaded" in output


@needs_library
def test_the_instruction_set_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}
    assert report(tmp_path, HEARTH_NATIVE_ISA="avx512", **kept) == "avx512 \n"
    monkeypatch.setenv("HEARTH_NATIVE_ISA", "mmx")
    with pytest.raises(build.ConfigError, match="HEARTH_NATIVE_ISA is 'mmx'"):
        build._load()


def test_a_full_disk_is_no_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", full)
    with pytest.raises(build._Unavailable, match=r"no room for compiled kernels: .*No space left on device"):
        build.build([fake_compiler(tmp_path, 'echo "version 1"')], ("avx512f",))


def test_a_cpu_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEARTH_NATIVE", raising=False)
    monkeypatch.setattr(build, "_cpu_flags", lambda: ("avx512f", "avx2"))
    with pytest.raises(build._Unavailable, match="the CPU has no avx512bw, avx512dq"):
        build._load()


def test_what_decides_the_content_decides_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = [fake_compiler(tmp_path, 'echo "version 1"')]
    name = build._fingerprint(compiler, ("avx512f",))
    assert name == build._fingerprint(compiler, ("avx512f",))
    assert name != build._fingerprint(compiler, ("avx512f", "amx_tile"))
    assert name != build._fingerprint([fake_compiler(tmp_path, 'echo "version 2"')], ("avx512f",))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    assert name != build._fingerprint(compiler, ("avx512f",))
