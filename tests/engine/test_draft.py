"""Speculation changes how fast tokens come, and nothing else."""

from __future__ import annotations

import random
from collections import Counter, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from hearth.engine import Completion, Engine, SamplingParams
from hearth.engine.draft.drafter import grant
from hearth.engine.draft.gate import BatchRecord, Gate, Sample, batch_key, decide, pays
from hearth.engine.draft.model import ModelDrafter
from hearth.engine.draft.speculator import Speculator
from hearth.engine.plan import Plan
from hearth.engine.pool import BlockPool
from hearth.engine.request import Request
from hearth.engine.scheduler import Scheduler
from hearth.errors import ConfigError, ModelError

GREEDY = SamplingParams(max_tokens=40, temperature=0)


def make(model: Any, tokenizer: Any = None, **fields: Any) -> Engine:
    """Plain kernels, which need no compiling; one of the paths below runs the compiled ones."""
    return Engine.from_model(model, tokenizer, **{"attention": "torch", "native": False, **fields})


class OpenGate(Gate):
    """Drafts always: these tests are about what drafts do, not about when they pay."""

    def wants_drafts(self, num_sequences: int) -> bool:
        return num_sequences > 0


@pytest.fixture(scope="module")
def draft_dir(family_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a draft model: "same" as the target, a "noisy" copy of it, or an "other" one."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, family: str) -> Path:
        if (kind, family) in made:
            return made[kind, family]
        path = made[kind, family] = tmp_path_factory.mktemp(f"{kind}-{family}")
        model = family_model(family) if kind != "other" else family_model("llama", num_hidden_layers=1)
        if kind == "noisy":
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise * parameter.std() * 0.03 if parameter.numel() > 1 else 0.0)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


