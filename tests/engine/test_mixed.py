"""Everything at once: whatever else runs, and by whatever path, a request gets what it gets alone.

Random requests ask for every parameter now and then. They are served together, in a random order, by an
engine that has too few blocks for them, and judged by what a plain engine gives each of them alone.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hearth.engine import Engine, Guided, SamplingParams, llm
from hearth.engine.outputs import EngineStats, RequestOutput
from hearth.engine.plan import Plan

# PEFT reads a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
NUM_BLOCKS = 40  # of 4 tokens: room for two or three of the sequences
ADAPTERS = ["wide", "thin"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": [1, 22, 333]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
FORMS = (
    Guided(json=SCHEMA),
    Guided(regex="[a-f ]{4,30}"),
    Guided(choice=("the quick", "the lazy dog", "fox")),
    Guided(grammar='start: item+\nitem: "ab" | "cd" | /[0-9]{2}/'),
)


@dataclass
class Wish:
    """What a request wants: tokens by ``params``, or an embedding by ``pooling``."""

    name: str
    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    pooling: str | None = None


@dataclass
class Got:
    """What became of one sequence."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    embedding: list[float] | None = None
    reason: str | None = None

    def take(self, output: RequestOutput) -> None:
        assert self.reason is None, "an output after the last"
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += [each.logprob for each in output.logprobs or ()]
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "the prompt was scored twice"
            self.prompt_logprobs = [each and each.logprob for each in output.prompt_logprobs]
        self.embedding = output.embedding
        self.reason = output.finish_reason


Results = dict[tuple[str, int], Got]


def make_wishes(rng: random.Random, count: int, adapters: list[str]) -> list[Wish]:
    """Prompts that share beginnings, some longer than a step, with every parameter now and then."""
    stems = [[rng.randrange(3, 320) for _ in range(rng.choice((12, 25, 40)))] for _ in range(4)]
    wishes = []
    for i in range(count):
        stem = rng.choice(stems)
        prompt = stem[: rng.randrange(1, len(stem) + 1)]
        prompt = prompt + [rng.randrange(3, 320) for _ in range(rng.randrange(6))]
        if rng.random() < 0.12:
            wishes.append(Wish(f"r{i}", prompt, pooling=rng.choice(("mean", "last", "cls"))))
        else:
            wishes.append(Wish(f"r{i}", prompt, make_params(rng, adapters)))
    return wishes


def make_params(rng: random.Random, adapters: list[str]) -> SamplingParams:
    fields: dict[str, Any] = {
        "max_tokens": rng.randrange(1, 28),
        "temperature": rng.choice((0.0, 0.0, 0.3, 1.0)),
        "seed": rng.randrange(100),
        "priority": rng.choice((0, 0, 0, -1, 2)),
        "ignore_eos": rng.random() < 0.5,
    }
    sometimes: dict[str, Any] = {
        "top_p": rng.choice((0.5, 0.9)),
        "top_k": rng.choice((1, 5, 300)),
        "min_p": 0.05,
        "n": rng.choice((2, 3)),
        "stop": rng.choice(("e", ["th", "ü"], [" the ", "a", "9"])),
        "stop_token_ids": [rng.randrange(320) for _ in range(6)],
        "min_tokens": rng.randrange(fields["max_tokens"] + 1),
        "repetition_penalty": 1.2,
        "presence_penalty": 0.6,
        "frequency_penalty": -0.4,
        "logit_bias": {rng.randrange(320): 6.0, rng.randrange(320): -100.0},
        "logprobs": rng.randrange(4),
        "prompt_logprobs": rng.randrange(3),
        "guided": rng.choice(FORMS),
        "adapter": rng.choice(adapters),
        "cache_salt": "tenant",
        "skip_special_tokens": False,
    }
    fields.update({name: value for name, value in sometimes.items() if rng.random() < 0.2})
    if rng.random() < 0.2:
        fields["best_of"] = fields.get("n", 1) + 1
    return SamplingParams(**fields)


def add(engine: Engine, wish: Wish) -> None:
    if wish.pooling is not None:
        engine.add_embedding(wish.name, wish.prompt, wish.pooling)
    else:
        engine.add_request(wish.name, wish.prompt, wish.params)


def take(results: Results, outputs: list[RequestOutput]) -> None:
    for output in outputs:
        results.setdefault((output.request_id, output.index), Got()).take(output)


class Alone:
    """What a plain engine gives each request when there is no other."""

    def __init__(self, engine: Engine, wishes: list[Wish]) -> None:
        self.engine, self.wishes = engine, wishes
        self.results = serve_alone(engine, wishes)
        check_nothing_left(engine)

    def is_close_call(self, wish: Wish) -> bool:
        """Whether a request gets something else if its logits are off by as little as rounding may do.

        The order of additions depends on the batch; a draw between two tokens may fall on either side.
        """
        execute, generator = self.engine.runner.execute, torch.Generator().manual_seed(0)

        def execute_roughly(plan: Any) -> torch.Tensor:
            logits_RV = execute(plan)
            return logits_RV + 1e-5 * (torch.rand(logits_RV.shape, generator=generator) - 0.5)

        self.engine.runner.execute = execute_roughly  # type: ignore[method-assign]
        try:
            replays = [serve_alone(self.engine, [wish]) for _ in range(16)]
        finally:
            self.engine.runner.execute = execute  # type: ignore[method-assign]
        return any(
            got.token_ids != self.results[key].token_ids for replay in replays for key, got in replay.items()
        )


