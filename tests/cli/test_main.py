"""The one place where errors become messages and exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.workspace import Workspace


@pytest.mark.parametrize("minutes", ["nan", "0.01", "-1", "inf", "soon"])
def test_minutes_that_are_no_budget(hearth: Callable[..., Any], workspace_dir: Path, minutes: str) -> None:
    outcome = hearth("demo", "--minutes", minutes)
    assert outcome.code == 2
    assert minutes in outcome.err
    assert not workspace_dir.exists()


def test_what_the_system_refuses_is_a_message(
    hearth: Callable[..., Any], workspace_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(Workspace, "exists", refuse)
    outcome = hearth("runs", "list")
    assert (outcome.code, outcome.err) == (1, "error: /some/file: Permission denied\n")
    assert "Traceback" in hearth("--debug", "runs", "list").err


def test_a_workspace_that_is_a_file(
    hearth: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a workspace")
    monkeypatch.setenv("HEARTH_HOME", str(tmp_path / "file"))
    outcome = hearth("keys", "create", "someone")
    assert outcome.code == 1
    assert f"cannot create the workspace {tmp_path / 'file'}" in outcome.err
    assert "HEARTH_HOME" in outcome.err
