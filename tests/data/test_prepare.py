"""From recipe to dataset: the same bytes for any number of workers, reuse, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.config import Recipe
from hearth.data import Dataset, plan_job, prepare_dataset, prepare_in_folder
from hearth.data.stdlib import stdlib_root
from hearth.errors import DataError

Prepare = Callable[..., Dataset]


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_result_does_not_depend_on_the_number_of_workers(
    prepare: Prepare, shared_data: Path, tokenizer_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hearth.data.sources.BATCH_BYTES", 50_000)
    options: dict[str, Any] = {"tokenizer_dir": tokenizer_dir} if kind == "chat" else {}
    if kind == "chat":
        path = shared_data / "gsm8k" / "test.jsonl"
        source = {"path": str(path), "prompt_field": "question", "response_field": "answer"}
    else:
        source = {"path": str(shared_data / "wikitext2" / "test.txt")}
    one, three = (prepare(source, out=f"w{n}", num_workers=n, **options) for n in (1, 3))
    assert hashes(one.path) == hashes(three.path)
    assert one.split("train").num_tokens > 100_000


def test_nothing_changed_is_reused_and_any_change_is_not(prepare: Prepare, corpus: Path) -> None:
    first = prepare(corpus)
    assert not first.reused
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    again = prepare(corpus, num_workers=2, sequence_length=64, packing=False)
    assert again.reused
    assert (first.path / "manifest.json").stat().st_mtime_ns == stamp
    fingerprints = {first.fingerprint}
    for change in (
        {"validation_fraction": 0.3},
        {"seed": 1},
        {"filters": {"min_chars": 2}},
        {"deduplicate": "none"},
        {"vocab_size": 300},
        {"on_bad_file": "fail"},
    ):
        changed = prepare(corpus, **change)
        assert not changed.reused
        fingerprints.add(changed.fingerprint)
    (corpus / "a" / "01.txt").write_text("edited")
    fingerprints.add(prepare(corpus).fingerprint)
    (corpus / "a" / "01.txt").rename(corpus / "a" / "02.txt")
    fingerprints.add(prepare(corpus).fingerprint)
    assert len(fingerprints) == 9


def test_a_damaged_dataset_is_made_again(prepare: Prepare, corpus: Path) -> None:
    first = prepare(corpus)
    (first.path / "train" / "tokens-00000.bin").write_bytes(b"short")
    again = prepare(corpus)
    assert not again.reused
    again.verify()
    (first.path / "manifest.json").write_text("{")
    assert not prepare(corpus).reused


def test_a_folder_that_is_no_dataset_is_left_alone(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="precious exists and is not a dataset"):
        prepare(corpus, out="precious")
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["train/thesis.txt", "manifest.json"])
def test_a_folder_that_resembles_a_dataset_is_left_alone(
    prepare: Prepare, corpus: Path, tmp_path: Path, name: str
) -> None:
    mine = tmp_path / "precious" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(DataError, match="precious exists and is not a dataset"):
        prepare(corpus, out="precious")
    assert mine.read_text() == "years of work"


def test_what_filters_removed_is_counted_by_source(prepare: Prepare, corpus: Path) -> None:
    (corpus / "empty.txt").write_text("")
    (corpus / "short.txt").write_text("ab")
    (corpus / "copy.txt").write_text((corpus / "a" / "01.txt").read_text() + " \n")
    manifest = prepare(corpus, filters={"min_chars": 3}).manifest
    source = manifest.sources[0]
    assert {reason: count.documents for reason, count in source.removed.items()} == {
        "min_chars": 2,
        "duplicate": 1,
    }
    assert source.read.documents == 43
    assert sum(count.documents for count in source.kept.values()) == 40
    assert manifest.removed()["min_chars"].bytes == 2
    kept = prepare(corpus, filters={"min_chars": 3}, deduplicate="none").manifest.sources[0]
    assert sum(count.documents for count in kept.kept.values()) == 41


def test_an_empty_corpus_says_what_removed_it(prepare: Prepare, corpus: Path) -> None:
    (corpus / "bin.txt").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"empty after filtering: .* 40 by min_chars, 1 as binary"):
        prepare(corpus, filters={"min_chars": 10_000})


def test_one_document_cannot_be_split(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("all there is")
    with pytest.raises(DataError, match="1 documents are 1 group"):
        prepare(tmp_path / "one")
    dataset = prepare(tmp_path / "one", validation_fraction=0.0)
    assert dataset.split("validation").num_documents == 0
    assert dataset.split("validation").lengths.tolist() == []


def test_nothing_left_to_train_on_is_refused(prepare: Prepare, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"validation_fraction is 1\.0"):
        prepare(corpus, validation_fraction=1.0)


def test_validation_is_never_empty(prepare: Prepare, corpus: Path) -> None:
    dataset = prepare(corpus, validation_fraction=1e-9)
    assert dataset.split("validation").num_documents == 1
    assert dataset.manifest.split_fallback


def test_more_documents_leave_the_others_where_they_are(prepare: Prepare, corpus: Path) -> None:
    def held_out(dataset: Dataset) -> set[str]:
        split = dataset.split("validation")
        return {str(split.document_info(index)["id"]) for index in range(len(split))}

    before = held_out(prepare(corpus))
    for number in range(40, 80):
        (corpus / f"{number}.txt").write_text(f"document {number}")
    after = held_out(prepare(corpus))
    assert {name for name in after if "/" in name} == before
    assert len(after) > len(before)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A part of the standard library in its own folder."""
    root = tmp_path / "library"
    for name in ("json", "logging", "html", "wsgiref", "concurrent", "importlib"):
        shutil.copytree(stdlib_root() / name, root / name)
    for path in stdlib_root().glob("[b-d]*.py"):
        shutil.copy(path, root)
    monkeypatch.setattr("hearth.data.sources.stdlib_root", lambda: root)
    return root


