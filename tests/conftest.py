"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels are tested by its interpreter, which it asks for when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public datasets beside the repository; tests that read it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"public datasets are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def workspace_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is the workspace of this test."""
    root = tmp_path / "workspace"
    monkeypatch.setenv("HEARTH_HOME", str(root))
    monkeypatch.delenv("HEARTH_DATABASE_URL", raising=False)
    return root