def serve_alone(engine: Engine, wishes: list[Wish]) -> Results:
    results: Results = {}
    for wish in wishes:
        add(engine, wish)
        while engine.has_work:
            take(results, engine.step())
    return results


class Faults:
    """Breaks a step now and then, at different places, if ``rate`` is above 0."""

    def __init__(self, engine: Engine, rng: random.Random, rate: float) -> None:
        self.rng, self.rate = rng, rate
        self.failed: set[str] = set()  # requests that were in a plan that broke
        self.execute, self.choose = engine.runner.execute, llm.choose
        self.propose = None if engine.speculator is None else engine.speculator.drafter.propose

    @contextmanager
    def injected(self, engine: Engine) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if self.rate:
                patch.setattr(engine.runner, "execute", self._execute)
                patch.setattr(llm, "choose", self._choose)
                if engine.speculator is not None:
                    patch.setattr(engine.speculator.drafter, "propose", self._propose)
            yield

    def _strikes(self, plan: Plan) -> bool:
        strikes = self.rng.random() < self.rate / 2
        if strikes:
            self.failed |= {row.request.request_id for row in plan.rows}
        return strikes

    def _execute(self, plan: Plan) -> torch.Tensor:
        if not self._strikes(plan):
            return self.execute(plan)
        kind = self.rng.choice((MemoryError, RuntimeError, KeyboardInterrupt, None))
        if kind is None:
            return torch.full_like(self.execute(plan), float("nan"))
        if self.rng.random() < 0.5:
            self.execute(plan)
        raise kind("as the test wants it")

    def _choose(self, plan: Plan, *arguments: Any) -> Any:
        """Sequences have gained tokens by then, and nobody was told."""
        chosen = self.choose(plan, *arguments)
        if self._strikes(plan):
            raise self.rng.choice((MemoryError, KeyboardInterrupt))("as the test wants it")
        return chosen

    def _propose(self, *arguments: Any) -> bool:
        """An interrupt between two steps hits nobody; drafts and their blocks are left behind."""
        assert self.propose is not None
        usual = self.propose(*arguments)
        if self.rng.random() < self.rate:
            raise KeyboardInterrupt
        return usual


def serve_together(
    engine: Engine, wishes: list[Wish], rng: random.Random, *, fault_rate: float = 0.0
) -> tuple[Results, set[str]]:
    """Add them at random times, abort some; checks every invariant after each step.

    Returns the results and the names of those that were aborted or that a fault may have hit.
    """
    faults = Faults(engine, rng, fault_rate)
    by_name = {wish.name: wish for wish in wishes}
    results: Results = {}
    waiting, aborted = list(wishes), set()
    with faults.injected(engine):
        while waiting or engine.has_work:
            while waiting and rng.random() < 0.35:
                add(engine, waiting.pop(0))
            if rng.random() < 0.05 and engine._sequences:
                name = rng.choice([key[0] for key in engine._sequences])
                take(results, engine.abort(name))
                aborted.add(name)
                if rng.random() < 0.5:  # its id is free at once
                    results = {key: got for key, got in results.items() if key[0] != name}
                    aborted.discard(name)
                    add(engine, by_name[name])
            with suppress(KeyboardInterrupt):
                take(results, engine.step())
            check(engine)
    return results, aborted | faults.failed


def check(engine: Engine) -> None:
    engine.scheduler.check()
    requests = {request.key for request in engine.scheduler.requests}
    assert requests == set(engine._sequences), "a sequence that nobody computes, or that nobody reads"
    assert {key[0] for key in requests} >= set(engine._selections)
    assert engine._num_open == Counter(key[0] for key in requests)
    wanted = {request.adapter_hash for request in engine.scheduler.requests} - {b""}
    assert wanted <= set(engine.adapters._loaded)


def check_nothing_left(engine: Engine) -> None:
    engine.pool.begin_step()
    check(engine)
    stats = engine.stats()
    assert not engine.has_work
    assert not engine._sequences
    assert not engine._selections
    assert stats.num_used_blocks == stats.num_used_host_blocks == 0
    assert len(engine.adapters._loaded) == len(engine.adapters.names)


def compare(wishes: list[Wish], results: Results, alone: Alone, disturbed: set[str]) -> None:
    """Whole outputs must be the same; of ``disturbed`` requests, what there is of them."""
    assert set(results) <= set(alone.results)
    close_calls = 0
    for wish in wishes:
        wanted = {key: want for key, want in alone.results.items() if key[0] == wish.name}
        got = {key: results[key] for key in wanted if key in results}
        wrong = find_wrong(wish, got, wanted, whole=wish.name not in disturbed)
        if wrong:
            close_calls += 1
            assert alone.is_close_call(wish), f"{wrong}: {wish}\n{got}\n{wanted}"
    assert close_calls < 3, "so often that cannot be chance"


