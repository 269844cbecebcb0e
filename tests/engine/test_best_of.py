"""The best n of several sequences, by their mean log-probability under transformers' model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hearth.engine import Engine, SamplingParams
from hearth.engine.best_of import BestOf
from hearth.engine.outputs import RequestOutput
from hearth.errors import RequestError


@pytest.fixture(scope="module")
def engine(family_model: Any) -> Iterator[Engine]:
    with Engine.from_model(family_model("llama"), max_model_len=64, block_size=8) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine: Engine = request.getfixturevalue("engine")
        engine.scheduler.check()
        assert not engine.has_work
        assert not engine._selections
        assert engine.pool.num_used == 0


def sampled(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 10, "seed": 3, "logit_bias": {2: 6.0}, **fields})


def mean_logprob(model: Any, prompt: list[int], tokens: list[int]) -> float:
    with torch.inference_mode():
        logprobs_TV = torch.log_softmax(model(torch.tensor([prompt + tokens])).logits[0].double(), -1)
    first = len(prompt) - 1
    return sum(float(logprobs_TV[first + i, token]) for i, token in enumerate(tokens)) / len(tokens)


def test_the_best_by_mean_logprob(engine: Engine, family_model: Any) -> None:
    """They are those of n = best_of with the same seed, ranked by what transformers says of them."""
    model, prompt = family_model("llama"), [5, 6, 7]
    every = engine.generate([prompt], sampled(n=6))
    assert len({len(c.token_ids) for c in every}) > 1
    ranked = sorted(every, key=lambda c: mean_logprob(model, prompt, c.token_ids), reverse=True)
    best = engine.generate([prompt], sampled(n=2, best_of=6))
    assert [c.token_ids for c in best] == [c.token_ids for c in ranked[:2]]
    assert [c.index for c in best] == [0, 1]
    assert all(c.logprobs is None for c in best)
    for completion in best:
        expected = mean_logprob(model, prompt, completion.token_ids)
        assert completion.cumulative_logprob is not None
        assert completion.cumulative_logprob / len(completion.token_ids) == pytest.approx(expected, abs=1e-4)
    dropped = sum(len(c.token_ids) for c in ranked[2:])
    assert [c.num_discarded_tokens for c in best] == [dropped, 0]


def test_held_back_until_all_are_done(engine: Engine) -> None:
    before = engine.stats().generation_tokens
    engine.add_request("x", [5, 6, 7], sampled(best_of=4, logprobs=1, prompt_logprobs=0))
    engine.add_request("other", [9], SamplingParams(max_tokens=2, ignore_eos=True))
    outputs = []
    while engine.has_work:
        step = engine.step()
        assert not any(o.request_id == "x" for o in step) or not engine.has_work
        outputs += [o for o in step if o.request_id == "x"]
    assert len(outputs) == 1
    assert outputs[0].finished
    assert outputs[0].logprobs is not None
    assert [entry.token_id for entry in outputs[0].logprobs] == outputs[0].token_ids
    assert outputs[0].prompt_logprobs is not None
    assert len(outputs[0].prompt_logprobs) == 3
    used = len(outputs[0].token_ids) + outputs[0].num_discarded_tokens
    assert engine.stats().generation_tokens - before == used + 2


def test_no_stream_where_the_best_is_known_at_the_end(engine: Engine) -> None:
    with pytest.raises(RequestError, match="best_of is 3 with n 1") as caught:
        next(engine.stream([5], sampled(best_of=3)))
    assert caught.value.param == "best_of"
    whole = engine.generate([[5]], sampled(n=2))
    outputs = list(engine.stream([5], sampled(n=2, best_of=2)))  # nothing to choose
    for completion in whole:
        assert completion.token_ids == [
            t for o in outputs if o.index == completion.index for t in o.token_ids
        ]


def test_abort_in_between(engine: Engine) -> None:
    engine.add_request("x", [5, 6, 7], sampled(n=2, best_of=4, ignore_eos=True, max_tokens=30))
    assert engine.step() == []
    engine.step()
    outputs = engine.abort("x")
    assert [(o.index, o.finish_reason, o.finished) for o in outputs] == [
        (0, "abort", True),
        (1, "abort", True),
    ]
    assert engine.abort("x") == []


def test_those_that_failed_come_last() -> None:
    selection = BestOf(SamplingParams(n=2, best_of=4))
    ends = [("error", -0.1), ("stop", -4.0), ("abort", -0.1), ("length", -1.0)]
    result: list[RequestOutput] = []
    for index, (reason, total) in enumerate(ends):
        assert result == []
        result = selection.take(
            RequestOutput(
                request_id="x",
                index=index,
                token_ids=[index],
                finished=True,
                finish_reason=reason,
                cumulative_logprob=total,
            )
        )
    assert [(o.index, o.token_ids, o.finish_reason) for o in result] == [(0, [3], "length"), (1, [1], "stop")]
    assert selection.is_done
