"""Training copies render what the models' own templates render, and mark answers with their stop token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from hearth.data import Dataset, DataTokenizer, audit_chat, render_chat
from hearth.data.template import ChatTemplate
from hearth.data.training_copies import copy_names, find_copy, load_copy, marked_spans
from hearth.errors import DataError

STOCK = Path(__file__).parent / "stock_templates"
NAMES = sorted(path.stem for path in STOCK.glob("*.jinja"))
VARIABLES = {"bos_token": "<bos>", "eos_token": "</s>"}

# Family: eos, pad, further control tokens, and what ends an answer.
FAMILIES: dict[str, tuple[str, str | None, tuple[str, ...], str]] = {
    "llama3": ("<|eot_id|>", None, ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"),
    "llama3_1": ("<|eot_id|>", None, ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"),
    "llama3_2": ("<|eot_id|>", None, ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"),
    "qwen2_5": ("<|im_end|>", "<|endoftext|>", ("<|im_start|>",), "<|im_end|>"),
    "qwen3": ("<|im_end|>", "<|endoftext|>", ("<|im_start|>",), "<|im_end|>"),
    "qwen3_hub": ("<|im_end|>", "<|endoftext|>", ("<|im_start|>",), "<|im_end|>"),
    "qwen3_instruct_2507": ("<|im_end|>", "<|endoftext|>", ("<|im_start|>",), "<|im_end|>"),
    "gemma": ("<eos>", "<pad>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "gemma3": ("<eos>", "<pad>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "gpt_oss": ("<|return|>", "<|endoftext|>", ("<|start|>", "<|end|>", "<|channel|>"), "<|return|>"),
    "mistral": ("</s>", None, ("[INST]", "[/INST]"), "</s>"),
    "mistral_v3": ("</s>", None, ("[INST]", "[/INST]"), "</s>"),
    "mistral_nemo": ("</s>", "<pad>", ("[INST]", "[/INST]"), "</s>"),
    "mistral_small_3_2": ("</s>", "<pad>", ("[INST]", "[/INST]"), "</s>"),
    "phi3": ("<|endoftext|>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "phi3_5": ("<|endoftext|>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "phi4": ("<|im_end|>", "<|dummy|>", ("<|im_start|>", "<|im_sep|>"), "<|im_end|>"),
    "phi4_mini": ("<|endoftext|>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "chatml": ("<|im_end|>", "<|endoftext|>", ("<|im_start|>",), "<|im_end|>"),
}


def stock(name: str) -> ChatTemplate:
    return ChatTemplate((STOCK / f"{name}.jinja").read_text(encoding="utf-8"), VARIABLES)


@pytest.fixture(scope="session")
def family_dir(tokenizer: DataTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory with the small tokenizer, the control tokens of a family and its own template."""

    def make(name: str) -> Path:
        eos, pad, control, _ = FAMILIES[name]
        backend = Tokenizer.from_str(tokenizer.backend.to_str())
        named = dict.fromkeys([eos, *([pad] if pad else []), "<bos>", *control])
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])
        directory = tmp_path_factory.mktemp(name)
        backend.save(str(directory / "tokenizer.json"))
        config = {"eos_token": eos, "pad_token": pad, "bos_token": "<bos>"}
        config = {key: value for key, value in config.items() if value is not None}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "chat_template.jinja").write_text((STOCK / f"{name}.jinja").read_text())
        return directory

    return make


def test_every_copy_has_a_stock_template_and_every_stock_template_its_copy() -> None:
    assert set(NAMES) == set(FAMILIES)
    for name in NAMES:
        assert "generation %}" not in stock(name).text.replace("add_generation_prompt", "")
        assert find_copy(stock(name)) == name.removesuffix("_hub")
    assert set(copy_names()) == {name.removesuffix("_hub") for name in NAMES}


texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\n\nx\n", "<think>\nhm\n</think>\n\nyes", "<think></think>", "a</think>", "<b>&"]
    ),
)
assistant = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts},
    optional={"reasoning_content": texts, "thinking": texts},
)
turns = st.lists(st.tuples(texts, assistant), min_size=1, max_size=4).map(
    lambda pairs: [
        message for text, answer in pairs for message in ({"role": "user", "content": text}, answer)
    ]
)
ordered = st.tuples(st.booleans(), texts, turns, st.booleans()).map(
    lambda made: (
        ([{"role": "system", "content": made[1]}] if made[0] else []) + made[2][: len(made[2]) - made[3]]
    )
)
loose = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": texts}),
        assistant,
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(messages=st.one_of(ordered, loose), prompt=st.booleans())
def test_a_copy_renders_what_the_stock_template_renders(
    name: str, messages: list[dict[str, str]], prompt: bool
) -> None:
    try:
        expected, _ = stock_cached(name).render(messages, add_generation_prompt=prompt)
    except DataError:
        return  # what the model's own template refuses never reaches the copy
    copy = load_copy(name.removesuffix("_hub"), VARIABLES)
    assert copy.render(messages, add_generation_prompt=prompt)[0] == expected


_stock: dict[str, ChatTemplate] = {}


def stock_cached(name: str) -> ChatTemplate:
    return _stock.setdefault(name, stock(name))


