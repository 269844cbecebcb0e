"""Comparisons, verdicts and prompts: the shapes in use, parts with masks, and what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hearth.data import Dataset, DataTokenizer, PackedRows, SampleRows, render_chat
from hearth.data.chat import last_turn
from hearth.data.samples import SampleFields, parse_feedback, parse_preference, parse_prompt
from hearth.errors import DataError

Prepare = Callable[..., Dataset]
WriteRows = Callable[..., Path]

FIELDS = SampleFields("messages", None, None, "chosen", "rejected", "label")
USER = {"role": "user", "content": "Which fox?"}
GOOD = {"role": "assistant", "content": "the quick brown fox"}
BAD = {"role": "assistant", "content": "a lazy dog"}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]},
        {
            "chosen": "\n\nHuman: Which fox?\n\nAssistant: the quick brown fox",
            "rejected": "\n\nHuman: Which fox?\r\n\r\nAssistant: a lazy dog\n",
        },
    ],
)
def test_every_shape_of_a_comparison_gives_the_same_sample(row: dict[str, Any]) -> None:
    sample = parse_preference(row, FIELDS, "x")
    assert sample.prompt == [USER]
    assert sample.completions == [GOOD, BAD]
    assert sample.defect == ""


def test_a_dialogue_keeps_its_turns_and_what_only_looks_like_one() -> None:
    text = "\n\nHuman: Hi Human: you\n\nAssistant: Hello.\nHuman: no turn\n\nHuman: Which?\n\nAssistant:"
    sample = parse_preference({"chosen": text + " this", "rejected": text + " that"}, FIELDS, "x")
    assert [message["role"] for message in sample.prompt] == ["user", "assistant", "user"]
    assert [message["content"] for message in sample.prompt] == [
        "Hi Human: you",
        "Hello.\nHuman: no turn",
        "Which?",
    ]
    assert [message["content"] for message in sample.completions] == ["this", "that"]


def test_keys_and_patterns_name_other_columns() -> None:
    fields = SampleFields("messages", "{instruction}\n\n{input}", None, "better", "worse", "label")
    row = {"instruction": "Add.", "input": "", "better": "3", "worse": "4", "output": "3"}
    sample = parse_preference(row, fields, "x")
    assert sample.prompt == [{"role": "user", "content": "Add."}]
    assert [message["content"] for message in sample.completions] == ["3", "4"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a"}, r"x has no key 'rejected'; its keys are 'chosen'"),
        ({"chosen": "a", "rejected": [USER, BAD]}, "'chosen' is str and 'rejected' is list"),
        ({"chosen": "a", "rejected": "b", "q": "?"}, r"no prompt.*'chosen', 'rejected', 'q'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is int, not a string"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "'chosen' ends with the turn of role 'user'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "'chosen' is an answer without a prompt"),
        ({"chosen": [], "rejected": []}, "messages is an empty list"),
        ({"chosen": [USER, {"role": "bot", "content": ""}], "rejected": [USER, BAD]}, "role is 'bot'"),
    ],
)
def test_comparisons_that_cannot_be_read_say_why(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_preference(row, FIELDS, "x")


def test_feedback_reads_prompt_and_completion_or_messages() -> None:
    rows = [
        {"prompt": USER["content"], "completion": GOOD["content"], "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": 1},
        {"messages": [USER, GOOD], "label": True},
    ]
    for row in rows:
        sample = parse_feedback(row, FIELDS, "x")
        assert (sample.prompt, sample.completions, sample.fields) == ([USER], [GOOD], {"label": True})
    for label in ("yes", None, 0.5, 2, 1.0):
        with pytest.raises(DataError, match=r"x: 'label' is .*, which is no verdict"):
            parse_feedback({"messages": [USER, GOOD], "label": label}, FIELDS, "x")
    with pytest.raises(DataError, match="x has no key 'label'; its keys are 'messages'"):
        parse_feedback({"messages": [USER, GOOD]}, FIELDS, "x")


def test_prompts_keep_every_other_column() -> None:
    fields = SampleFields("messages", "Solve: {question}", None, "chosen", "rejected", "label")
    sample = parse_prompt({"question": "1+1?", "answer": "#### 2", "level": 3}, fields, "x")
    assert sample.prompt == [{"role": "user", "content": "Solve: 1+1?"}]
    assert sample.fields == {"answer": "#### 2", "level": 3}
    assert parse_prompt({"messages": [USER], "id": 7}, FIELDS, "x").fields == {"id": 7}
    with pytest.raises(DataError, match="ends with an assistant's turn"):
        parse_prompt({"messages": [USER, GOOD]}, FIELDS, "x")
    with pytest.raises(DataError, match=r"x has no prompt: neither 'prompt' nor 'messages'.*'q'"):
        parse_prompt({"q": "?"}, FIELDS, "x")


def test_the_last_run_of_a_mask() -> None:
    for bits, expected in (("0110011", "0000011"), ("110", "110"), ("000", "000"), ("01101100", "00001100")):
        mask = np.array([bit == "1" for bit in bits])
        assert "".join("1" if bit else "0" for bit in last_turn(mask)) == expected


def pairs(count: int = 40) -> list[dict[str, Any]]:
    talk = [USER, {"role": "assistant", "content": "the fox"}]
    return [
        {
            "chosen": [
                *talk,
                {"role": "user", "content": f"number {n}?"},
                {**GOOD, "content": f"naïve {n} 米"},
            ],
            "rejected": [*talk, {"role": "user", "content": f"number {n}?"}, {**BAD, "content": f"lazy {n}"}],
        }
        for n in range(count)
    ]


def test_a_comparison_is_stored_as_two_parts(
    prepare: Prepare, write_jsonl: WriteRows, tokenizer: DataTokenizer, tokenizer_dir: Path
) -> None:
    dataset = prepare(write_jsonl(pairs()), tokenizer_dir=tokenizer_dir)
    assert dataset.manifest.kind == "preference"
    assert dataset.manifest.sources[0].format == "preference"
    dataset.verify()
    split = dataset.split("train")
    assert split.num_parts == 2
    for index in range(len(split)):
        info = split.document_info(index)
        parts = split.parts(index)
        assert [len(tokens) for tokens, _ in parts] == split.part_lengths[index].tolist()
        for (tokens, mask), completion in zip(parts, info["completions"], strict=True):
            ids, full = render_chat([*info["messages"], completion], tokenizer)
            assert tokens.tolist() == ids.tolist()
            assert tokens.dtype == np.int32
            # Only the answer that is compared counts, its stop token included; not the earlier answer.
            assert tokenizer.decode(tokens[mask].tolist()) == completion["content"] + "<|im_end|>"
            assert mask.sum() < full.sum()
        assert np.concatenate([tokens for tokens, _ in parts]).tolist() == split.tokens(index).tolist()
    assert split.messages(0)[-1] == split.document_info(0)["completions"][0]
    supervised = sum(mask.sum() for index in range(len(split)) for _, mask in split.parts(index))
    assert split.num_supervised_tokens == supervised


def test_feedback_and_prompts_have_one_part(
    prepare: Prepare, write_jsonl: WriteRows, tokenizer: DataTokenizer, tokenizer_dir: Path
) -> None:
    verdicts = [{"prompt": f"number {n}?", "completion": f"fox {n}", "label": n % 3 == 0} for n in range(30)]
    source = {"path": str(write_jsonl(verdicts)), "format": "feedback"}
    split = prepare(source, tokenizer_dir=tokenizer_dir).split("train")
    for index in range(len(split)):
        info = split.document_info(index)
        number = int(info["completions"][0]["content"].split()[1])
        assert info["fields"] == {"label": number % 3 == 0}
        ((tokens, mask),) = split.parts(index)
        assert tokenizer.decode(tokens[mask].tolist()) == f"fox {number}<|im_end|>"
    questions = [{"question": f"number {n}?", "answer": f"#### {n}"} for n in range(30)]
    source = {"path": str(write_jsonl(questions)), "format": "prompts", "prompt_field": "question"}
    dataset = prepare(source, tokenizer_dir=tokenizer_dir, out="prompts")
    split = dataset.split("train")
    for index in range(len(split)):
        ((tokens, mask),) = split.parts(index)
        assert not mask.any()
        assert split.text(index).endswith("?<|im_end|>\n<|im_start|>assistant\n")
        question = split.document_info(index)["messages"][0]["content"]
        assert split.document_info(index)["fields"]["answer"] == f"#### {question[7:-1]}"
    assert dataset.manifest.splits["train"].supervised_tokens == 0


def test_a_trained_tokenizer_learns_from_prompts_and_answers(
    prepare: Prepare, write_jsonl: WriteRows
) -> None:
    dataset = prepare(write_jsonl(pairs()), vocab_size=300)
    assert dataset.manifest.tokenizer.trained_on_bytes > 0
    split = dataset.split("train")
    tokens, mask = split.parts(0)[0]
    assert dataset.tokenizer().decode(tokens[mask].tolist()).endswith("<|im_end|>")


def test_all_answers_to_a_prompt_go_into_one_split(
    prepare: Prepare, write_jsonl: WriteRows, tokenizer_dir: Path
) -> None:
    rows = [{"prompt": f"number {n % 20}?", "chosen": f"fox {n}", "rejected": f"dog {n}"} for n in range(80)]
    dataset = prepare(write_jsonl(rows), tokenizer_dir=tokenizer_dir)
    prompts = [
        {split.document_info(index)["messages"][0]["content"] for index in range(len(split))}
        for split in (dataset.split("train"), dataset.split("validation"))
    ]
    assert prompts[0].isdisjoint(prompts[1])
    assert len(prompts[0] | prompts[1]) == 20


def test_what_no_loss_can_use_is_counted(
    prepare: Prepare, write_jsonl: WriteRows, tokenizer_dir: Path
) -> None:
    other = [{"role": "user", "content": "another?"}, BAD]
    rows = [
        *pairs(10),
        pairs(1)[0],
        {"prompt": "same?", "chosen": "a", "rejected": "a"},
        {"prompt": "none?", "chosen": "a", "rejected": "  "},
        {"prompt": "control?", "chosen": "a", "rejected": "<|im_end|>"},
        {"chosen": [USER, GOOD], "rejected": other},
    ]
    dataset = prepare(write_jsonl(rows), tokenizer_dir=tokenizer_dir)
    removed = {reason: count.documents for reason, count in dataset.manifest.removed().items()}
    assert removed == {
        "duplicate": 1,
        "equal_answers": 1,
        "no_answer": 1,
        "control_tokens": 1,
        "prompts_differ": 1,
    }
    with pytest.raises(DataError, match="1 by equal_answers"):
        prepare(write_jsonl(rows[11:12], "equal.jsonl"), tokenizer_dir=tokenizer_dir, out="none")


def test_reuse_and_fingerprint_follow_the_keys(
    prepare: Prepare, write_jsonl: WriteRows, tokenizer_dir: Path
) -> None:
    rows = [{**row, "better": row["chosen"], "id": n} for n, row in enumerate(pairs())]
    source = {"path": str(write_jsonl(rows)), "format": "preference"}
    first = prepare(source, tokenizer_dir=tokenizer_dir)
    assert not first.reused
    assert prepare(source, tokenizer_dir=tokenizer_dir).reused
    again = prepare({**source, "chosen_field": "better"}, tokenizer_dir=tokenizer_dir, out="other")
    assert again.fingerprint != first.fingerprint
    assert again.lineage_edges[0][0] == first.lineage_edges[0][0]


def test_keys_of_samples_do_not_touch_other_datasets(prepare: Prepare, corpus: Path) -> None:
    first = prepare(corpus)
    again = prepare({"path": str(corpus), "chosen_field": "better", "label_field": "good"})
    assert again.reused
    assert again.fingerprint == first.fingerprint


def test_samples_do_not_mix_with_anything(
    prepare: Prepare, write_jsonl: WriteRows, corpus: Path, tokenizer_dir: Path
) -> None:
    from hearth.config import Recipe
    from hearth.data import plan_job

    path = write_jsonl(pairs())
    recipe = Recipe.model_validate({"data": {"sources": [{"path": str(path)}, {"path": str(corpus)}]}})
    with pytest.raises(DataError, match=r"mixes preference \(.*rows.jsonl\) with text \(.*corpus\)"):
        plan_job(recipe)
    folder = path.parent / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(pairs(1)[0]))
    (folder / "b.txt").write_text("some text")
    with pytest.raises(DataError, match=r"mixes preference \(a.jsonl\) with other text \(b.txt\)"):
        prepare(folder, tokenizer_dir=tokenizer_dir, out="mixed")


def test_errors_name_file_and_line(prepare: Prepare, write_jsonl: WriteRows, tokenizer_dir: Path) -> None:
    rows = [*pairs(3), {"chosen": [USER, GOOD], "worse": [USER, BAD]}]
    with pytest.raises(
        DataError, match=r"rows.jsonl:4 has no key 'rejected'; its keys are 'chosen', 'worse'"
    ) as e:
        prepare(write_jsonl(rows), tokenizer_dir=tokenizer_dir)
    assert "rejected_field" in str(e.value.fix)


def test_samples_that_do_not_fit_are_dropped_and_counted(
    prepare: Prepare, write_jsonl: WriteRows, tokenizer_dir: Path
) -> None:
    rows = [{"prompt": "fox " * n, "chosen": "the lazy dog", "rejected": "a fox"} for n in range(1, 40)]
    split = prepare(write_jsonl(rows), tokenizer_dir=tokenizer_dir, validation_fraction=0).split("train")
    longest = split.part_lengths.max(axis=1)
    limit = int(np.median(longest)) - 1
    samples = SampleRows(split, limit)
    assert len(samples) == (longest <= limit + 1).sum() == len(split) - samples.num_dropped
    assert 0 < samples.num_dropped < len(split)
    for row in range(len(samples)):
        for mine, stored in zip(samples.parts(row), split.parts(samples.documents[row]), strict=True):
            assert mine[0].tolist() == stored[0].tolist()
            assert len(mine[0]) <= limit + 1
    with pytest.raises(DataError, match=r"none of the 39 samples in the train split .* the shortest needs"):
        SampleRows(split, 5)
    with pytest.raises(IndexError):
        samples.parts(len(samples))


def test_truncation_cuts_the_beginning_of_the_prompt_and_never_an_answer(
    prepare: Prepare, write_jsonl: WriteRows, tokenizer: DataTokenizer, tokenizer_dir: Path
) -> None:
    rows = [{"prompt": "fox " * n + "why?", "chosen": "lazy dog", "rejected": "a fox"} for n in range(1, 40)]
    rows.append({"prompt": "why?", "chosen": "x y " * 60, "rejected": "no"})
    split = prepare(write_jsonl(rows), tokenizer_dir=tokenizer_dir, validation_fraction=0).split("train")
    limit = int(np.median(split.part_lengths.max(axis=1))) - 1
    samples = SampleRows(split, limit, truncate=True)
    assert len(samples) == 39  # the one with the long answer is gone
    assert (samples.num_dropped, samples.num_truncated) == (1, int((samples.cuts > 0).sum()))
    assert samples.num_truncated > 0
    for row in range(len(samples)):
        cuts = set()
        for (tokens, mask), (full, full_mask) in zip(
            samples.parts(row), split.parts(samples.documents[row]), strict=True
        ):
            assert len(tokens) <= limit + 1
            assert tokens.tolist() == full[len(full) - len(tokens) :].tolist()
            assert tokens[mask].tolist() == full[full_mask].tolist()
            assert tokenizer.decode(tokens[mask].tolist()).endswith("<|im_end|>")
            cuts.add(len(full) - len(tokens))
        assert cuts == {samples.cuts[row]}  # both parts still share one prompt


def test_truncation_keeps_what_begins_every_text(
    prepare: Prepare, write_jsonl: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A tokenizer with BOS: the template writes it, and a cut prompt still begins with it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    directory = tmp_path / "bos"
    shutil.copytree(tokenizer_dir, directory)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    bos = backend.token_to_id("<|endoftext|>")
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    backend.save(str(directory / "tokenizer.json"))
    template = directory / "chat_template.jinja"
    template.write_text("{{- '<|endoftext|>' -}}" + template.read_text())
    rows = [{"prompt": "fox " * n, "chosen": "the lazy dog", "rejected": "a fox"} for n in range(20, 40)]
    split = prepare(write_jsonl(rows), tokenizer_dir=directory, validation_fraction=0).split("train")
    samples = SampleRows(split, 50, truncate=True)
    assert samples.num_truncated
    for row in range(len(samples)):
        for (tokens, _), (full, _) in zip(
            samples.parts(row), split.parts(samples.documents[row]), strict=True
        ):
            assert tokens[0] == full[0] == bos
            assert tokens[1:].tolist() == full[len(full) - len(tokens) + 1 :].tolist()


def test_packed_rows_and_sample_rows_refuse_each_others_data(
    prepare: Prepare, write_jsonl: WriteRows, corpus: Path, tokenizer_dir: Path
) -> None:
    samples = prepare(write_jsonl(pairs()), tokenizer_dir=tokenizer_dir)
    with pytest.raises(DataError, match="holds preference; packed rows are made of texts"):
        PackedRows(samples.split("train"), 64)
    with pytest.raises(DataError, match="holds text, not samples"):
        SampleRows(prepare(corpus, out="text").split("train"), 64)


@pytest.mark.slow
def test_hh_rlhf(prepare: Prepare, shared_data: Path, tokenizer: DataTokenizer, tokenizer_dir: Path) -> None:
    """Counts taken from the file by hand: 2,312 pairs, 5 that part before the last turn, 4 empty answers."""
    path = shared_data / "hh_rlhf" / "harmless-base-test.jsonl.gz"
    dataset = prepare(path, tokenizer_dir=tokenizer_dir)
    record = dataset.manifest.sources[0]
    assert record.format == "preference"
    assert record.read.documents == 2312
    removed = {reason: count.documents for reason, count in record.removed.items()}
    assert removed.pop("duplicate", 0) == 0
    assert removed == {"no_answer": 4, "prompts_differ": 5}
    with gzip.open(path, "rt") as stream:
        rows = [json.loads(line) for line in stream]
    split = dataset.split("train")
    for index in range(0, len(split), 50):
        row = rows[int(split.document_info(index)["id"].rpartition(":")[2]) - 1]
        for (tokens, mask), key in zip(split.parts(index), ("chosen", "rejected"), strict=True):
            answer = row[key].rpartition("\n\nAssistant:")[2].strip()
            assert tokenizer.decode(tokens[mask].tolist()) == answer + "<|im_end|>"


@pytest.mark.slow
def test_real_pairs_and_questions(prepare: Prepare, shared_data: Path, tokenizer_dir: Path) -> None:
    source: dict[str, Any] = {
        "path": str(shared_data / "rasbt_instruct" / "instruction-data-with-preference.json"),
        "prompt_field": "{instruction}\n\n{input}",
    }
    dataset = prepare(source, tokenizer_dir=tokenizer_dir)
    removed = {reason: count.documents for reason, count in dataset.manifest.removed().items()}
    assert removed["equal_answers"] == 6
    source = {
        "path": str(shared_data / "gsm8k" / "test.jsonl"),
        "format": "prompts",
        "prompt_field": "question",
    }
    split = prepare(source, tokenizer_dir=tokenizer_dir, out="gsm8k").split("train")
    assert "####" in split.document_info(0)["fields"]["answer"]
