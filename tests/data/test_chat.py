"""Conversations: the ids of serving, the mask on the answers, an audit that fails on what breaks models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearth.data import CHATML_TEMPLATE, DataTokenizer, audit_chat, render_chat
from hearth.data.template import ChatTemplate
from hearth.errors import DataError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the quick fox?"},
    {"role": "assistant", "content": "  over a lazy dog\n\nwhile  "},
    {"role": "user", "content": "  and?  "},
    {"role": "assistant", "content": "naïve café 米 🙂"},
]
NO_MARKS = CHATML_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
STOP_OUTSIDE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)
NO_STOP = STOP_OUTSIDE.replace("<|im_end|>", "")


def with_template(tokenizer_dir: Path, tmp_path: Path, template: str) -> DataTokenizer:
    directory = tmp_path / "edited"
    shutil.copytree(tokenizer_dir, directory)
    (directory / "chat_template.jinja").write_text(template)
    return DataTokenizer.open(directory)


messages_lists = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]),
            "content": st.text(max_size=30),
        }
    ),
    min_size=1,
    max_size=5,
)


@given(messages=messages_lists)
def test_ids_and_mask_are_those_of_transformers(
    messages: list[dict[str, str]], tokenizer: DataTokenizer, tokenizer_dir: Path
) -> None:
    theirs = _transformers(tokenizer_dir)
    ids, mask = render_chat(messages, tokenizer)
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert ids.tolist() == expected["input_ids"]
    assert mask.tolist() == [bool(value) for value in expected["assistant_masks"]]


_cache: dict[Path, object] = {}


def _transformers(directory: Path):
    from transformers import AutoTokenizer

    if directory not in _cache:
        _cache[directory] = AutoTokenizer.from_pretrained(directory)
    return _cache[directory]


def test_the_mask_covers_the_answers_and_their_stop_token(tokenizer: DataTokenizer) -> None:
    ids, mask = render_chat(TALK, tokenizer)
    runs, text = [], ""
    for token, counts in zip(ids.tolist(), mask.tolist(), strict=True):
        if counts:
            runs.append(token)
    text = tokenizer.decode(runs)
    assert text == "over a lazy dog\n\nwhile<|im_end|>naïve café 米 🙂<|im_end|>"
    assert tokenizer.decode(ids.tolist()).endswith("<|im_end|>\n")


def test_the_prompt_of_serving_begins_the_training_example(tokenizer: DataTokenizer) -> None:
    ids, mask = render_chat(TALK, tokenizer)
    prompt, _ = tokenizer.template.render(TALK[:4], add_generation_prompt=True)
    prompt_ids, _ = tokenizer.encode_rendered(prompt)
    assert ids[: len(prompt_ids)].tolist() == prompt_ids
    assert mask[len(prompt_ids)]
    assert not mask[len(prompt_ids) - 1]


def test_the_audit_counts(tokenizer: DataTokenizer) -> None:
    report = audit_chat([TALK, TALK[1:3]], tokenizer)
    ids, mask = render_chat(TALK, tokenizer)
    assert report.num_conversations == 2
    assert report.num_turns == 3
    assert report.num_prefix_mismatches == 0
    assert report.num_supervised_tokens > mask.sum()
    assert report.num_tokens > len(ids)


def test_a_template_without_marks_fails_the_audit(tokenizer_dir: Path, tmp_path: Path) -> None:
    broken = with_template(tokenizer_dir, tmp_path, NO_MARKS)
    with pytest.raises(DataError, match=r"no \{% generation %\} marks.*all zero") as caught:
        audit_chat([TALK], broken)
    assert "endgeneration" in str(caught.value.fix)


def test_a_stop_token_outside_the_mask_fails_the_audit(tokenizer_dir: Path, tmp_path: Path) -> None:
    broken = with_template(tokenizer_dir, tmp_path, STOP_OUTSIDE)
    with pytest.raises(DataError, match=r"conversation 1: the stop token '<\|im_end\|>' .* outside"):
        audit_chat([[*TALK[:2], {"role": "assistant", "content": "x<|im_end|>"}], TALK], broken)


def test_a_turn_without_stop_token_fails_the_audit(tokenizer_dir: Path, tmp_path: Path) -> None:
    broken = with_template(tokenizer_dir, tmp_path, NO_STOP)
    with pytest.raises(DataError, match="not a stop token"):
        audit_chat([TALK], broken)


def test_an_all_zero_mask_fails_the_audit(tokenizer: DataTokenizer) -> None:
    with pytest.raises(DataError, match=r"conversation 1: the loss mask is all zero \(roles: user\)"):
        audit_chat([TALK, [{"role": "user", "content": "hello?"}]], tokenizer)


def test_pad_equal_to_eos_fails_the_audit(tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "edited"
    shutil.copytree(tokenizer_dir, directory)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**values, "pad_token": values["eos_token"]}))
    with pytest.raises(DataError, match="pad token is the eos token"):
        audit_chat([TALK], directory)


def test_a_prompt_that_training_never_saw_is_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A template that writes a thought only into the finished answer: legal, but to be known."""
    template = CHATML_TEMPLATE.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    tokenizer = with_template(tokenizer_dir, tmp_path, template)
    assert audit_chat([TALK], tokenizer).num_prefix_mismatches == 1


def test_without_template_the_error_says_what_to_do(tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "bare"
    shutil.copytree(tokenizer_dir, directory)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        render_chat(TALK, directory)


def test_a_broken_template_is_refused() -> None:
    with pytest.raises(DataError, match="not valid"):
        ChatTemplate("{% for %}")


def test_a_template_that_refuses_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        template.render(TALK)


def test_templates_run_in_a_sandbox() -> None:
    template = ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match="refuses"):
        template.render(TALK)