TALK = [
    {"role": "user", "content": "the quick fox?"},
    {"role": "assistant", "content": "over a lazy dog"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "naïve café 米"},
]


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_covers_the_answers_and_what_stops_them(
    name: str, family_dir: Callable[[str], Path]
) -> None:
    tokenizer = DataTokenizer.open(family_dir(name))
    end = FAMILIES[name][3]
    ids, mask = render_chat(TALK, tokenizer)
    # The ids are those of the model's own template.
    assert ids.tolist() == tokenizer.encode_rendered(stock_with(tokenizer, name))[0]
    counted = tokenizer.decode(ids[mask].tolist())
    if name == "gpt_oss":  # only the last answer: see the copy
        assert counted == "<|channel|>final<|message|>naïve café 米<|return|>"
    elif name == "mistral_v3":  # SentencePiece's space before the answer is generated too
        assert counted == f" over a lazy dog{end} naïve café 米{end}"
    else:
        assert counted == f"over a lazy dog{end}naïve café 米{end}"
    report = audit_chat([TALK, TALK[:2]], tokenizer)
    assert report.num_empty_thoughts == 0
    assert report.num_turns == (2 if name == "gpt_oss" else 3)


def stock_with(tokenizer: DataTokenizer, name: str) -> str:
    return ChatTemplate(stock(name).text, tokenizer.special_tokens).render(TALK)[0]


def test_an_empty_thought_is_not_learnt_but_a_thought_is(family_dir: Callable[[str], Path]) -> None:
    tokenizer = DataTokenizer.open(family_dir("qwen3"))
    ids, mask = render_chat(TALK[:2], tokenizer)
    assert "<think>\n\n</think>\n\nover" in tokenizer.decode(ids.tolist())
    assert "think" not in tokenizer.decode(ids[mask].tolist())
    thought = [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}]
    ids, mask = render_chat(thought, tokenizer)
    assert tokenizer.decode(ids[mask].tolist()) == "<think>\nhm\n</think>\n\nyes<|im_end|>"
    ids, mask = render_chat(
        [TALK[0], {"role": "assistant", "content": "yes", "reasoning_content": "hm"}], tokenizer
    )
    assert tokenizer.decode(ids[mask].tolist()) == "<think>\nhm\n</think>\n\nyes<|im_end|>"


def test_a_template_that_supervises_empty_thoughts_is_counted(family_dir: Callable[[str], Path]) -> None:
    directory = family_dir("qwen3")
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
        "<think>\n\n</think>\n\n{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
        "<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    (directory / "chat_template.jinja").write_text(marked)
    written = [TALK[0], {"role": "assistant", "content": "<think></think>"}]
    assert audit_chat([TALK], directory).num_empty_thoughts == 1
    (directory / "chat_template.jinja").write_text(marked.replace("<think>\n\n</think>\n\n", ""))
    assert audit_chat([TALK, written], directory).num_empty_thoughts == 0


def test_what_a_copy_does_not_cover_is_an_error_that_shows_where() -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [TALK[0], {"role": "assistant", "content": "x", "tool_calls": [call]}]
    template = stock("qwen2_5")
    text, _ = template.render(messages)
    with pytest.raises(DataError, match=r"copy 'qwen2_5' does not cover .*<tool_call>"):
        marked_spans("qwen2_5", template, messages, text)


def test_a_changed_template_has_no_copy() -> None:
    text = stock("gemma3").text.replace("<end_of_turn>", "<end>")
    assert find_copy(ChatTemplate(text, VARIABLES)) is None
    assert find_copy(ChatTemplate("{{ raise_exception('no') }}", VARIABLES)) is None
    assert find_copy(ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", VARIABLES)) is None


def test_pad_that_ends_a_turn_is_refused_and_phi_s_is_not(family_dir: Callable[[str], Path]) -> None:
    assert audit_chat([TALK], family_dir("phi3")).num_turns == 2
    directory = family_dir("qwen2_5")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": config["eos_token"]}))
    with pytest.raises(DataError, match=r"conversation 0: the assistant's turn ends with the pad token"):
        audit_chat([TALK], directory)


def test_a_dataset_is_made_with_a_stock_template(
    family_dir: Callable[[str], Path], write_jsonl: Callable[..., Path], prepare: Callable[..., Dataset]
) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"the fox {n}"}]}
        for n in range(30)
    ]
    path = write_jsonl(rows)
    dataset = prepare(path, tokenizer_dir=family_dir("gemma3"))
    assert dataset.manifest.inputs["tokenizer"]["training_copy"] == "gemma3"
    split = dataset.split("train")
    mask = split.loss_mask(0)
    assert mask is not None
    assert dataset.tokenizer().decode(split.tokens(0)[mask].tolist()).endswith("<end_of_turn>")
    # What was trained on is served by the template of the model, not by the copy.
    assert (dataset.tokenizer_dir / "chat_template.jinja").read_text() == stock("gemma3").text
    rows[3]["messages"][1]["tool_calls"] = []
    odd = write_jsonl([*rows, {"messages": [*TALK, *TALK[1:]]}], "odd.jsonl")
    with pytest.raises(DataError, match=r"odd.jsonl:31: the chat template refuses"):
        prepare(odd, tokenizer_dir=family_dir("gemma3"), out="odd")
