"""Reading every kind of source, and the errors for those that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hearth.data import Dataset
from hearth.data.files import open_binary, read_sections
from hearth.errors import DataError

Prepare = Callable[..., Dataset]
WriteJsonl = Callable[..., Path]

ROWS = [{"text": f"row number {number} says {'xyz'[number % 3] * number}"} for number in range(30)]


def ids(dataset: Dataset) -> list[str]:
    splits = [dataset.split(name) for name in ("train", "validation")]
    return sorted(str(split.document_info(i)["id"]) for split in splits for i in range(len(split)))


def texts(dataset: Dataset) -> set[str]:
    return {text for name in ("train", "validation") for text in dataset.split(name).iter_text()}


def test_a_folder_is_read_recursively_without_hidden_files(prepare: Prepare, corpus: Path) -> None:
    (corpus / ".git").mkdir()
    (corpus / ".git" / "config").write_text("hidden")
    (corpus / ".hidden.txt").write_text("hidden")
    dataset = prepare(corpus)
    assert ids(dataset) == sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("[0-9]*.txt"))
    assert dataset.manifest.sources[0].files == 40


def test_a_glob_is_read_in_order(prepare: Prepare, corpus: Path) -> None:
    assert ids(prepare(f"{corpus}/**/1*.txt")) == sorted(
        f"{'a' if number % 2 else 'b'}/{number:02d}.txt" for number in range(10, 20)
    )


COMPRESSORS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[:99]) + zstandard.compress(data[99:]),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_jsonl_plain_and_compressed(prepare: Prepare, tmp_path: Path, suffix: str) -> None:
    data = "".join(json.dumps(row) + "\n\n" for row in ROWS).encode()
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(COMPRESSORS[suffix](data))
    dataset = prepare(tmp_path / f"rows.jsonl{suffix}")
    assert texts(dataset) == {row["text"] for row in ROWS}
    assert ids(dataset) == sorted(f"rows.jsonl{suffix}:{2 * n + 1}" for n in range(30))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compression_names_the_file(
    prepare: Prepare, tmp_path: Path, suffix: str, damage: str
) -> None:
    data = COMPRESSORS[suffix](b"".join(json.dumps(row).encode() + b"\n" for row in ROWS * 50))
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"this is not compressed data at all")
    with pytest.raises(DataError, match=rf"rows\.jsonl\{suffix}.*(damaged|valid JSON)"):
        prepare(path)


def test_without_zstandard_the_error_names_the_extra(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "x"}'))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="zstandard library is not installed") as caught:
        prepare(tmp_path / "a.jsonl.zst")
    assert "hearth-lm[zstd]" in str(caught.value)


def test_a_json_list_is_read_like_lines(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    assert texts(prepare(tmp_path / "rows.json")) == {row["text"] for row in ROWS}


def test_another_column_can_hold_the_text(prepare: Prepare, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"body": row["text"]} for row in ROWS])
    assert len(ids(prepare({"path": str(path), "text_field": "body"}))) == 30
    with pytest.raises(DataError, match=r"rows\.jsonl:1 has no key 'text'; its keys are 'body'") as caught:
        prepare(path, out="other")
    assert "text_field" in str(caught.value.fix)


def test_prompt_and_response_make_conversations(prepare: Prepare, shared_data: Path) -> None:
    source = {
        "path": str(shared_data / "rasbt_instruct" / "instruction-data.json"),
        "prompt_field": "{instruction}\n\n{input}",
        "response_field": "output",
    }
    dataset = prepare(source, vocab_size=600)
    assert dataset.manifest.kind == "chat"
    split = dataset.split("train")
    rows = json.loads(Path(source["path"]).read_text())
    index = split.find("instruction-data.json:2")[0] if split.find("instruction-data.json:2") else None
    if index is not None:
        assert split.messages(index)[1]["content"] == rows[1]["output"]
    by_answer = {row["output"]: row for row in rows}
    for number in range(20):
        ask, answer = split.messages(number)
        row = by_answer[answer["content"]]
        assert ask["content"] == f"{row['instruction']}\n\n{row['input']}".strip()


def test_one_of_prompt_and_response_is_not_enough(prepare: Prepare, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"question": "a", "answer": "b"}] * 3)
    with pytest.raises(DataError, match="only one of prompt_field and response_field"):
        prepare({"path": str(path), "prompt_field": "question"})


def test_messages_are_recognised(prepare: Prepare, write_jsonl: WriteJsonl) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(10)
    ]
    assert prepare(write_jsonl(rows)).manifest.kind == "chat"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hi", "'hi'; a non-empty list"),
        ([], "an empty list; a non-empty list"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\].role is 'bot'"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is 5"),
        (["x"], r"messages\[0\] is 'x'"),
    ],
)
def test_bad_messages_name_the_row_and_what_is_wrong(
    prepare: Prepare, write_jsonl: WriteJsonl, messages: object, complaint: str
) -> None:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl([{"messages": good}, {"messages": messages}])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{complaint}"):
        prepare({"path": str(path), "format": "chat"})


def test_a_missing_path_names_the_nearest_parent(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder") as caught:
        prepare(tmp_path / "no" / "such" / "texts")
    assert str(caught.value.fix).endswith(f"is {tmp_path}")


def test_a_glob_without_matches_says_which_part_exists(prepare: Prepare, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches .*\*\.md .*exists"):
        prepare(f"{corpus}/*.md")
    with pytest.raises(DataError, match=r"does not exist; .* does"):
        prepare(f"{corpus}/nope/*.md")


def test_an_empty_folder_is_named(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="void holds no files"):
        prepare(tmp_path / "void")


def test_no_sources_at_all(prepare: Prepare) -> None:
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        prepare("unused", sources=[])


BAD_FILES = {
    "binary": (b"text and \x00 then more", "binary", "is a binary file (byte 0x00 at offset 9)"),
    "latin": ("na\u00efve".encode("latin-1"), "invalid_utf8", "not valid UTF-8: byte 0xef at offset 2"),
    "utf16": ("hello".encode("utf-16"), "binary", "is UTF-16 text, not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_skipped_and_counted(prepare: Prepare, corpus: Path, case: str) -> None:
    data, reason, message = BAD_FILES[case]
    (corpus / "zz.txt").write_bytes(data)
    source = prepare(corpus).manifest.sources[0]
    assert source.bad == {reason: 1}
    assert source.read.documents == 40
    assert message in source.bad_examples[0]


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_stop_the_work_when_asked_to(prepare: Prepare, corpus: Path, case: str) -> None:
    data, _, message = BAD_FILES[case]
    (corpus / "zz.txt").write_bytes(data)
    with pytest.raises(DataError) as caught:
        prepare(corpus, on_bad_file="fail")
    assert message in str(caught.value)
    assert str(corpus / "zz.txt") in str(caught.value)


def test_the_offset_counts_from_the_start_of_a_file_that_is_cut(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"line\n" * 10_000 + b"\xff\n" + b"line\n" * 10)
    with pytest.raises(DataError, match="0xff at offset 50000"):
        prepare(path, on_bad_file="fail", deduplicate="none")


def test_bad_rows_are_skipped_and_counted(prepare: Prepare, tmp_path: Path) -> None:
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[3] = b'{"text": "na\xefve"}'
    lines[5] = rb'{"text": "half \ud800 pair"}'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = prepare(path).manifest.sources[0]
    assert source.bad == {"invalid_utf8": 2}
    assert [message.split(" ")[0] for message in source.bad_examples] == [f"{path}:4", f"{path}:6"]
    with pytest.raises(DataError, match=r"rows\.jsonl:4 is not valid UTF-8"):
        prepare(path, out="other", on_bad_file="fail")


@pytest.mark.parametrize("line", ["{", '{"text": ', "nonsense", '["list"]', '"text"', "{'text': 1}"])
def test_a_malformed_line_is_named(prepare: Prepare, tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is (not|list|str)"):
        prepare(path)
    path.write_text(json.dumps(ROWS[0]) + '\n{"text": 7}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'text' is int"):
        prepare(path)


def test_conversations_and_texts_are_two_sources(prepare: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    (folder / "b.jsonl").write_text('{"messages": []}')
    with pytest.raises(DataError, match=r"mixes conversations \(b\.jsonl\) with other text \(a\.txt\)"):
        prepare(folder)


def test_newlines_are_unified_and_the_mark_is_dropped(prepare: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "windows"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n" + b"%d" % number)
    assert texts(prepare(folder)) == {f"one\ntwo\nthree\n{number}" for number in range(9)}


@given(
    data=st.lists(st.sampled_from([b"\n", b"\n\n", b"word ", "é".encode(), "🙂".encode()]), max_size=60),
    size=st.integers(8, 40),
)
def test_sections_join_to_the_whole_and_never_split_a_character(data: list[bytes], size: int) -> None:
    whole = b"".join(data)
    sections = list(read_sections(io.BytesIO(whole), size))
    assert b"".join(section for _, section in sections) == whole
    at = 0
    for offset, section in sections:
        assert offset == at
        assert 0 < len(section) <= size
        section.decode()
        at += len(section)


def test_a_single_long_file_is_cut_into_documents(prepare: Prepare, shared_data: Path) -> None:
    dataset = prepare(shared_data / "tinyshakespeare" / "input.txt", validation_fraction=0.1)
    original = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    parts: dict[int, str] = {}
    for name in ("train", "validation"):
        split = dataset.split(name)
        for index in range(len(split)):
            parts[int(str(split.document_info(index)["id"]).rpartition("#")[2])] = split.text(index)
    assert "".join(parts[number] for number in sorted(parts)) == original
    assert dataset.split("validation").num_documents > 1


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(b"")
    with open_binary(path) as stream:
        assert stream.read() == b""  # an empty file is an empty archive
