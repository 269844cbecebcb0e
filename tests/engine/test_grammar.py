"""Structured output: whatever a random model says at temperature 1 has the form that was asked for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from hearth.engine import AsyncEngine, Engine, SamplingParams
from hearth.engine.grammar import GrammarCompiler
from hearth.engine.outputs import Completion
from hearth.engine.params import Guided
from hearth.errors import EngineError, RequestError

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "address": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/address"}]},
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"const": {"x": [1, "two", None]}},
    {"oneOf": [{"type": "integer", "minimum": 5, "maximum": 7}, {"enum": ["Grüße", "日本"]}]},
]
ARITHMETIC = """
start: term (("+" | "-") term)~0..2
term: NUMBER | "(" start ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


@pytest.fixture(scope="module")
def engine(family_model: Any, tokenizer: Any) -> Iterator[Engine]:
    model = family_model("llama", max_position_embeddings=512)
    with Engine.from_model(model, tokenizer, block_size=8, max_num_batched_tokens=64) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine: Engine = request.getfixturevalue("engine")
        engine.scheduler.check()
        assert not engine.has_work
        assert engine.pool.num_used == 0


def params(seed: int = 0, **fields: Any) -> SamplingParams:
    guided = {name: fields.pop(name) for name in ("json", "regex", "grammar", "choice") if name in fields}
    return SamplingParams(**{"seed": seed, "max_tokens": 200, "guided": Guided(**guided), **fields})


def check(completion: Completion, asked: SamplingParams) -> None:
    """A finished text has its form; one that was cut may not, and nothing else may happen."""
    guided, text = asked.guided, completion.text
    assert guided is not None
    assert completion.finish_reason in ("stop", "length")
    if completion.finish_reason == "length":
        assert len(completion.token_ids) == asked.max_tokens
    elif guided.json is not None:
        jsonschema.validate(json.loads(text), guided.json)
    elif guided.regex is not None:
        assert re.fullmatch(guided.regex, text)
    elif guided.choice:
        assert text in guided.choice
    else:
        assert re.fullmatch(r"[0-9()+-]+", text)
        eval(compile(text, "<output>", "eval"))


def test_many_grammars_beside_free_requests(engine: Engine) -> None:
    asked = [params(seed, json=schema) for seed in range(4) for schema in SCHEMAS]
    asked += [params(seed, regex=r"([a-f]{2,4}-){1,3}ü?x*") for seed in range(3)]
    asked += [params(seed, choice=("ja", "jawohl", 'nein "x"\n', "🎉日本", "a\\b/")) for seed in range(8)]
    asked += [params(seed, grammar=ARITHMETIC) for seed in range(4)]
    free = [SamplingParams(max_tokens=30, seed=seed, ignore_eos=True) for seed in range(4)]
    prompts = [[5 + i, 60, 61] for i in range(len(asked))]
    before = engine.generate(prompts[:4], free)
    together = engine.generate(prompts + prompts[:4], asked + free)
    for completion, wanted in zip(together, asked, strict=False):
        check(completion, wanted)
    assert [c.token_ids for c in together[-4:]] == [c.token_ids for c in before]
    finished = [c for c in together[: len(asked)] if c.finish_reason == "stop"]
    assert len(finished) > 20
    assert len({c.text for c in finished}) > 15


def test_the_same_after_preemption(engine: Engine, family_model: Any, tokenizer: Any) -> None:
    asked = [params(seed, json=schema, max_tokens=60) for seed in range(2) for schema in SCHEMAS]
    prompts = [[5 + i, 60, 61] for i in range(len(asked))]
    calm = engine.generate(prompts, asked)
    model = family_model("llama", max_position_embeddings=512)
    block_bytes = engine.runner.num_bytes // engine.pool.num_blocks
    with Engine.from_model(
        model, tokenizer, max_model_len=80, block_size=8, kv_cache_memory=14 * block_bytes
    ) as tight:
        pressed = tight.generate(prompts, asked)
        assert tight.stats().num_preemptions > 0
    assert [c.token_ids for c in pressed] == [c.token_ids for c in calm]


