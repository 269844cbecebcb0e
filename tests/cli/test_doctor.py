"""`hearth doctor` tells what is there and what is not."""

from __future__ import annotations

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
    found = doctor.findings(free_bytes=1 << 20, home=tmp_path)
    assert {item.subject for item in found if item.status == "missing"} == {"disk"}
    assert {item.subject for item in found if item.status == "note"} == {"C++ compiler", *doctor.OPTIONAL}
    assert all(item.fix for item in found if item.status != "ok")
