"""Log-probabilities in chunks against a plain log_softmax, in float64; packing against sequences alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hearth.training.batches import IGNORE
from hearth.training.logprobs import _LinearLogProbs, sequence_logprobs, token_logprobs
from hearth.training.samples import Sample, collate_samples, first_fit

VOCAB = 97


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
    return LlamaForCausalLM(config).double()


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        prompt = rng.integers(3, VOCAB, rng.integers(1, 9))
        parts = []
        for _side in range(2):
            answer = rng.integers(3, VOCAB, rng.integers(1, 20))
            tokens = np.concatenate([prompt, answer]).astype(np.int64)
            parts.append((tokens, np.arange(len(tokens)) >= len(prompt)))
        samples.append(Sample(tuple(parts)))
    return samples


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_entropies_and_gradients_are_those_of_log_softmax(temperature: float) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(150, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, 16, dtype=torch.float64, requires_grad=True)
    labels, factors = torch.randint(0, VOCAB, (150,)), torch.randn(150, dtype=torch.float64)
    found, entropy = _LinearLogProbs.apply(hidden, weight, labels, torch.float64, temperature, True, None)
    (found * factors).sum().backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    wanted = torch.log_softmax(hidden @ weight.T / temperature, -1)
    picked = wanted.gather(1, labels[:, None])[:, 0]
    (picked * factors).sum().backward()
    torch.testing.assert_close(found, picked)
    torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1))
    torch.testing.assert_close(got[0], hidden.grad)
    torch.testing.assert_close(got[1], weight.grad)


def test_sequences_give_the_same_packed_and_alone(model: LlamaForCausalLM) -> None:
    samples = make_samples(5)
    batch = collate_samples(samples)
    sums, counts = sequence_logprobs(model, batch)
    for s, (tokens, mask) in enumerate(part for sample in samples for part in sample.parts):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
        picked = torch.log_softmax(logits[:-1], -1).gather(1, torch.from_numpy(tokens)[1:, None])[:, 0]
        assert sums[s].item() == pytest.approx(float(picked[torch.from_numpy(mask[1:])].sum()), abs=1e-9)
        assert counts[s].item() == mask[1:].sum()


def test_gradients_reach_every_weight_as_without_chunks(model: LlamaForCausalLM) -> None:
    batch = collate_samples(make_samples(4, seed=3))
    factors = torch.randn(batch.num_valid, dtype=torch.float64)

    def gradients(logp: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (logp * factors).sum().backward()
        return [weight.grad.clone() for weight in model.parameters()]

    ours = gradients(token_logprobs(model, batch)[0])
    logits = model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits
    valid = batch.labels_BT != IGNORE
    plain = torch.log_softmax(logits[valid], -1).gather(1, batch.labels_BT[valid][:, None])[:, 0]
    for found, wanted in zip(ours, gradients(plain), strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_each_segment_is() -> None:
    samples = [*make_samples(3), Sample((make_samples(1)[0].parts[0],), label=0.0)]
    batch = collate_samples(samples, [7, 8, 9, 4])
    assert batch.sequences is not None
    assert batch.sequences.samples_S.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert batch.sequences.sides_S.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert batch.sequences.labels_S.tolist() == [1.0] * 6 + [0.0]
    assert batch.rows == (7, 8, 9, 4)
    for s, (tokens, mask) in enumerate(part for sample in samples for part in sample.parts):
        here = batch.segment_ids_BT == s
        assert batch.input_ids_BT[here].tolist() == tokens[:-1].tolist()
        assert batch.labels_BT[here].tolist() == np.where(mask[1:], tokens[1:], IGNORE).tolist()
        assert batch.position_ids_BT[here].tolist() == list(range(len(tokens) - 1))
    assert (batch.labels_BT[batch.segment_ids_BT < 0] == IGNORE).all()


def test_first_fit_loses_nothing_and_overfills_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 33, rng.integers(1, 40)).tolist()
        rows = first_fit(lengths, 32)
        assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
        assert all(sum(lengths[piece] for piece in row) <= 32 for row in rows)