def test_schema_as_text_and_any_object(engine: Engine) -> None:
    asked = [
        params(s, json=json.dumps({"type": "object", "maxProperties": 2}), max_tokens=80) for s in range(6)
    ]
    for completion in engine.generate([[9]] * 6, asked):
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)
        else:
            assert completion.text.startswith("{")


def test_the_grammar_wins_over_everything_else(engine: Engine) -> None:
    """Bias, min_tokens, ignore_eos, stop tokens and stop texts neither break the form nor leave it stuck."""
    dog = engine.encode("dog")
    everything: list[dict[str, Any]] = [
        {"min_tokens": 50},
        {"ignore_eos": True},
        {"ignore_eos": True, "min_tokens": 50},
        {"stop_token_ids": tuple(dog)},
        {"logit_bias": dict.fromkeys(dog, -100.0)},
        {"logit_bias": {2: 100.0, 200: 100.0}},
        {"stop": ("o", "d")},
        {"repetition_penalty": 50.0, "temperature": 0.0},
    ]
    for fields in everything:
        asked = [params(seed, choice=("dog", "dodo"), **fields) for seed in range(3)]
        for completion in engine.generate([[9, 8]] * 3, asked):
            assert completion.text in ("dog", "dodo"), fields
            assert completion.finish_reason == "stop"


def test_ends_only_where_the_text_may_end(engine: Engine) -> None:
    """The end of sequence has all the odds, and still the shortest text is whole."""
    asked = params(regex="a{3,6}", logit_bias={2: 100.0})
    assert engine.generate([[9]], asked)[0].text == "aaa"
    late = params(regex="a{3,6}", logit_bias={2: 100.0}, min_tokens=5)
    completion = engine.generate([[9]], late)[0]
    assert re.fullmatch("a{3,6}", completion.text)
    assert len(completion.token_ids) >= 5
    assert engine.generate([[9]], params(regex="a{3,6}", ignore_eos=True))[0].text == "aaaaaa"


def test_a_stop_text_ends_what_is_complete_without_it(engine: Engine) -> None:
    asked = params(regex="(ab){2}(xy)*", stop="x", logit_bias={2: -100.0})
    assert engine.generate([[9]], asked)[0].text == "abab"
    passed = params(regex="axb", stop="x")
    assert engine.generate([[9]], passed)[0].text == "axb"


def test_a_stop_token_ends_like_the_end_of_sequence(engine: Engine) -> None:
    token = 1  # <s>, a token that no text has
    asked = params(regex="a{2,9}", stop_token_ids=(token,), logit_bias={token: 100.0})
    completion = engine.generate([[9]], asked)[0]
    assert (completion.text, completion.token_ids[-1], completion.finish_reason) == ("aa", token, "stop")


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": "{"}, "JSON"),
        ({"json": {"x": {1, 2}}}, "JSON"),
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": "a\\"}, "unpaired backslash"),
        ({"json": "true"}, "a schema is an object"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": "%%%"}, "guided.grammar cannot be compiled"),
        ({"choice": ("\ud83c",)}, "surrogates"),
        ({"regex": "x" * (2**20 + 1)}, "characters"),
    ],
)
def test_what_cannot_be_compiled_is_refused(engine: Engine, form: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)) as caught:
        engine.add_request("bad", [5], params(**form))
    assert caught.value.param == "guided"


def test_an_engine_without_a_tokenizer_refuses(family_model: Any) -> None:
    with Engine.from_model(family_model("llama"), max_model_len=64) as engine:
        with pytest.raises(RequestError, match="tokenizer") as caught:
            engine.generate([[5]], params(regex="a"))
        assert caught.value.param == "guided"


