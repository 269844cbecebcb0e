"""docs/models.md is what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
CENSUS = Path(__file__).parent / "census.py"
REASONS = (
    "state|layers of type|interface|position_ids|several times|encoder-decoder|ALiBi|not causal|looks ahead|"
    "attention takes|of its own|first forward pass|differ from its own|cache"
)


def rows() -> dict[str, tuple[str, str]]:
    """family -> (verdict, reason)."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    return {row[0]: (row[2], row[3]) for row in cells if len(row) == 4 and row[0] not in ("family", "---")}


def test_every_family_has_a_row_and_every_refusal_a_reason() -> None:
    table = rows()
    version = re.search(r"that transformers ([\d.]+) has", PAGE.read_text())
    assert version is not None
    if version[1] == transformers.__version__:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        assert sorted(table) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for family, (verdict, reason) in table.items():
        assert verdict in ("runs", "refused", "not tried"), family
        assert (verdict == "runs") is (not reason), family
        assert verdict != "refused" or re.search(REASONS, reason), (family, reason)
    assert sum(verdict == "runs" for verdict, _ in table.values()) >= 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_table_is_what_the_code_says() -> None:
    """Builds, loads and compares every family; minutes."""
    if f"that transformers {transformers.__version__} has" not in PAGE.read_text():
        pytest.skip("docs/models.md was written with another version of transformers")
    done = subprocess.run([sys.executable, str(CENSUS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