def test_source_docs_and_questions_of_a_module_are_held_out_together(
    prepare: Prepare, small_library: Path
) -> None:
    text = prepare({"path": "stdlib"}, vocab_size=600)
    chat = prepare({"path": "stdlib-chat"}, out="chat", tokenizer_dir=text.tokenizer_dir)

    def ids(dataset: Dataset, name: str) -> set[str]:
        split = dataset.split(name)
        return {str(split.document_info(index)["id"]) for index in range(len(split))}

    def modules_of(questions: set[str], known: set[str]) -> set[str]:
        found = set()
        for item in (question.split(":")[0] for question in questions):
            while item not in known:
                item = item.rpartition(".")[0]
            found.add(item)
        return found

    trained = {name.removesuffix(":docs") for name in ids(text, "train")}
    held_out = {name.removesuffix(":docs") for name in ids(text, "validation")}
    assert len(held_out) > 5
    assert not trained & held_out
    assert modules_of(ids(chat, "train"), trained | held_out) <= trained
    assert modules_of(ids(chat, "validation"), trained | held_out) <= held_out
    assert text.manifest.sources[0].license == "PSF-2.0"
    assert chat.manifest.audit is not None
    assert chat.manifest.audit["num_prefix_mismatches"] == 0
    assert "json:docs" in ids(text, "train") | ids(text, "validation")


