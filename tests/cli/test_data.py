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
    assert "split train, row 0, num_rows 23, epoch 0, tokens 64, padding 0" in row.stderr.splitlines()

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


def test_inspect_shows_both_parts_of_a_comparison(project: Path) -> None:
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"A number, {n}.", "rejected": "No idea."} for n in range(20)
    ]
    (project / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "pairs.yaml").write_text(
        "data:\n  sources: [{path: pairs.jsonl}]\n  sequence_length: 64\ntokenizer: {vocab_size: 300}\n"
    )
    shown = hearth("data", "inspect", "pairs.yaml", "--id", "pairs.jsonl:4", "--masks", cwd=project)
    assert shown.returncode == 0, shown.stderr
    assert "<|im_start|>assistant\n[A number, 3.<|im_end|>]\n" in shown.stdout
    assert "<|im_start|>assistant\n[No idea.<|im_end|>]\n" in shown.stdout
    assert "chosen: preference" in shown.stderr
    assert "rejected: preference" in shown.stderr
    row = hearth("data", "inspect", "pairs.yaml", "--row", "2", "--json", cwd=project)
    found = json.loads(row.stdout)
    assert (found["kind"], found["row"], found["cut_tokens"]) == ("preference", 2, 0)
    assert [piece["name"] for piece in found["pieces"]] == ["chosen", "rejected"]
    for piece in found["pieces"]:
        counted = "".join(token["text"] for token in piece["tokens"] if token["counted"])
        assert counted.endswith("<|im_end|>")
        assert piece["num_counted"] == sum(token["counted"] for token in piece["tokens"]) > 1
    stats = hearth("data", "stats", found["dataset"], "--json", cwd=project)
    assert json.loads(stats.stdout)["lengths"]["train"]["rows"] > 10
    cut = hearth("data", "inspect", "pairs.yaml", "data.sequence_length=3", "--row", "0", cwd=project)
    assert cut.returncode == 2
    assert "fits into 3 tokens" in cut.stderr


def test_inspect_shows_rows_as_training_reads_them(project: Path) -> None:
    recipe = ("inspect", "recipe.yaml", "data.fim.rate=1", "data.sequence_length=128", "--row", "1")
    rows = [
        json.loads(hearth("data", *recipe, "--json", "--epoch", epoch, cwd=project).stdout)
        for epoch in ("0", "1", "0")
    ]
    assert rows[0] == rows[2] != rows[1]
    assert rows[0]["tokens"] + rows[0]["padding"] == 128
    texts = ["".join(token["text"] for token in piece["tokens"]) for piece in rows[0]["pieces"]]
    assert all("<|fim_prefix|>" in text and "<|fim_middle|>" in text for text in texts)
    assert not rows[0]["pieces"][0]["tokens"][0]["counted"]


def test_masks_are_coloured_in_a_terminal(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from hearth.cli.data_inspect import Piece, _legend, _shaded
    from hearth.data import train_bpe

    tokenizer = train_bpe(["the quick fox"], 300)
    tokens = tokenizer.encode_texts(["fox 🙂\n"])[0]
    piece = Piece("document", "", [*tokens, tokenizer.eos_id], [False] * 2 + [True] * (len(tokens) - 1))
    console = Console(force_terminal=True, color_system="standard", width=200)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with console.capture() as captured:
        console.print(_legend(), _shaded(tokenizer, piece))
    shown = captured.get()
    assert "\x1b[30;42m" in shown  # counts
    assert "🙂" in shown
    assert "\N{REPLACEMENT CHARACTER}" not in shown
    assert "↵" in shown
    assert "counts in the loss" in shown


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
        (("inspect", "nothing.yaml"), "nothing.yaml"),
        (("inspect", "nothing", "data.seed=1"), "overridden in recipes only"),
        (("inspect", "recipe.yaml", "--row", "9999"), "no row 9999"),
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
