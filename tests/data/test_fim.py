"""Fill in the middle: nothing is lost, the end stays last, rows keep their length, epochs differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hearth.config import Recipe
from hearth.config.recipe import FimSection
from hearth.data import IGNORE, Dataset, DataTokenizer, PackedRows, PackPlan, plan_job, train_bpe
from hearth.data.fim import FAMILIES, FIM_TOKENS, FillInTheMiddle, FimTokens
from hearth.errors import ConfigError, DataError

ALWAYS = FimSection(rate=1.0, spm_rate=0.5)
CODE = [f"def f{n}(x):\n    return x + {n}  # naïve 米\n\n\nclass C{n}:\n    pass\n" * 3 for n in range(40)]
PRE, SUF, MID = FIM_TOKENS


@pytest.fixture(scope="session")
def code_tokenizer() -> DataTokenizer:
    return train_bpe(CODE, 400, more_special_tokens=FIM_TOKENS)


def restored(text: str) -> str:
    """The text before it was rearranged."""
    if not text.startswith(PRE):
        return text
    before, _, middle = text.removeprefix(PRE).partition(MID)
    prefix, _, suffix = before.partition(SUF)
    return prefix + middle + suffix


@given(text=st.text(min_size=1, max_size=60), epoch=st.integers(0, 9), spm=st.sampled_from([0.0, 1.0]))
def test_every_character_is_kept_and_the_end_stays_last(
    text: str, epoch: int, spm: float, code_tokenizer: DataTokenizer
) -> None:
    fim = FillInTheMiddle(FimSection(rate=1.0, spm_rate=spm), code_tokenizer, seed=1)
    body = code_tokenizer.encode_texts([text])[0]
    tokens = np.array([*body, code_tokenizer.eos_id], dtype=np.int32)
    made = fim.apply(tokens, epoch=epoch, document=3, start=0, is_end=True)
    assert made.dtype == np.int32
    assert made[-1] == code_tokenizer.eos_id
    assert (made[:-1] != code_tokenizer.eos_id).all()
    assert len(made) <= len(tokens) + fim.reserve
    shown = code_tokenizer.decode(made[:-1].tolist())
    assert restored(shown) == text
    assert shown.startswith(PRE + SUF) if spm else MID in shown
    # A piece that goes on in another row has no end of its own.
    piece = fim.apply(tokens[:-1], epoch=epoch, document=3, start=0, is_end=False)
    assert restored(code_tokenizer.decode(piece.tolist())) == text


def test_cuts_fall_between_characters_and_everywhere(code_tokenizer: DataTokenizer) -> None:
    """One long word is few tokens, but every place in it is a place to cut."""
    word = "return " * 3
    tokens = np.array(code_tokenizer.encode_texts([word])[0], dtype=np.int32)
    fim = FillInTheMiddle(FimSection(rate=1.0, spm_rate=0.0), code_tokenizer, seed=0)
    places = set()
    for epoch in range(400):
        text = code_tokenizer.decode(
            fim.apply(tokens, epoch=epoch, document=0, start=0, is_end=False).tolist()
        )
        prefix, _, rest = text.removeprefix(PRE).partition(SUF)
        places |= {len(prefix), len(word) - len(rest.partition(MID)[0])}
    assert len(tokens) < len(word)
    assert places == set(range(len(word) + 1))


def test_rates_are_kept_and_epochs_differ(code_tokenizer: DataTokenizer) -> None:
    tokens = np.array(code_tokenizer.encode_texts([CODE[0]])[0], dtype=np.int32)
    fim = FillInTheMiddle(FimSection(rate=0.5, spm_rate=0.25), code_tokenizer, seed=0)
    made = [
        fim.apply(tokens, epoch=e, document=d, start=0, is_end=False) for e in range(20) for d in range(50)
    ]
    texts = [code_tokenizer.decode(each[:2].tolist()) for each in made]
    num_fim = sum(text.startswith(PRE) for text in texts)
    assert abs(num_fim / 1000 - 0.5) < 0.06
    assert abs(sum(text == PRE + SUF for text in texts) / num_fim - 0.25) < 0.08
    assert len({each.tobytes() for each in made}) > 0.9 * num_fim
    again = [
        fim.apply(tokens, epoch=e, document=d, start=0, is_end=False) for e in range(20) for d in range(50)
    ]
    assert all(np.array_equal(one, two) for one, two in zip(made, again, strict=True))
    other = FillInTheMiddle(FimSection(rate=0.5, spm_rate=0.25), code_tokenizer, seed=1)
    assert any(
        not np.array_equal(other.apply(tokens, epoch=0, document=d, start=0, is_end=False), made[d])
        for d in range(50)
    )
    never = FillInTheMiddle(FimSection(rate=0.0), code_tokenizer, seed=0)
    assert never.apply(tokens, epoch=0, document=0, start=0, is_end=False) is tokens


def with_tokens(tokenizer: DataTokenizer, tokens: list[str], directory: Path) -> DataTokenizer:
    tokenizer.save(directory, model_max_length=256)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    backend.save(str(directory / "tokenizer.json"))
    return DataTokenizer.open(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_marks_of_known_families_are_found(family: str, tokenizer: DataTokenizer, tmp_path: Path) -> None:
    marks = [token for token in FAMILIES[family] if token is not None]
    known = with_tokens(tokenizer, marks, tmp_path / "known")
    found = FimTokens.find(known)
    assert [known.decode([index]) for index in (found.prefix, found.suffix, found.middle)] == marks[:3]
    fim = FillInTheMiddle(FimSection(rate=1.0, spm_rate=0.0), known, seed=0)
    tokens = np.array([*known.encode_texts(["the lazy dog"])[0], known.eos_id], dtype=np.int32)
    made = known.decode(fim.apply(tokens, epoch=0, document=0, start=0, is_end=True).tolist())
    # CodeLlama ends a middle with a mark of its own; the document ends with eos in every family.
    assert made.endswith("▁<EOT><|endoftext|>" if family == "CodeLlama" else "<|endoftext|>")
    assert made.startswith(marks[0])


def test_bos_stays_first(code_tokenizer: DataTokenizer, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    code_tokenizer.save(tmp_path / "bos", model_max_length=256)
    backend = Tokenizer.from_file(str(tmp_path / "bos" / "tokenizer.json"))
    pad = backend.token_to_id("<|pad|>")
    backend.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", pad)])
    backend.save(str(tmp_path / "bos" / "tokenizer.json"))
    tokenizer = DataTokenizer.open(tmp_path / "bos")
    fim = FillInTheMiddle(ALWAYS, tokenizer, seed=0)
    body = tokenizer.encode_texts([CODE[0]])[0]
    tokens = np.array([pad, *body, tokenizer.eos_id], dtype=np.int32)
    made = fim.apply(tokens, epoch=0, document=0, start=0, is_end=True)
    assert [made[0], made[1], made[-1]] == [pad, tokenizer.special_ids[PRE], tokenizer.eos_id]
    assert restored(tokenizer.decode(made[1:-1].tolist())) == CODE[0]


def test_sentencepiece_is_cut_between_tokens() -> None:
    """Its parts encoded apart would each gain a space."""
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, **{chr(97 + n): 3 + n for n in range(26)}}
    vocab |= {"▁" + chr(97 + n): 29 + n for n in range(26)}
    backend = Tokenizer(models.BPE(vocab, [("▁", chr(97 + n)) for n in range(26)], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([AddedToken(token, special=True) for token in FIM_TOKENS])
    tokenizer = DataTokenizer(backend, eos_token="</s>", pad_token=None)
    fim = FillInTheMiddle(FimSection(rate=1.0, spm_rate=0.0), tokenizer, seed=0)
    assert not fim.at_characters
    tokens = np.array(tokenizer.encode_texts(["abc def ghi"])[0], dtype=np.int32)
    made = fim.apply(tokens, epoch=0, document=0, start=0, is_end=False).tolist()
    marks = [made.index(tokenizer.backend.token_to_id(token)) for token in FIM_TOKENS]
    prefix, suffix, middle = made[1 : marks[1]], made[marks[1] + 1 : marks[2]], made[marks[2] + 1 :]
    assert prefix + middle + suffix == tokens.tolist()


def test_pieces_that_begin_inside_a_character_are_cut_between_tokens(code_tokenizer: DataTokenizer) -> None:
    tokens = np.array(code_tokenizer.encode_texts(["🙂🙂🙂"])[0], dtype=np.int32)
    assert len(tokens) > 3
    fim = FillInTheMiddle(ALWAYS, code_tokenizer, seed=0)
    made = fim.apply(tokens[1:], epoch=0, document=0, start=1, is_end=False).tolist()
    assert sorted(set(made) - set(code_tokenizer.special_ids.values())) == sorted(set(tokens[1:].tolist()))
    assert len(made) == len(tokens) - 1 + 3


@given(
    lengths=st.lists(st.integers(1, 90), max_size=30),
    reserve=st.integers(0, 9),
    packing=st.booleans(),
)
def test_a_plan_leaves_room_for_every_piece(lengths: list[int], reserve: int, packing: bool) -> None:
    plan = PackPlan.build(lengths, 32, packing=packing, reserve=reserve)
    for row in range(plan.num_rows):
        here = slice(int(plan.row_starts[row]), int(plan.row_starts[row + 1]))
        assert (plan.lengths[here] + reserve).sum() <= 32
    assert plan.num_pairs == sum(max(0, length - 1) for length in lengths)


@pytest.fixture
def code_dataset(tmp_path: Path, prepare: Callable[..., Dataset]) -> Dataset:
    folder = tmp_path / "code"
    folder.mkdir()
    for number, text in enumerate(CODE):
        (folder / f"{number:02d}.py").write_text(text * (1 + number % 7), encoding="utf-8")
    return prepare(folder, fim={}, sequence_length=64)


def test_rows_are_whole_texts_rearranged(code_dataset: Dataset) -> None:
    split, tokenizer = code_dataset.split("train"), code_dataset.tokenizer()
    assert set(FIM_TOKENS) <= set(tokenizer.special_ids)
    rows = PackedRows(split, 128, seed=3, fim=ALWAYS)
    plain = PackedRows(split, 128, seed=3)
    assert (plain.changes_by_epoch, rows.changes_by_epoch) == (False, True)
    marked = seen = 0
    for index in range(len(rows)):
        row = rows[index]
        assert len(row.input_ids) == 128
        for number, (document, start, count) in enumerate(rows.segments(index)):
            here = row.segment_ids == number
            assert count <= here.sum() <= count + rows.fim.reserve
            assert row.position_ids[here].tolist() == list(range(here.sum()))
            labels = row.labels[here]
            assert (labels != IGNORE).all()
            assert labels[:-1].tolist() == row.input_ids[here][1:].tolist()
            tokens = np.append(row.input_ids[here], labels[-1])
            text = tokenizer.decode(tokens.tolist())
            marked += PRE in text
            seen += 1
            expected = tokenizer.decode(split.token_range(document, start, start + count + 1).tolist())
            if "\N{REPLACEMENT CHARACTER}" not in expected:
                ending = "<|endoftext|>" if expected.endswith("<|endoftext|>") else ""
                assert text.endswith(ending)
                assert restored(text.removesuffix(ending)) == expected.removesuffix(ending)
    assert marked == seen


def test_rows_of_an_epoch_are_numbered_on(code_dataset: Dataset) -> None:
    split = code_dataset.split("train")
    rows = PackedRows(split, 128, seed=3, fim=FimSection(rate=0.9))
    again = PackedRows(split, 128, seed=3, fim=FimSection(rate=0.9))
    size = len(rows)
    assert rows.segments(1) == rows.segments(1 + 5 * size)
    assert not np.array_equal(rows[1].input_ids, rows[1 + size].input_ids)
    for index in (0, 1, size, 3 * size + 2):
        assert np.array_equal(rows[index].input_ids, again[index].input_ids)
    assert rows.identity != PackedRows(split, 128, seed=3, fim=FimSection(rate=0.8)).identity != ""
    assert PackedRows(split, 128, seed=3).identity == ""
    with pytest.raises(IndexError):
        PackedRows(split, 128)[size + 1000]


def test_conversations_stay_as_they_are(
    prepare: Callable[..., Dataset], code_tokenizer: DataTokenizer, tmp_path: Path
) -> None:
    code_tokenizer.save(tmp_path / "tok", model_max_length=256)
    talks = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"fox {n}"}]}
        for n in range(20)
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    split = prepare(path, tokenizer_dir=tmp_path / "tok").split("train")
    rows = PackedRows(split, 64, fim=ALWAYS)
    text = "".join(code_tokenizer.decode(rows[index].input_ids.tolist()) for index in range(len(rows)))
    assert PRE not in text
    assert (rows[0].labels != IGNORE).sum() < 64


def test_what_cannot_work_is_refused(tokenizer_dir: Path, tmp_path: Path, corpus: Path) -> None:
    recipe = {"data": {"sources": [{"path": str(corpus)}], "fim": {"rate": 0.5}}}
    with pytest.raises(DataError, match=r"data.fim needs a tokenizer with tokens .*StarCoder") as caught:
        plan_job(Recipe.model_validate(recipe), tokenizer_dir=tokenizer_dir)
    assert "train a tokenizer" in str(caught.value.fix)
    with pytest.raises(ConfigError, match=r"data.sequence_length is 9; data.fim alone takes 9"):
        PackPlan.build([10], 9, reserve=9)
    with pytest.raises(ValueError, match=r"train.objective dpo does not read them"):
        Recipe.model_validate({**recipe, "train": {"objective": "dpo"}})


def test_the_fingerprint_changes_only_where_a_tokenizer_is_trained(corpus: Path, tmp_path: Path) -> None:
    def fingerprint(fim: dict[str, float] | None, tokenizer: Path | None = None) -> str:
        data = {"sources": [{"path": str(corpus)}], "fim": fim}
        return plan_job(Recipe.model_validate({"data": data}), tokenizer_dir=tokenizer).fingerprint

    assert fingerprint(None) != fingerprint({"rate": 0.5}) == fingerprint({"rate": 0.9})
    tokenizer = train_bpe(CODE, 400, more_special_tokens=FIM_TOKENS)
    tokenizer.save(tmp_path / "given", model_max_length=64)
    assert fingerprint(None, tmp_path / "given") == fingerprint({}, tmp_path / "given")
    shutil.rmtree(tmp_path / "given")