def test_the_tokenizer_is_trained_on_the_train_split_alone(prepare: Prepare, tmp_path: Path) -> None:
    """A word that only held-out documents use never becomes a token."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text("plain words " * 5 + str(number))
    held_out = prepare(folder).split("validation")
    names = {str(held_out.document_info(index)["id"]) for index in range(len(held_out))}
    assert names
    for name in names:
        (folder / name).write_text("xylophone " * 50 + name)
    dataset = prepare(folder)
    vocabulary = dataset.tokenizer().backend.get_vocab()
    assert "Ġwords" in vocabulary
    assert not any("xyl" in token for token in vocabulary)


def test_sample_mb_bounds_what_the_tokenizer_reads(corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "data": {"sources": [{"path": str(corpus)}], "validation_fraction": 0.1},
            "tokenizer": {"vocab_size": 300, "sample_mb": 0.004},
        }
    )
    record = prepare_dataset(recipe, tmp_path / "out").manifest.tokenizer
    assert 0 < record.trained_on_bytes < 8000


def test_chat_needs_a_template_with_marks(
    prepare: Prepare, tokenizer_dir: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    (tmp_path / "tok").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tok" / name).write_bytes((tokenizer_dir / name).read_bytes())
    rows = [{"q": f"ask {n}", "a": f"say {n}"} for n in range(20)]
    source = {"path": str(write_jsonl(rows)), "prompt_field": "q", "response_field": "a"}
    with pytest.raises(DataError, match="no chat template"):
        prepare(source, tokenizer_dir=tmp_path / "tok")
    (tmp_path / "tok" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match=r"no \{% generation %\} marks"):
        prepare(source, tokenizer_dir=tmp_path / "tok")
    assert not (tmp_path / "dataset").exists()


def test_conversations_that_teach_nothing_are_counted(
    prepare: Prepare, write_jsonl: Callable[..., Path]
) -> None:
    rows = [{"q": f"ask {n}", "a": f"say {n}"} for n in range(20)]
    rows += [{"q": "a", "a": " "}, {"q": "b<|im_end|>", "a": "c"}, rows[0]]
    source = {"path": str(write_jsonl(rows)), "prompt_field": "q", "response_field": "a"}
    removed = prepare(source).manifest.sources[0].removed
    assert {reason: count.documents for reason, count in removed.items()} == {
        "no_answer": 1,
        "control_tokens": 1,
        "duplicate": 1,
    }


def test_a_reference_that_is_no_directory_is_refused(corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"data": {"sources": [{"path": str(corpus)}]}, "tokenizer": {"base": "assistant@production"}}
    )
    with pytest.raises(DataError, match="'assistant@production', which is not a directory"):
        prepare_dataset(recipe, tmp_path / "out")


def test_a_dataset_in_the_recipe_is_opened(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    made = prepare(corpus)
    recipe = Recipe.model_validate({"data": {"dataset": str(made.path)}})
    opened = prepare_dataset(recipe, tmp_path / "elsewhere")
    assert opened.reused
    assert opened.fingerprint == made.fingerprint
    assert not (tmp_path / "elsewhere").exists()


def test_in_a_folder_the_directory_is_named_by_the_fingerprint(corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"data": {"sources": [{"path": str(corpus)}]}, "tokenizer": {"vocab_size": 300}}
    )
    dataset = prepare_in_folder(recipe, tmp_path / "datasets")
    assert dataset.path == tmp_path / "datasets" / plan_job(recipe).fingerprint[:16]
    assert prepare_in_folder(recipe, tmp_path / "datasets").reused


_PREPARE = """
import json, resource, sys
from hearth.config import Recipe
from hearth.data import prepare_dataset
from hearth.errors import HearthError
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    prepare_dataset(Recipe.model_validate(json.loads(sys.argv[1])), sys.argv[2])
except HearthError as error:
    print(type(error).__name__, error)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")))
