"""The engine as a caller sees it: parameters, stops, aborts, refusals, faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.engine import Engine, SamplingParams
from hearth.errors import ConfigError, EngineError, RequestError


@pytest.fixture(scope="module")
def engine(family_model: Any, tokenizer: Any) -> Iterator[Engine]:
    with Engine.from_model(family_model("llama"), tokenizer, max_model_len=64, block_size=8) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine: Engine = request.getfixturevalue("engine")
        engine.scheduler.check()
        assert not engine.has_work
        assert engine.pool.num_used == 0
        assert not engine._sequences


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, **fields)


def test_text_is_the_decoded_tokens(engine: Engine) -> None:
    for completion in engine.generate(["the quick", [5, 6, 7], "日本"], greedy(max_tokens=20)):
        decoded = engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.text == decoded
        assert len(completion.token_ids) == 20
        assert completion.finish_reason == "length"


def test_stream_makes_the_same_as_generate(engine: Engine) -> None:
    whole = engine.generate(["the lazy dog"], greedy(max_tokens=24))[0]
    outputs = list(engine.stream("the lazy dog", greedy(max_tokens=24)))
    assert "".join(o.text for o in outputs) == whole.text
    assert [t for o in outputs for t in o.token_ids] == whole.token_ids
    assert [o.finished for o in outputs] == [False] * 23 + [True]


def test_seed_makes_it_reproducible_in_any_batch(engine: Engine) -> None:
    params = SamplingParams(max_tokens=16, seed=11, top_p=0.95, ignore_eos=True)
    alone = engine.generate(["brown fox"], params)[0].token_ids
    noise = SamplingParams(max_tokens=9, ignore_eos=True)
    mixed = engine.generate(["a", "brown fox", [9] * 30], [noise, params, noise])[1].token_ids
    other = engine.generate(["brown fox"], SamplingParams(max_tokens=16, seed=12, ignore_eos=True))[
        0
    ].token_ids
    assert alone == mixed != other


def test_without_a_seed_draws_differ(engine: Engine) -> None:
    params = SamplingParams(max_tokens=16, temperature=2.0, ignore_eos=True)
    first, second = engine.generate(["the", "the"], params)
    assert first.token_ids != second.token_ids


def test_n_gives_that_many_different_completions_in_order(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, n=3, seed=1, temperature=1.5, ignore_eos=True)
    completions = engine.generate(["the", "dog"], params)
    assert [c.index for c in completions] == [0, 1, 2, 0, 1, 2]
    assert [c.prompt for c in completions] == ["the"] * 3 + ["dog"] * 3
    assert len({tuple(c.token_ids) for c in completions[:3]}) == 3
    one = engine.generate(["the"], SamplingParams(max_tokens=12, seed=1, temperature=1.5, ignore_eos=True))
    assert one[0].token_ids == completions[0].token_ids


def test_stop_text_ends_before_it(engine: Engine) -> None:
    whole = engine.generate(["fox"], greedy(max_tokens=40))[0]
    stop = whole.text[9:12]
    cut = whole.text.index(stop)
    stopped = engine.generate(["fox"], greedy(max_tokens=40, stop=stop))[0]
    assert stopped.text == whole.text[:cut]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 40


def test_text_held_back_for_a_stop_is_given_at_the_end(engine: Engine) -> None:
    whole = engine.generate(["fox"], greedy(max_tokens=10))[0]
    held = engine.generate(["fox"], greedy(max_tokens=10, stop=whole.text[-2:] + "never"))[0]
    assert held.text == whole.text


def test_stop_token_ends_and_shows_no_text(engine: Engine) -> None:
    whole = engine.generate(["fox"], greedy(max_tokens=20))[0]
    token = whole.token_ids[6]
    first = whole.token_ids.index(token)
    stopped = engine.generate(["fox"], greedy(max_tokens=20, stop_token_ids=(token,)))[0]
    assert stopped.token_ids == whole.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == engine.tokenizer.decode(whole.token_ids[:first])


def test_min_tokens_goes_past_the_stop(engine: Engine) -> None:
    token = engine.generate(["fox"], greedy(max_tokens=1))[0].token_ids[0]
    completion = engine.generate(["fox"], greedy(max_tokens=20, min_tokens=5, stop_token_ids=(token,)))[0]
    assert len(completion.token_ids) >= 5
    assert token not in completion.token_ids[:5]


def test_the_end_of_sequence_token_ends(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, logit_bias={2: 100.0})
    completion = engine.generate(["fox"], params)[0]
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([2], "", "stop")


def test_logprobs_match_a_plain_forward(engine: Engine, family_model: Any) -> None:
    completion = engine.generate([[5, 6, 7]], greedy(max_tokens=4, logprobs=2))[0]
    with torch.inference_mode():
        logits = family_model("llama")(torch.tensor([[5, 6, 7, *completion.token_ids]])).logits[0, 2:-1]
    expected = torch.log_softmax(logits, -1)
    assert completion.logprobs is not None
    for row, got, token in zip(expected, completion.logprobs, completion.token_ids, strict=True):
        assert got.token_id == token == got.top[0][0]
        assert got.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert len(got.top) == 2


def test_max_tokens_is_cut_at_the_context(engine: Engine) -> None:
    completion = engine.generate([[5] * 60], greedy(max_tokens=50))[0]
    assert len(completion.token_ids) == 4
    assert completion.finish_reason == "length"
    assert len(engine.generate([[5] * 63], greedy(max_tokens=None))[0].token_ids) == 1


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([5] * 64, {}, "64 tokens"),
        ([5, 320], {}, "320"),
        ([-1], {}, "-1"),
        ([5], {"logit_bias": {320: 1.0}}, "logit_bias"),
        ([5], {"stop_token_ids": (999,)}, "999"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    engine: Engine, prompt: Any, params: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        engine.generate([[7, 8], prompt], SamplingParams(**params))


def test_a_long_prompt_is_refused_with_both_numbers_and_the_fix(engine: Engine) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate([[5] * 100])
    assert "100" in caught.value.message
    assert "64" in caught.value.message
    assert "63" in str(caught.value.fix)


def test_abort_frees_blocks_and_leaves_others_alone(engine: Engine) -> None:
    expected = engine.generate([[9, 9]], greedy(max_tokens=12))[0].token_ids
    engine.add_request("stays", [9, 9], greedy(max_tokens=12))
    engine.add_request("goes", [5] * 30, greedy(max_tokens=30, n=2))
    got: list[int] = []
    for _ in range(3):
        got += [t for o in engine.step() if o.request_id == "stays" for t in o.token_ids]
    outputs = engine.abort("goes")
    assert [(o.finish_reason, o.finished) for o in outputs] == [("abort", True)] * 2
    assert engine.abort("goes") == []
    engine.scheduler.check()
    while engine.has_work:
        got += [t for o in engine.step() for t in o.token_ids]
    assert got == expected


def test_leaving_a_stream_early_aborts_it(engine: Engine) -> None:
    for _ in engine.stream([5, 6], greedy(max_tokens=30)):
        break
    assert not engine.has_work


def test_a_request_id_in_use_is_refused(engine: Engine) -> None:
    engine.add_request("twice", [5], greedy())
    with pytest.raises(RequestError, match="twice"):
        engine.add_request("twice", [5], greedy())
    engine.abort("twice")


def test_a_failing_step_ends_its_requests_and_not_the_engine(family_model: Any) -> None:
    """An embedding that breaks on one token: the step with it fails, everything else goes on."""
    model = family_model("llama")

    def explode(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if bool((arguments[0] == 13).any()):
            raise RuntimeError("unlucky token")

    model.get_input_embeddings().register_forward_pre_hook(explode)
    # The load-time checks use other tokens by their seeds; a budget of 8 separates the two requests.
    with Engine.from_model(model, max_num_batched_tokens=8, max_num_seqs=1) as engine:
        expected = engine.generate([[5, 6]], greedy(max_tokens=4))[0].token_ids
        engine.add_request("bad", [13, 5], greedy(max_tokens=4))
        engine.add_request("good", [5, 6], greedy(max_tokens=4))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
            engine.scheduler.check()
        bad = [o for o in outputs if o.request_id == "bad"]
        assert [o.finish_reason for o in bad] == ["error"]
        assert "unlucky token" in str(bad[0].error)
        good = [t for o in outputs if o.request_id == "good" for t in o.token_ids]
        assert good == expected
        assert engine.pool.num_used == 0
        assert engine.stats().num_failed_steps == 1
        with pytest.raises(EngineError, match="unlucky"):
            engine.generate([[13, 7]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_their_request_alone(family_model: Any, value: float) -> None:
    """One token of the vocabulary with a broken embedding, in one batch with a sound request."""
    model = family_model("llama")
    prompts = [[13, 5, 6, 7] * 5, [5, 6, 7, 8] * 5]
    with Engine.from_model(family_model("llama")) as sound:
        expected = sound.generate([prompts[1]], greedy(max_tokens=6))[0].token_ids

    def spoil(_: torch.nn.Module, arguments: tuple[torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        broken = (arguments[0] == 13) & (arguments[0].shape[-1] > 1)
        return torch.where(broken[..., None], torch.full_like(hidden, value), hidden)

    with Engine.from_model(model, block_size=8) as engine:
        # After loading, whose own checks use random tokens.
        model.get_input_embeddings().register_forward_hook(spoil)
        for name, prompt in zip(("bad", "good"), prompts, strict=True):
            engine.add_request(name, prompt, greedy(max_tokens=6))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
            engine.scheduler.check()
        bad = [o for o in outputs if o.request_id == "bad"]
        assert [o.finish_reason for o in bad] == ["error"]
        assert "NaN or infinite logits" in str(bad[0].error)
        assert [t for o in outputs if o.request_id == "good" for t in o.token_ids] == expected
        # The spoilt blocks cannot be found; the sound ones can.
        for prompt, hits in zip(prompts, (0, 16), strict=True):
            engine.add_request("again", prompt, greedy(max_tokens=1))
            assert {o.num_cached_tokens for o in engine.step()} == {hits}


def test_an_interrupted_step_leaves_nothing_in_the_prefix_cache(family_model: Any) -> None:
    """Ctrl-C between two layers: the blocks of the prompt are only half written."""
    prompt, model = [7] * 10 + [9] * 30, family_model("llama")
    with Engine.from_model(family_model("llama")) as fresh:
        expected = fresh.generate([prompt], greedy(max_tokens=8))[0].token_ids
    armed: list[bool] = []

    def interrupt(*_: Any) -> None:
        if armed and armed.pop():
            raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(interrupt)
    with Engine.from_model(model, block_size=8) as engine:
        armed.append(True)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([prompt], greedy(max_tokens=8))
        engine.scheduler.check()
        assert not engine.has_work
        assert (engine.pool.num_used, engine.pool.num_cached) == (0, 0)
        again = engine.generate([prompt], greedy(max_tokens=8))[0]
        assert (again.token_ids, again.num_cached_tokens) == (expected, 0)


def test_a_context_shorter_than_the_check_at_load(family_model: Any) -> None:
    with Engine.from_model(family_model("gpt2", n_positions=12)) as engine:
        assert len(engine.generate([[5, 6]], greedy(max_tokens=None))[0].token_ids) == 10


def test_stats_add_up(engine: Engine) -> None:
    before = engine.stats()
    engine.generate(["the dog", "the fox"], greedy(max_tokens=5))
    after = engine.stats()
    assert after.generation_tokens - before.generation_tokens == 10
    assert after.num_free_blocks + after.num_cached_blocks + after.num_used_blocks == after.num_blocks
    assert after.finished["length"] - before.finished.get("length", 0) == 2
    assert after.kv_cache_bytes == after.num_blocks * 8 * 3 * 2 * 2 * 16 * 4


def test_settings_that_do_not_fit_the_model(family_model: Any) -> None:
    with pytest.raises(ConfigError, match="256 positions"):
        Engine.from_model(family_model("llama"), max_model_len=1000)
    with pytest.raises(ConfigError, match="kv_cache_memory"):
        Engine.from_model(family_model("llama"), max_model_len=200, kv_cache_memory=50_000)
    with pytest.raises(ConfigError, match="numba"):
        Engine.from_model(family_model("llama").half(), attention="numba")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(model_dir: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        Engine.load(model_dir, device=device)


def test_a_small_cache_shortens_the_default_context(family_model: Any) -> None:
    with Engine.from_model(family_model("llama"), kv_cache_memory=100_000, block_size=8) as engine:
        assert engine.max_model_len == 100_000 // (8 * 768) * 8
        assert (
            len(engine.generate([[5] * 100], greedy(max_tokens=100))[0].token_ids)
            == engine.max_model_len - 100
        )


def test_a_start_says_where_its_seconds_went(model_dir: Path) -> None:
    with Engine.load(model_dir) as engine:
        startup = engine.model_info["startup_seconds"]
        assert list(startup)[:2] == ["tokenizer", "weights"]
        assert {"examine", "pack", "cache", "fuse", "test"} <= set(startup)
        assert 0.5 * engine.load_seconds < sum(startup.values()) <= engine.load_seconds
