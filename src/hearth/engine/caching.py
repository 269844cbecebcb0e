"""Where compiled code is kept between runs: a folder that nobody but the user can write."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder for compiled code of this kind, made if needed: the user's cache, else one in the temporary
    directory (a read-only home is common in containers).

    What lies there is run. So a folder that someone else made or may write is never used; without any other,
    the folder is new and lasts for this process only.
    """
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home directory can be determined
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "hearth" / name
        folder.mkdir(parents=True, exist_ok=True)
        if _is_safe(folder):
            return folder
    # One folder a user, not one a process, which nobody would remove.
    folder = Path(tempfile.gettempdir()) / f"hearth-{name}-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_safe(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix=f"hearth-{name}-"))


def _is_safe(folder: Path) -> bool:
    """Whether it is a real directory of this user, writable, and by nobody else."""
    facts = folder.lstat()
    mine = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return mine and os.access(folder, os.W_OK)
