"""The programs of docs/engine.md, run as they stand on a real small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hearth.models.llama2c import import_llama2c

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_programs_run(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared_data / "stories260K"
    import_llama2c(folder / "stories260K.bin", folder / "tok512.bin", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    programs = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(programs) == 3
    for program in programs:
        exec(compile(program, "docs/engine.md", "exec"), names)