def speculator_of(engine: Engine, *, gate: Gate | None = None) -> Speculator:
    assert engine.speculator is not None
    engine.speculator.gate = gate or OpenGate()
    return engine.speculator


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Generate step by step, checking every invariant after each."""
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.token_ids
        engine.scheduler.check()
        if engine.speculator is not None:
            assert not engine.speculator.is_broken
            if isinstance(engine.speculator.drafter, ModelDrafter):
                engine.speculator.drafter.check(engine.scheduler.running)
    assert engine.pool.num_used == 0
    return list(tokens.values())


# -- the same tokens -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ngram", "noisy"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "gpt2",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen3", "gemma2", "mixtral", "gpt_oss")),
    ],
)
def test_greedy_tokens_are_the_same(
    family: str, kind: str, family_model: Any, prompts: list[list[int]], draft_dir: Any
) -> None:
    with make(family_model(family)) as engine:
        expected = run(engine, prompts, GREEDY)
    speculation = "ngram" if kind == "ngram" else str(draft_dir(kind, family))
    with make(family_model(family), speculation=speculation) as engine:
        speculator_of(engine)
        assert run(engine, prompts, GREEDY) == expected
        stats = engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens, "both outcomes must occur"
    assert stats.num_drafts <= stats.num_draft_tokens
    assert stats.generation_tokens == sum(map(len, expected))


PATHS: dict[str, dict[str, Any]] = {
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 20": {"max_num_batched_tokens": 20},
    "one token at a time": {"max_num_batched_tokens": 1},
    "one sequence at a time": {"max_num_seqs": 1},
    "no prefix cache": {"prefix_cache": False, "block_size": 4},
    "blocks of one token": {"block_size": 1},
    "many drafts": {"num_draft_tokens": 11, "block_size": 4},
    "one draft": {"num_draft_tokens": 1},
    "compiled kernels": {"attention": "auto", "native": True},
}


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=pytest.mark.slow) if p == "compiled kernels" else p for p in PATHS]
)
@pytest.mark.parametrize("kind", ["ngram", "noisy", "other"])
def test_same_tokens_by_every_path(
    path: str, kind: str, family_model: Any, prompts: list[list[int]], draft_dir: Any
) -> None:
    with make(family_model("llama"), max_model_len=128) as engine:
        expected = run(engine, prompts, GREEDY)
    speculation = "ngram" if kind == "ngram" else str(draft_dir(kind, "llama"))
    with make(family_model("llama"), max_model_len=128, speculation=speculation, **PATHS[path]) as engine:
        speculator_of(engine)
        assert run(engine, prompts, GREEDY) == expected


@pytest.mark.parametrize("kind", ["ngram", "noisy", "same"])
def test_same_tokens_after_preemption(
    kind: str, family_model: Any, prompts: list[list[int]], draft_dir: Any
) -> None:
    with make(family_model("qwen3")) as engine:
        expected = run(engine, prompts, GREEDY)
    bytes_per_token = 3 * 2 * 2 * 24 * 4 * (1 if kind == "ngram" else 2)
    with make(
        family_model("qwen3"),
        speculation="ngram" if kind == "ngram" else str(draft_dir(kind, "qwen3")),
        block_size=4,
        max_model_len=100,
        kv_cache_memory=bytes_per_token * 100,
    ) as engine:
        assert engine.pool.num_blocks == 25, "the draft model's keys and values count"
        speculator_of(engine)
        assert run(engine, prompts, GREEDY) == expected
        stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_accepted_tokens > 0
    if kind == "same":
        assert stats.num_accepted_tokens == stats.num_draft_tokens, (
            "it must know exactly what it has computed"
        )


@pytest.mark.parametrize("kind", ["ngram", "same"])
def test_same_tokens_after_prefix_hits(kind: str, family_model: Any, draft_dir: Any) -> None:
    shared = list(range(10, 50))
    batch = [[*shared, 7], [*shared, 8, 9], shared]
    with make(family_model("llama"), block_size=8) as engine:
        expected = run(engine, batch, GREEDY)
    speculation = "ngram" if kind == "ngram" else str(draft_dir(kind, "llama"))
    with make(family_model("llama"), block_size=8, speculation=speculation) as engine:
        speculator = speculator_of(engine)
        for _ in range(2):
            assert run(engine, batch, GREEDY) == expected
        assert engine.stats().prefix_hit_tokens > 0
        # Blocks that only the target has filled: the draft model was off meanwhile.
        engine.speculator = None
        other = [[*range(60, 100), 5]]
        run(engine, other, GREEDY)
        engine.speculator = speculator
        run(engine, [[*other[0], 6]], GREEDY)
        stats = engine.stats()
    if kind == "same":
        assert stats.num_accepted_tokens == stats.num_draft_tokens


def complete(engine: Engine, prompts: list[Any], params: SamplingParams) -> list[Completion]:
    if engine.speculator is not None:
        speculator_of(engine)
    return engine.generate(prompts, params)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.0, "seed": 4, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.8, "seed": 5, "top_k": 5, "n": 3},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.7},
        {"temperature": 0.5, "seed": 6, "frequency_penalty": 0.3, "logit_bias": {9: 4.0}},
        {"temperature": 0, "min_tokens": 20, "stop_token_ids": tuple(range(100, 140))},
        {"temperature": 0, "stop": ("e", "o", "\u00fc")},
        {"temperature": 0.3, "seed": 1, "stop": "the", "min_tokens": 5},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 0.9, "seed": 2, "logprobs": 2, "frequency_penalty": 0.2},
        {"temperature": 0, "max_tokens": 2},
        {"temperature": 0, "max_tokens": 1},
    ],
)
@pytest.mark.parametrize("kind", ["ngram", "noisy"])
def test_every_parameter_means_the_same(
    kind: str, fields: dict[str, Any], family_model: Any, tokenizer: Any, draft_dir: Any
) -> None:
    params = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **fields})
    batch = ["the quick brown fox", [5, 6, 7] * 8, "日本語 the end of the day"]
    settings: dict[str, Any] = {"max_model_len": 200, "block_size": 8}
    with make(family_model("llama"), tokenizer, **settings) as engine:
        expected = complete(engine, batch, params)
    speculation = "ngram" if kind == "ngram" else str(draft_dir(kind, "llama"))
    with make(family_model("llama"), tokenizer, speculation=speculation, **settings) as engine:
        got = complete(engine, batch, params)
        if params.max_tokens != 1:
            assert engine.stats().num_draft_tokens > 0 or params.max_tokens == 2
    for one, other in zip(expected, got, strict=True):
        assert other.token_ids == one.token_ids
        assert (other.text, other.finish_reason) == (one.text, one.finish_reason)
        assert (one.logprobs is None) == (other.logprobs is None)
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert a.token_id == b.token_id
            assert b.logprob == pytest.approx(a.logprob, abs=1e-3)
            assert [token for token, _ in b.top] == [token for token, _ in a.top]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "noisy"])
def test_draws_without_a_seed_have_the_same_distribution(
    kind: str, family_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    def model(layers: int = 2) -> Any:
        return family_model("llama", vocab_size=24, num_hidden_layers=layers, hidden_size=32)

    model(1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    params = SamplingParams(max_tokens=5, temperature=0.9, top_k=6, ignore_eos=True)
    prompt = [5, 6, 7, 8, 9, 5, 6, 7, 10, 6, 11, 7]
    counts = []
    for speculation, seed in ((None, 1), ("ngram" if kind == "ngram" else str(tmp_path), 2)):
        with make(
            model(), speculation=speculation, seed=seed, max_model_len=32, max_num_seqs=256, block_size=8
        ) as engine:
            completions = complete(engine, [prompt] * 4000, params)
            stats = engine.stats()
        # The first token never had a draft: the question is what comes after it.
        counts.append(Counter(tuple(c.token_ids[:3]) for c in completions))
    assert 200 < stats.num_accepted_tokens < stats.num_draft_tokens
    frequent = [key for key, count in (counts[0] + counts[1]).items() if count >= 20]
    assert len(frequent) > 10
    table = [[each[key] for key in frequent] for each in counts]
    for row, each in zip(table, counts, strict=True):
        row.append(each.total() - sum(row))
    assert chi2_contingency(table).pvalue > 0.001


# -- who accepts what ------------------------------------------------------------------------------------
def test_a_draft_model_like_the_target_is_always_right(
    family_model: Any, prompts: list[list[int]], draft_dir: Any
) -> None:
    with make(family_model("llama"), speculation=str(draft_dir("same", "llama"))) as engine:
        speculator_of(engine)
        run(engine, prompts, SamplingParams(max_tokens=41, temperature=0, ignore_eos=True))
        stats = engine.stats()
    assert stats.num_accepted_tokens == stats.num_draft_tokens
    # Without drafts the prompts' own step gives one token; then 40 tokens take 8 steps of 1 + 4.
    assert stats.num_steps <= 10


class FakeClock:
    """Time passes only in forward passes: one second in the target's, ``draft_cost`` in the draft model's."""

    def __init__(self, engine: Engine, draft_cost: float) -> None:
        self.now = 0.0
        speculator = engine.speculator
        assert speculator is not None
        speculator.clock = lambda: self.now
        self._listen(engine.runner.model, 1.0)
        if isinstance(speculator.drafter, ModelDrafter):
            self._listen(speculator.drafter.runner.model, draft_cost)

    def _listen(self, model: torch.nn.Module, cost: float) -> None:
        def hook(*_: object) -> None:
            self.now += cost

        model.register_forward_hook(hook)


@pytest.mark.parametrize(("kind", "stays_on"), [("other", False), ("same", True)])
def test_a_draft_model_that_is_wrong_is_switched_off(
    kind: str, stays_on: bool, family_model: Any, draft_dir: Any
) -> None:
    directory = str(draft_dir(kind, "llama"))
    with make(family_model("llama"), speculation=directory) as engine:
        FakeClock(engine, 0.2)
        run(engine, [[5, 6, 7]], SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
        stats = engine.stats()
        assert engine.speculator is not None
        record = engine.speculator.gate.records[1]
    assert record.is_on is stays_on
    if stays_on:
        assert stats.num_steps < 70
    else:
        assert stats.num_accepted_tokens < 0.3 * stats.num_draft_tokens
        assert stats.num_drafts <= 20, "few steps to learn that it does not pay, and few to ask again"


def test_a_drafter_that_breaks_costs_no_request(
    family_model: Any, prompts: list[list[int]], draft_dir: Any
) -> None:
    with make(family_model("llama")) as engine:
        expected = run(engine, prompts, GREEDY)
    with make(family_model("llama"), speculation=str(draft_dir("noisy", "llama"))) as engine:
        speculator = speculator_of(engine)
        assert isinstance(speculator.drafter, ModelDrafter)
        calls = iter(range(1000))

        def explode(*_: object) -> None:
            if next(calls) == 9:
                raise RuntimeError("no luck")

        speculator.drafter.runner.model.register_forward_pre_hook(explode)
        assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == expected
        assert speculator.is_broken
        engine.scheduler.check()
        assert engine.pool.num_used == 0


def test_drafts_that_a_grammar_refuses_are_cut(family_model: Any, prompts: list[list[int]]) -> None:
    with make(family_model("llama")) as engine:
        expected = run(engine, prompts, GREEDY)
    with make(family_model("llama"), speculation="ngram") as engine:
        speculator_of(engine).num_valid = lambda request: min(1, len(request.draft_ids))
        assert run(engine, prompts, GREEDY) == expected
        stats = engine.stats()
    assert stats.num_draft_tokens == stats.num_drafts > 0


# -- what is refused -------------------------------------------------------------------------------------
def test_a_draft_model_of_another_vocabulary_is_refused(
    family_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    family_model("llama", vocab_size=300).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=r"300 tokens.*320"):
        make(family_model("llama"), speculation=str(tmp_path / "small"))
    with pytest.raises(ModelError, match="nowhere"):
        make(family_model("llama"), speculation=str(tmp_path / "nowhere"))


def test_a_draft_model_with_other_tokens_is_refused(
    family_model: Any, tokenizer: Any, draft_dir: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    assert '"the"' in text
    (tmp_path / "tokenizer.json").write_text(text.replace('"</s>"', '"<end>"'))
    family_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="<"):
        make(family_model("llama"), tokenizer, speculation=str(tmp_path))
    with make(family_model("llama"), tokenizer, speculation=str(draft_dir("noisy", "llama"))) as engine:
        assert engine.speculator is not None


def test_a_draft_model_of_a_shorter_context_stops_there(
    family_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    family_model("llama", max_position_embeddings=32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    batch = [[5, 6, 7], [9] * 50]
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    with make(family_model("llama")) as engine:
        expected = run(engine, batch, params)
    with make(family_model("llama"), speculation=str(tmp_path)) as engine:
        speculator_of(engine)
        assert run(engine, batch, params) == expected
        assert 0 < engine.stats().num_accepted_tokens <= 32


# -- how many drafts fit ---------------------------------------------------------------------------------
def commit_step(
    scheduler: Scheduler, plan: Plan, accept: list[int], rng: random.Random, done: list[Request]
) -> None:
    """Play model and sampler: of each row's drafts some are right, one more token comes, some end."""
    for row in plan.rows:
        if not row.samples:
            continue
        request = row.request
        drafts = row.token_ids[row.num_tokens - row.num_drafts :]
        right = min(rng.choice(accept), len(drafts))
        for token in [*drafts[:right], rng.randrange(50)]:
            request.tokens.append(token)
            assert request.num_output_tokens <= request.max_new_tokens, "drafts beyond the end"
        if request.num_output_tokens == request.max_new_tokens:
            scheduler.finish(request, "length")
            done.append(request)
        else:
            scheduler.settle(request)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_drafts_take_nothing_from_others(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 8])
    budget = rng.randint(1, 40)
    pool = BlockPool(rng.randint(48, 90) // block_size, block_size)
    scheduler = Scheduler(pool, max_num_seqs=rng.randint(1, 9), max_num_batched_tokens=budget)
    capacity = pool.num_blocks * block_size
    done: list[Request] = []
    for i in range(20):
        max_new = rng.randint(1, 20)
        prompt = [rng.randrange(50) for _ in range(rng.randint(1, 24))][: capacity - max_new]
        scheduler.add(Request(f"r{i}", 0, prompt, SamplingParams(max_tokens=max_new), max_new))
    while scheduler.has_work:
        running = list(scheduler.running)
        lacking = sum(
            max(0, pool.blocks_for(min(len(r.tokens), r.num_computed + budget)) - len(r.block_ids))
            for r in running
        )
        fits = lacking <= pool.num_available
        for request, count in grant(running, pool, budget, 5).items():
            request.draft_ids = [rng.randrange(50) for _ in range(rng.randint(0, count))]
        num_drafts = sum(len(r.draft_ids) for r in running)
        plan = scheduler.schedule()
        if fits:
            assert not plan.preempted, "drafts must not cost anyone its blocks"
        assert plan.num_tokens <= budget
        # The scheduler itself may cut more of them, to keep blocks for the sequences that come next.
        assert sum(row.num_drafts for row in plan.rows) <= num_drafts
        if num_drafts:
            assert {r.key for r in running} <= {row.request.key for row in plan.rows}
        commit_step(scheduler, plan, [0, 0, 1, 5], rng, done)
        scheduler.check()
    assert len(done) == 20
    assert pool.num_used == 0


# -- when it pays ----------------------------------------------------------------------------------------
positive = st.floats(1e-4, 1e3)


def record_of(plain: list[Sample], drafted: list[Sample], **fields: Any) -> BatchRecord:
    return BatchRecord(deque(plain), deque(drafted), **fields)


@settings(deadline=None)
@given(positive, positive, st.floats(1.0, 8.0), st.booleans(), positive)
def test_pays_is_a_comparison_of_rates(
    plain_seconds: float, drafted_seconds: float, tokens: float, is_on: bool, unit: float
) -> None:
    def answer(tokens: float, plain: float, drafted: float) -> bool:
        return pays(record_of([Sample(1.0, plain)] * 5, [Sample(tokens, drafted)] * 5, is_on=is_on))

    gain = tokens / drafted_seconds * plain_seconds
    if gain > 1.03:
        assert answer(tokens, plain_seconds, drafted_seconds)
    if gain < 0.99:
        assert not answer(tokens, plain_seconds, drafted_seconds)
    if answer(tokens, plain_seconds, drafted_seconds):
        # Better acceptance, quicker drafts or dearer plain steps cannot turn it off; nor can a unit of time.
        assert answer(tokens + 0.5, plain_seconds, drafted_seconds)
        assert answer(tokens, plain_seconds * 2, drafted_seconds)
        assert answer(tokens, plain_seconds, drafted_seconds / 2)
        if not 0.99 < gain < 1.03:
            assert answer(tokens, plain_seconds * unit, drafted_seconds * unit)


@settings(deadline=None)
@given(st.floats(0.05, 5.0), st.floats(0.0, 4.0), st.integers(1, 300))
def test_the_gate_finds_the_better_way_and_keeps_to_it(cost: float, accepted: float, batch: int) -> None:
    """A step with drafts takes 1 + ``cost`` and gains 1 + ``accepted`` tokens a sequence."""
    gate = Gate()
    num_drafted = 0
    for _ in range(2000):
        drafted = gate.wants_drafts(batch)
        num_drafted += drafted
        gate.record(
            batch,
            drafted=drafted,
            tokens=round(batch * (1 + accepted * drafted)),
            seconds=1.0 + cost * drafted,
        )
    gain = round(batch * (1 + accepted)) / batch / (1 + cost)
    if gain > 1.03:
        assert num_drafted > 0.9 * 2000
    if gain < 0.99:
        assert num_drafted < 0.02 * 2000


def test_the_gate_follows_a_text_that_changes() -> None:
    gate = Gate()

    def steps(count: int, accepted: float) -> int:
        num_drafted = 0
        for _ in range(count):
            drafted = gate.wants_drafts(4)
            num_drafted += drafted
            gate.record(
                4, drafted=drafted, tokens=4 + round(4 * accepted * drafted), seconds=1 + 0.5 * drafted
            )
        return num_drafted

    assert steps(300, 2.0) > 250
    assert steps(300, 0.0) < 60
    assert steps(1000, 2.0) > 600


def test_a_single_slow_step_changes_nothing() -> None:
    gate = Gate()
    for i in range(200):
        drafted = gate.wants_drafts(1)
        gate.record(1, drafted=drafted, tokens=1 + drafted, seconds=100.0 if i == 50 else 1 + 0.3 * drafted)
    assert gate.records[1].is_on


def test_no_drafts_above_a_batch_size_where_they_lose() -> None:
    gate = Gate()
    for _ in range(60):
        drafted = gate.wants_drafts(8)
        gate.record(8, drafted=drafted, tokens=8 + drafted, seconds=1.0 + drafted)
    assert not decide(gate.records, 8)
    assert not gate.wants_drafts(64)
    assert gate.wants_drafts(2), "a smaller batch may gain"
    tried = 0
    for _ in range(70):
        drafted = gate.wants_drafts(64)
        tried += drafted
        gate.record(64, drafted=drafted, tokens=64 + drafted, seconds=1.0 + drafted)
    assert 0 < tried <= 5, "tried again now and then"


@settings(deadline=None)
@given(st.integers(1, 100_000))
def test_batches_that_are_judged_together_are_of_similar_size(num_sequences: int) -> None:
    key = batch_key(num_sequences)
    assert key <= num_sequences < key * 1.25 + 1
    assert batch_key(key) == key
