"""What the integration tests share: the command line as a subprocess, and one small demo for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Shell:
    """Runs `hearth …` as a user would, in ``folder`` with the workspace ``home``."""

    folder: Path
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "HEARTH_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}

    def run(
        self, *arguments: str, code: int | None = 0, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "hearth", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
        )
        if code is not None:
            assert result.returncode == code, f"{arguments} -> {result.returncode}\n{result.stderr[-3000:]}"
        return result

    def json(self, *arguments: str, **options: Any) -> Any:
        return json.loads(self.run(*arguments, "--json", **options).stdout)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell with an empty workspace."""
    return Shell(tmp_path, tmp_path / "workspace")


@pytest.fixture(scope="session")
def demo_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shell, dict[str, Any]]:
    """The real demo at a tiny budget, run once; its shell and its report."""
    folder = tmp_path_factory.mktemp("demo")
    shell = Shell(folder, folder / "workspace")
    return shell, shell.json("demo", "--minutes", "0.1", timeout=900)