def find_wrong(wish: Wish, got: Results, wanted: Results, *, whole: bool) -> str | None:
    if not whole:
        if wish.params.selects:  # of the sequences that there are, the best
            return None
        if not all(each.reason for each in got.values()):
            return "it did not end"
        pairs = ((got[key].token_ids, wanted[key].token_ids) for key in got)
        return None if all(want[: len(part)] == part for part, want in pairs) else "another beginning"
    if set(got) != set(wanted):
        return "sequences are missing"
    for key, want in wanted.items():
        have = got[key]
        if (have.token_ids, have.text, have.reason) != (want.token_ids, want.text, want.reason):
            return "another text"
        for field_name, tolerance in (("logprobs", 1e-3), ("prompt_logprobs", 1e-3), ("embedding", 1e-4)):
            if not close(getattr(have, field_name), getattr(want, field_name), tolerance):
                return f"another {field_name}"
    return None


def close(got: list[Any] | None, want: list[Any] | None, tolerance: float) -> bool:
    if got is None or want is None:
        return got is want
    pairs = list(zip(got, want, strict=False))
    if len(got) != len(want) or any((a is None) != (b is None) for a, b in pairs):
        return False
    return all(abs(a - b) <= tolerance for a, b in pairs if a is not None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, family_model: Any) -> dict[str, Path]:
    paths = {}
    for seed, (name, targets) in enumerate((("wide", ["q_proj", "k_proj", "up_proj"]), ("thin", ["v_proj"]))):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, init_lora_weights=False, target_modules=targets)
        paths[name] = tmp_path_factory.mktemp(name)
        get_peft_model(family_model("llama"), settings).save_pretrained(paths[name])
    return paths


def open_engine(model_dir: Path, adapters: dict[str, Path], **settings: Any) -> Engine:
    engine = Engine.load(model_dir, block_size=4, max_model_len=100, num_threads=1, seed=0, **settings)
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    if engine.speculator is not None:  # whether drafts pay is not the question here
        engine.speculator.gate.wants_drafts = lambda num_sequences: True  # type: ignore[method-assign]
    if engine.scheduler.costs.bytes_per_second is not None:
        engine.scheduler.costs.bytes_per_second = 1e30
    return engine


@pytest.fixture(scope="module")
def alone(model_dir: Path, adapters: dict[str, Path]) -> Iterator[Callable[[int, int], Alone]]:
    """Random requests by seed and number, and what they get alone; each made once for all paths."""
    with open_engine(model_dir, adapters, prefix_cache=False) as plain:
        yield functools.cache(
            lambda seed, count: Alone(plain, make_wishes(random.Random(seed), count, ADAPTERS))
        )


def run(
    alone: Alone, seed: int, model_dir: Path, adapters: dict[str, Path], *, faults: float, **settings: Any
) -> EngineStats:
    """Serve the requests together in a tight engine and compare; returns what the engine has done."""
    wishes, rng = alone.wishes, random.Random(seed)
    token_bytes = sum(kv.spec.bytes_per_token(torch.float32) for kv in alone.engine.runner.layers)
    if settings.get("speculation") == "model":
        settings["speculation"] = str(model_dir)
        token_bytes *= 2
    memory = NUM_BLOCKS * 4 * token_bytes
    tight = {"kv_cache_memory": memory, "max_num_batched_tokens": 24, "max_num_seqs": 6}
    with open_engine(model_dir, adapters, **tight, **settings) as engine:
        for layer in engine.runner.layers:  # what nobody has written must reach nobody
            for part in layer.pool.parts:
                part.fill_(float("nan"))
        results, disturbed = serve_together(engine, wishes, rng, fault_rate=faults)
        compare(wishes, results, alone, disturbed)
        check_nothing_left(engine)
        again = [wish for wish in wishes if wish.name in disturbed]
        compare(again, serve_alone(engine, again), alone, set())
        check_nothing_left(engine)
        return engine.stats()


PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swap": {"swap_memory": 10**6},
    "ngram": {"speculation": "ngram", "num_draft_tokens": 3},
    "draft model and swap": {"speculation": "model", "swap_memory": 10**6},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("faults", [0.0, 0.06])
def test_a_request_gets_what_it_gets_alone(
    path: str, faults: float, alone: Any, model_dir: Path, adapters: dict[str, Path]
) -> None:
    stats = run(alone(1, 60), 1, model_dir, adapters, faults=faults, **PATHS[path])
    assert stats.num_preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert stats.num_blocks_swapped_in == 0 or "swap" in path
    assert stats.num_blocks_swapped_in > 0 or "swap" not in path or faults
    assert (stats.num_accepted_tokens > 0) == ("speculation" in PATHS[path])
    assert (stats.num_failed_steps > 0) == (faults > 0)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", range(2, 5))
def test_many_requests_get_what_they_get_alone(
    seed: int, path: str, alone: Any, model_dir: Path, adapters: dict[str, Path]
) -> None:
    run(alone(seed, 120), seed, model_dir, adapters, faults=0.01 * (seed % 3), **PATHS[path])
