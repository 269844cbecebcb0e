"""`hearth doctor`: what this machine has, what Hearth will use, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import error_console, print_json, print_table
from hearth.errors import HearthError

if TYPE_CHECKING:
    from hearth.engine.native import NativeLibrary

PACKAGES = ("hearth-lm", "torch", "transformers", "tokenizers", "peft", "numba", "sqlalchemy", "openai")
OPTIONAL = {
    "psycopg": ("a workspace on Postgres", "pip install 'hearth-lm[postgres]'"),
    "zstandard": (".zst sources", "pip install 'hearth-lm[zstd]'"),
}
_ISA = {"amx": "AMX and AVX512-BF16", "avx512": "AVX512-BF16"}
NEEDED_FREE_BYTES = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``status`` is ok, note or missing; ``fix`` says what to do about it."""

    status: str
    subject: str
    detail: str
    fix: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@click.option("--quick", is_flag=True, help="Do not measure memory bandwidth and matrix rates.")
def doctor(as_json: bool, quick: bool) -> None:
    """Say what this machine has, what Hearth will use, and what is missing."""
    with error_console().status("looking at this machine"):
        report = examine(measure=not quick)
    if as_json:
        print_json(report)
        return
    for section in ("machine", "measured", "versions", "hearth will use"):
        if report[section]:
            print_table((section, ""), report[section].items())
            click.echo()
    rows = [(item["status"], item["subject"], item["detail"], item["fix"]) for item in report["findings"]]
    print_table(("check", "what", "", "fix"), rows)


def examine(*, measure: bool = True) -> dict[str, Any]:
    """The whole report as plain data."""
    from hearth.telemetry.hardware import find_hardware
    from hearth.workspace.workspace import workspace_root

    hardware = find_hardware()
    gpus = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in hardware.gpus)
    home = workspace_root()
    free = shutil.disk_usage(_nearest_existing(home)).free
    return {
        "machine": {
            "processor": hardware.cpu,
            "cores for this process": hardware.num_cores,
            "CPU features": " ".join(hardware.features) or "none that Hearth looks for",
            "memory": f"{hardware.memory_bytes / 2**30:.1f} GiB",
            "GPUs": gpus or "none",
            "system": hardware.system,
            "free disk for the workspace": f"{free / 2**30:.1f} GiB at {home}",
        },
        "measured": measure_rates() if measure else {},
        "versions": {name: _version(name) for name in PACKAGES},
        "hearth will use": choices(),
        "findings": [asdict(finding) for finding in findings(free, home, num_gpus=len(hardware.gpus))],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def measure_rates() -> dict[str, str]:
    """Memory reads and matrix products of this machine, each the best of a few short tries."""
    import torch

    rates = {}
    block = torch.ones(64 << 20)  # 256 MiB: larger than any cache
    seconds = _best_seconds(lambda: block.sum())
    rates["memory reads"] = f"{block.nbytes / seconds / 1e9:.1f} GB/s"
    for dtype in (torch.float32, torch.bfloat16):
        size = 1024
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        seconds = _best_seconds(lambda left=left, right=right: left @ right)
        name = str(dtype).removeprefix("torch.")
        rates[f"{name} matrix products, CPU"] = f"{2 * size**3 / seconds / 1e9:.0f} GFLOP/s"
    return rates


def _best_seconds(work: Any, tries: int = 7) -> float:
    work()
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def choices() -> dict[str, str]:
    """What Hearth picks on this machine by itself."""
    import torch

    from hearth.training import choose_device, choose_precision

    device = choose_device().type
    return {
        "device": device,
        "training precision (auto)": choose_precision("auto", device),
        **_serving_choices(device),
        "threads": str(torch.get_num_threads()),
    }


def _serving_choices(device: str) -> dict[str, str]:
    """How the engine computes on ``device``; compiles its kernels if that has not been done yet."""
    if device != "cpu":
        return {"attention when serving": "Triton kernels, torch where they cannot"}
    kernels, problem = native_kernels()
    other = "numba kernels" if importlib.util.find_spec("numba") is not None else "torch"
    return {
        "compiled kernels": problem if kernels is None else f"{_ISA[kernels.isa]}, for bfloat16",
        "attention when serving": other if kernels is None else f"compiled in bfloat16, otherwise {other}",
    }


def native_kernels() -> tuple[NativeLibrary | None, str]:
    """The compiled kernels, or None and why they are not in use."""
    from hearth.engine.native import library, why_not

    try:
        return library(), why_not()
    except HearthError as error:  # a value in the environment
        return None, str(error)


def _about_kernels() -> list[Finding]:
    """The C++ compiler, and whether the engine's kernels are in use."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        detail = "none; the engine's kernels and train.compile on a CPU need one"
        return [Finding("note", "C++ compiler", detail, "install g++")]
    kernels, problem = native_kernels()
    if kernels is not None:
        return [
            Finding("ok", "C++ compiler", compiler),
            Finding("ok", "compiled kernels", str(kernels.path)),
        ]
    # A processor without these instructions is no fault; what else keeps them away can be mended.
    fix = "" if "CPU has no" in problem or "written for" in problem else "mend that, or serve more slowly"
    return [
        Finding("ok", "C++ compiler", compiler),
        Finding("note", "compiled kernels", f"not in use: {problem}", fix),
    ]


def findings(free_bytes: int, home: Path, *, num_gpus: int) -> list[Finding]:
    """The checks, each with its fix."""
    import torch

    result = []
    if free_bytes < NEEDED_FREE_BYTES:
        detail = f"{free_bytes / 2**30:.1f} GiB free at {home}"
        result.append(
            Finding("missing", "disk", detail, "free some space, or set HEARTH_HOME to another disk")
        )
    else:
        result.append(Finding("ok", "disk", f"{free_bytes / 2**30:.0f} GiB free"))
    nearest = _nearest_existing(home)
    problem = (
        "not a folder" if not nearest.is_dir() else "" if os.access(nearest, os.W_OK) else "not writable"
    )
    result.append(
        Finding("missing", "workspace", f"{nearest} is {problem}", "set HEARTH_HOME to a folder of yours")
        if problem
        else Finding("ok", "workspace", f"{home} is writable")
    )
    if num_gpus and not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        detail = f"the driver shows {num_gpus}, but this torch, built for {build}, cannot use any"
        fix = "install a torch built for a CUDA version that the driver knows (`nvidia-smi` shows it)"
        result.append(Finding("missing", "GPU", detail, fix))
    if not torch.cuda.is_available() and importlib.util.find_spec("numba") is None:
        detail = "attention on the CPU runs in torch, which is slower"
        result.append(Finding("note", "numba", detail, "pip install numba"))
    result += _about_kernels()
    for module, (purpose, fix) in OPTIONAL.items():
        present = importlib.util.find_spec(module) is not None
        detail = f"for {purpose}"
        result.append(Finding("ok", module, detail) if present else Finding("note", module, detail, fix))
    return result
