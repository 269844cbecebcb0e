"""Scores against a naive computation, one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hearth.errors import DataError, NonFiniteError
from hearth.evaluation import scoring
from hearth.evaluation.scoring import TextScore, score_documents, split_windows

VOCAB = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def random_document(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length, dtype=np.int32)


@torch.inference_mode()
def naive_nll(model: LlamaForCausalLM, tokens: np.ndarray, first: int = 1) -> float:
    total = 0.0
    for position in range(first, len(tokens)):
        logits = model(torch.tensor(tokens[:position][None], dtype=torch.long)).logits[0, -1]
        total -= float(torch.log_softmax(logits, -1)[int(tokens[position])])
    return total


@given(length=st.integers(0, 300), context=st.integers(2, 64), data=st.data(), with_mask=st.booleans())
def test_windows_score_every_token_but_the_first_once(
    length: int, context: int, data: st.DataObject, with_mask: bool
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    tokens = np.arange(length)
    mask = tokens % 3 == 0 if with_mask else None
    scored: list[int] = []
    for window in split_windows(tokens, context, mask=mask, stride=stride):
        assert len(window.tokens_T) <= context
        assert window.first_scored >= 1
        targets = window.tokens_T[window.first_scored :]
        scored += [int(token) for token in targets]
        if len(scored) != len(targets):
            # Every window after the first gives at least this much context to what it scores.
            assert window.first_scored >= context - stride
        if window.mask_T is not None:
            assert (window.mask_T == (window.tokens_T % 3 == 0)).all()
    assert scored == list(range(1, length))


def test_short_documents_score_like_one_token_at_a_time(model: LlamaForCausalLM) -> None:
    documents = [random_document(length, seed=length) for length in (2, 9, 30, 1, 64)]
    score = score_documents(model, [(doc, None) for doc in documents], num_bytes=500, context_length=64)
    expected = sum(naive_nll(model, doc) for doc in documents)
    assert score.nll == pytest.approx(expected, rel=1e-5)
    assert (score.num_scored, score.num_unpredicted) == (1 + 8 + 29 + 63, 5)
    bits = expected / math.log(2) + 5 * math.log2(VOCAB)
    assert score.bits_per_byte == pytest.approx(bits / 500, rel=1e-5)


def test_mask_limits_what_is_scored(model: LlamaForCausalLM) -> None:
    tokens = random_document(20)
    mask = np.zeros(20, dtype=bool)
    mask[12:] = True
    score = score_documents(model, [(tokens, mask)], context_length=64)
    assert score.nll == pytest.approx(naive_nll(model, tokens, first=12), rel=1e-5)
    assert score.num_scored == 8
    assert "bits_per_byte" not in score.to_dict()


def test_batching_does_not_change_the_score(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [(random_document(length, seed=length), None) for length in (5, 50, 17, 90)]
    together = score_documents(model, documents, context_length=32)
    monkeypatch.setattr(scoring, "MAX_LOGIT_BYTES", 1)
    alone = score_documents(model, documents, context_length=32)
    assert together.nll == pytest.approx(alone.nll, rel=1e-5)
    assert together.num_scored == alone.num_scored == 4 + 49 + 16 + 89


def test_a_random_model_scores_near_uniform(model: LlamaForCausalLM) -> None:
    score = score_documents(model, [(random_document(400), None)], context_length=64)
    assert score.perplexity == pytest.approx(VOCAB, rel=0.05)


def test_nothing_to_score_and_non_finite_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="nothing to score: 1 documents"):
        score_documents(model, [(random_document(1), None)], context_length=64)
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="non-finite loss"):
        score_documents(broken, [(random_document(9), None)], context_length=64)


def test_perplexity_of_a_hopeless_model_is_infinite_not_an_error() -> None:
    assert TextScore(1e6, 10, 0, 0, VOCAB).perplexity == math.inf
