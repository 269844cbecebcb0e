"""`hearth doctor` tells what is there and what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.cli import doctor


def test_report_names_the_machine(hearth: Callable[..., Any], workspace_dir: Path) -> None:
    report = hearth("doctor", "--quick", "--json").json
    assert int(report["machine"]["cores for this process"]) >= 1
    assert report["versions"]["torch"] != "not installed"
    assert report["hearth will use"]["training precision (auto)"] in {"bf16", "fp32"}
    assert {finding["status"] for finding in report["findings"]} <= {"ok", "note", "missing"}
    assert not workspace_dir.exists(), "looking must not make a workspace"


def test_table_is_for_people(hearth: Callable[..., Any], workspace_dir: Path) -> None:
    outcome = hearth("doctor", "--quick")
    assert outcome.code == 0
    for heading in ("machine", "versions", "hearth will use", "check"):
        assert heading in outcome.out


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"HEARTH_NATIVE": "0"}, "switched off by HEARTH_NATIVE=0"),
        ({"HEARTH_NATIVE_ISA": "sse2"}, "HEARTH_NATIVE_ISA is 'sse2'"),
    ],
)
def test_it_says_why_compiled_kernels_are_not_in_use(variables: dict[str, str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hearth", "doctor", "--quick", "--json"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    report = json.loads(done.stdout)
    uses = report["hearth will use"]
    assert uses["device"] == "cpu"  # a GPU is hidden: there they are not asked for
    assert says in uses["compiled kernels"]
    assert uses["attention when serving"] in ("numba kernels", "torch")
    details = {finding["subject"]: finding["detail"] for finding in report["findings"]}
    if "compiled kernels" in details:  # there is a compiler
        assert says in details["compiled kernels"]


def test_compiled_kernels_in_use_are_told() -> None:
    from hearth.engine.native import library

    uses, found = (
        doctor.choices(),
        {finding.subject for finding in doctor.findings(1 << 40, Path(), num_gpus=0)},
    )
    if library() is None or uses["device"] != "cpu":
        pytest.skip("no compiled kernels here")
    assert "AVX512-BF16" in uses["compiled kernels"]
    assert "compiled kernels" in found


def test_rates_are_measured() -> None:
    rates = doctor.measure_rates()
    assert all(float(value.split()[0]) > 0 for value in rates.values())
    assert set(rates) == {
        "memory reads",
        "float32 matrix products, CPU",
        "bfloat16 matrix products, CPU",
    }


def test_what_is_missing_comes_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = doctor.findings(free_bytes=1 << 20, home=tmp_path, num_gpus=1)
    assert {item.subject for item in found if item.status == "missing"} == {"disk", "GPU"}
    notes = {item.subject for item in found if item.status == "note"}
    assert notes == {"C++ compiler", "numba", *doctor.OPTIONAL}
    assert all(item.fix for item in found if item.status != "ok")


def test_a_driver_without_a_gpu_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "GPU" not in {item.subject for item in doctor.findings(1 << 40, tmp_path, num_gpus=0)}


def test_a_workspace_that_cannot_be_one(
    hearth: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HEARTH_HOME", str(tmp_path / "file"))
    findings = hearth("doctor", "--quick", "--json").json["findings"]
    (workspace,) = [finding for finding in findings if finding["subject"] == "workspace"]
    assert workspace["status"] == "missing"
    assert workspace["detail"] == f"{tmp_path / 'file'} is not a folder"
