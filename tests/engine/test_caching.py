"""Where compiled code is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from hearth.engine.caching import cache_folder


def test_compiled_code_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("kernels") == tmp_path / "hearth" / "kernels"
    assert cache_folder("kernels").is_dir()


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = cache_folder("kernels")
    shared.chmod(0o777)  # somebody else could have put code there
    own = cache_folder("kernels")
    assert own != shared
    assert own.stat().st_mode & 0o777 == 0o700
    assert cache_folder("kernels") == own
    own.chmod(0o777)
    other = cache_folder("kernels")
    assert other not in (own, shared)
    assert other.stat().st_mode & 0o777 == 0o700


def test_without_a_home_the_temporary_directory_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a home that is no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder("kernels").parent == tmp_path
