"""`hearth data` as a user types it: the real command line in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def hearth(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hearth", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1"},
    )


@pytest.fixture
def project(tmp_path: Path, workspace_dir: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "texts").mkdir(parents=True)
    for number in range(30):
        text = f"Document {number}.\n\n" + "some words to learn " * number
        (folder / "texts" / f"{number:02d}.txt").write_text(text)
    (folder / "recipe.yaml").write_text(
        "data:\n  sources:\n    - path: texts\n  validation_fraction: 0.2\ntokenizer:\n  vocab_size: 300\n"
    )
    return folder


def test_prepare_inspect_stats(project: Path, workspace_dir: Path) -> None:
    made = hearth("data", "prepare", "recipe.yaml", "--json", cwd=project)
    assert made.returncode == 0, made.stderr
    summary = json.loads(made.stdout)
    assert not summary["reused"]
    assert Path(summary["path"]).parent == workspace_dir / "datasets"
    assert summary["fingerprint"].startswith(Path(summary["path"]).name)
    assert set(summary["stages"]) == {"read", "filter", "tokenizer", "tokenize"}
    documents = sum(split["documents"] for split in summary["splits"].values())
    assert documents == 30

    again = hearth("data", "prepare", "recipe.yaml", cwd=project)
    assert again.returncode == 0
    assert "the dataset is reused" in again.stderr
    assert summary["path"] in again.stdout.replace("\n", "")

    name = Path(summary["path"]).name
    stats = hearth("data", "stats", name[:8], "--json", "--verify", cwd=project)
    assert stats.returncode == 0, stats.stderr
    assert json.loads(stats.stdout)["lengths"]["train"]["rows"] >= 1
    assert json.loads(stats.stdout)["verified"]

    shown = hearth("data", "inspect", summary["path"], "--id", "07.txt", cwd=project)
    assert shown.stdout == (project / "texts" / "07.txt").read_text() + "\n"
    assert "id 07.txt" in shown.stderr

    row = hearth("data", "inspect", name, "--row", "0", "--masks", "--sequence-length", "64", cwd=project)
    assert row.returncode == 0, row.stderr
    assert "segment 0: " in row.stderr
    assert row.stderr.splitlines()[-1] == "row 0 of 23: 64 tokens, 0 padding"

    lineage = hearth("lineage", f"dataset:{summary['fingerprint']}", "--json", cwd=project)
    assert lineage.returncode == 0, lineage.stderr
    assert "texts@" in lineage.stdout


def test_masks_bracket_what_counts(project: Path) -> None:
    rows = [{"q": f"What is {n}?", "a": f"A number, {n}."} for n in range(20)]
    (project / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "chat.yaml").write_text(
        "data:\n  sources:\n    - {path: chat.jsonl, prompt_field: q, response_field: a}\n"
        "tokenizer: {vocab_size: 300}\n"
    )
    assert hearth("data", "prepare", "chat.yaml", "--name", "talks", cwd=project).returncode == 0
    shown = hearth("data", "inspect", "talks", "--id", "chat.jsonl:4", "--masks", cwd=project)
    assert "<|im_start|>assistant\n[A number, 3.<|im_end|>]\n" in shown.stdout
    stats = hearth("data", "stats", "talks", cwd=project)
    assert "counted in the loss" in stats.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("prepare", "recipe.yaml", "data.sources=[{path: nowhere}]"), "no such file or folder"),
        (("prepare", "recipe.yaml", "data.filters.min_chars=99999"), "empty after filtering"),
        (("prepare", "missing.yaml"), "missing.yaml"),
        (("prepare", "recipe.yaml", "--name", "a/b"), "not a plain name"),
        (("stats", "nothing"), "no dataset nothing"),
        (("stats", "texts"), "manifest.json is missing"),
        (("inspect", "nothing", "--doc", "1", "--row", "1"), "one of --doc, --id and --row"),
    ],
)
def test_wrong_input_exits_2_with_a_message(
    project: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    result = hearth("data", *arguments, cwd=project)
    assert result.returncode == 2, result.stderr
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_skipped_files_are_reported(project: Path) -> None:
    (project / "texts" / "photo.txt").write_bytes(b"\x89PNG\x00\x01")
    result = hearth("data", "prepare", "recipe.yaml", cwd=project)
    assert result.returncode == 0
    assert "skipped 1 as binary" in result.stderr
    assert "photo.txt" in result.stderr
    strict = hearth("data", "prepare", "recipe.yaml", "data.on_bad_file=fail", cwd=project)
    assert strict.returncode == 2
    assert "photo.txt is a binary file (byte 0x00 at offset 4)" in strict.stderr


def test_help_loads_no_torch(project: Path) -> None:
    code = (
        "import sys; from hearth.cli.main import cli; "
        "cli.main(['data', 'prepare', '--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