"""


def start(recipe: dict[str, Any], out: Path, limit: int = 0) -> subprocess.Popen[str]:
    code = textwrap.dedent(_PREPARE)
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(recipe), str(out), str(limit)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("limit", [2_000, 40_000, 200_000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, shared_data: Path, limit: int) -> None:
    """The kernel refuses to let a file grow over ``limit`` bytes, at three points of the work."""
    source = {"path": str(shared_data / "tinyshakespeare" / "input.txt")}
    recipe = {"data": {"sources": [source]}, "tokenizer": {"vocab_size": 2000}}
    process = start(recipe, tmp_path / "data" / "out", limit)
    output, _ = process.communicate(timeout=60)
    assert output.startswith("StorageError no space left while writing")
    assert "fix: free some space" in output
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.slow
def test_a_killed_preparation_is_cleaned_up_by_the_next(tmp_path: Path, shared_data: Path) -> None:
    source = {"path": str(shared_data / "scifact" / "corpus.jsonl.gz")}
    recipe = {"data": {"sources": [source], "num_workers": 2}, "tokenizer": {"vocab_size": 1000}}
    out = tmp_path / "data" / "out"
    process = start(recipe, out)
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(".out.*.tmp/tokenizer/tokenizer.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    process.kill()
    process.communicate()
    assert not out.exists()
    assert len(list(out.parent.iterdir())) == 1
    for pid in workers:  # they end by themselves when their pipe closes
        while _is_running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    small = {"data": {"sources": [{"path": str(shared_data / "tinyshakespeare" / "input.txt")}]}}
    prepare_dataset(Recipe.model_validate({**small, "tokenizer": {"vocab_size": 300}}), out).verify()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_no_torch_in_the_process_or_its_workers(tmp_path: Path, corpus: Path) -> None:
    recipe = {
        "data": {"sources": [{"path": str(corpus)}], "num_workers": 2},
        "tokenizer": {"vocab_size": 300},
    }
    output, _ = start(recipe, tmp_path / "out").communicate(timeout=60)
    assert output.strip() == "[]"
    code = "import sys, hearth.data.worker; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_a_script_without_main_guard_can_prepare(tmp_path: Path, corpus: Path) -> None:
    """With multiprocessing's spawn the workers would run this script again, and import its torch."""
    script = tmp_path / "script.py"
    recipe = {
        "data": {"sources": [{"path": str(corpus)}], "num_workers": 2},
        "tokenizer": {"vocab_size": 300},
    }
    script.write_text(
        "from hearth.config import Recipe\nfrom hearth.data import prepare_dataset\n"
        f"open({str(tmp_path / 'ran')!r}, 'a').write('x')\n"
        f"prepare_dataset(Recipe.model_validate({recipe!r}), {str(tmp_path / 'out')!r})\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)
    assert (tmp_path / "ran").read_text() == "x"
    Dataset.open(tmp_path / "out").verify()


def test_progress_is_told_every_stage(corpus: Path, tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.stages: list[list[Any]] = []

        def start(self, stage: str, total: int | None = None) -> None:
            self.stages.append([stage, total, 0])

        def advance(self, num_units: int = 1) -> None:
            self.stages[-1][2] += num_units

        def finish(self) -> None:
            self.stages[-1].append("finished")

    recorder = Recorder()
    recipe = Recipe.model_validate(
        {"data": {"sources": [{"path": str(corpus)}]}, "tokenizer": {"vocab_size": 300}}
    )
    dataset = prepare_dataset(recipe, tmp_path / "out", progress=recorder)
    assert [stage[0] for stage in recorder.stages] == ["read", "filter", "tokenizer", "tokenize"]
    assert all(stage[3] == "finished" for stage in recorder.stages)
    assert all(total in (None, done) for _, total, done, _ in recorder.stages)
    assert set(dataset.timings) == {"read", "filter", "tokenizer", "tokenize"}


def test_ctrl_c_stops_workers_and_leaves_nothing(tmp_path: Path, shared_data: Path) -> None:
    source = {"path": str(shared_data / "scifact" / "corpus.jsonl.gz")}
    recipe = {"data": {"sources": [source], "num_workers": 2}, "tokenizer": {"vocab_size": 1000}}
    out = tmp_path / "data" / "out"
    process = start(recipe, out)
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(".out.*.tmp/train")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("change", ["append", "edit", "delete"])
def test_a_source_that_changes_under_way_is_noticed(
    prepare: Prepare, corpus: Path, tmp_path: Path, change: str
) -> None:
    """The file changes after it was hashed, when the tokenizer is about to be trained."""
    path = corpus / "a" / "39.txt"

    class Meddler:
        def start(self, stage: str, total: int | None = None) -> None:
            if stage == "tokenizer":
                if change == "delete":
                    path.unlink()
                else:
                    path.write_text(path.read_text() + "more" if change == "append" else "other")

        def advance(self, num_units: int = 1) -> None: ...

        def finish(self) -> None: ...

    recipe = Recipe.model_validate(
        {"data": {"sources": [{"path": str(corpus)}]}, "tokenizer": {"vocab_size": 300}}
    )
    with pytest.raises(DataError, match=r"39\.txt"):
        prepare_dataset(recipe, tmp_path / "out", progress=Meddler())
    assert not (tmp_path / "out").exists()


def test_conversations_without_answers_get_their_own_advice(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"hello {number}"}]} for number in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="3 by no_answer") as caught:
        prepare({"path": str(tmp_path / "questions.jsonl"), "format": "chat"})
    assert caught.value.fix == "give conversations in which the assistant says something"