def test_a_grammar_that_no_token_continues_ends_with_an_error(family_model: Any) -> None:
    """A vocabulary without digits cannot write a number."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "b": 2}, merges=[]))
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")
    model = family_model("llama", eos_token_id=0)
    with Engine.from_model(model, tokenizer, max_model_len=64) as engine:
        with pytest.raises(EngineError, match="no tokens for"):
            engine.generate([[1]], params(regex="a[0-9]"))
        assert engine.generate([[1]], params(regex="ab"))[0].text == "ab"
        assert engine.pool.num_used == 0


def test_a_grammar_that_grows_too_complex_ends_with_an_error(engine: Engine) -> None:
    """It compiles, and llguidance gives up on the way: what there is then is not of the form."""
    with pytest.raises(EngineError, match="too complex"):
        engine.generate([[5]], params(regex="a{100000000}"))
    assert engine.generate([[5]], params(regex="a{3}"))[0].text == "aaa"


def test_sentencepiece_vocabularies(family_model: Any) -> None:
    """Words begin with a mark for the blank before them, and bytes have tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {name: i for i, name in enumerate([*names, "▁", "a", "b", "c", "▁a", "ab"])}
    pieces = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>")
    )
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>")
    with Engine.from_model(family_model("llama"), tokenizer, max_model_len=64) as engine:
        asked = [params(seed, regex="[abc]{2}( a){2}日", max_tokens=50) for seed in range(4)]
        for completion in engine.generate([[vocab["▁a"], vocab["b"]]] * 4, asked):
            assert re.fullmatch("[abc]{2}( a){2}日", completion.text)


def test_compiled_grammars_are_kept_and_sequences_apart(tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer, 320, (2,))
    form = Guided(regex="ab|ac")
    assert compiler.compile(form) is compiler.compile(Guided(regex="ab|ac"))
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    first, second = compiler.start(form, ()), compiler.start(form, ())
    assert not first.advance(a)
    assert np.flatnonzero(first.allowed_tokens()).tolist() == sorted([b, c])
    assert a in np.flatnonzero(second.allowed_tokens())
    assert (first.validate([b]), first.validate([a]), second.validate([a, c, b])) == (1, 0, 2)
    assert not first.is_complete
    first.advance(b)
    assert first.is_complete
    assert first.is_finished
    assert first.accepts("ac")
    assert not first.accepts("a")


def test_whitespace_in_json_is_bounded(tokenizer: Any) -> None:
    grammar = GrammarCompiler(tokenizer, 320, (2,)).start(Guided(json={"type": "array", "maxItems": 2}), ())
    for text in ("[1,2]", "[1, 2]", "[\n    1,\n    2\n]", "[" + " " * 24 + "1]"):
        assert grammar.accepts(text), text
    for text in ("[" + " " * 25 + "1]", "[\n\n1]", " [1]"):
        assert not grammar.accepts(text), text
    strict = Guided(json={"type": "array", "x-guidance": {"whitespace_flexible": False}})
    grammar = GrammarCompiler(tokenizer, 320, (2,)).start(strict, ())
    assert grammar.accepts("[1,2]")
    assert not grammar.accepts("[1, 2]")


async def test_compiling_holds_up_nobody(model_dir: Path) -> None:
    """In the engine's process grammars compile beside the loop: refusals, aborts and results come as ever."""
    engine = await AsyncEngine.start(model_dir, max_model_len=128, num_threads=1)

    async def text(asked: SamplingParams, name: str | None = None) -> str:
        return "".join([output.text async for output in engine.generate([5], asked, name)])

    try:
        slow = params(json={"type": "object", "properties": {f"p{i}": {"enum": [i]} for i in range(3000)}})
        waiting = asyncio.create_task(text(slow, "slow"))
        free = asyncio.create_task(text(SamplingParams(max_tokens=5, ignore_eos=True)))
        good = asyncio.create_task(text(params(choice=("yes", "no"))))
        await asyncio.sleep(0)
        await engine.abort("slow")
        assert await waiting == ""
        assert await good in ("yes", "no")
        await free
        with pytest.raises(RequestError, match="unclosed group") as caught:
            await text(params(regex="a("))
        assert caught.value.param == "guided"
        assert (await engine.stats()).num_used_blocks == 0
    finally:
        await engine.close()


def test_warming_up_reads_the_tokenizer_and_is_silent_without_one(tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer, 320, [2])
    compiler.warm_up()
    read = compiler._tokenizer
    assert read is not None
    compiler.compile(Guided(regex="a+"))
    assert compiler._tokenizer is read
    bare = GrammarCompiler(None, 320, [2])
    bare.warm_up()
    with pytest.raises(RequestError, match="none"):
        bare.compile(Guided(regex="a+"))
