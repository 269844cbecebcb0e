"""Choosing tokens from logits, for a whole batch at once.

A token is drawn by inverting the cumulative distribution at one uniform number, which comes from the
request's own generator: the draws of a request with a seed do not depend on what else is in the batch.
The order is transformers': penalties, bias, forbidden ends, temperature, top-k, top-p, min-p.

Legend: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hearth.engine.outputs import TokenLogprob
from hearth.engine.params import SamplingParams

# Candidates looked at first for top-p and min-p; the whole vocabulary is sorted only if they do not suffice.
_CANDIDATES = 256


class SamplingState:
    """What the sampler remembers of one sequence."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        index: int,
        eos_ids: Sequence[int],
        fallback_seed: int,
    ) -> None:
        self.params = params
        seed = fallback_seed if params.seed is None else params.seed % 2**64
        self.generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
        self.end_ids = torch.tensor(sorted(ends), dtype=torch.long)
        self.num_output = 0
        # Token ids and counts for the penalties, kept only if there are any: prompt and output apart,
        # because OpenAI's penalties look at the output alone and the repetition penalty at both.
        self._prompt_ids = np.unique(np.asarray(prompt_token_ids, np.int64)) if params.has_penalties else None
        self._output_counts: dict[int, int] = {}

    def append(self, token_id: int) -> None:
        """Take note of a token that was chosen."""
        self.num_output += 1
        if self._prompt_ids is not None:
            self._output_counts[token_id] = self._output_counts.get(token_id, 0) + 1

    def adjust(self, logits_V: torch.Tensor) -> None:
        """Apply this sequence's penalties, bias and forbidden ends to its logits, in place."""
        params = self.params
        if self._prompt_ids is not None:
            output_ids = np.fromiter(self._output_counts.keys(), np.int64, len(self._output_counts))
            if params.repetition_penalty != 1.0:
                ids = torch.from_numpy(np.union1d(self._prompt_ids, output_ids)).to(logits_V.device)
                seen = logits_V[ids]
                penalty = params.repetition_penalty
                logits_V[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
            if len(output_ids) and (params.presence_penalty or params.frequency_penalty):
                counts = np.fromiter(self._output_counts.values(), np.float32, len(self._output_counts))
                ids = torch.from_numpy(output_ids).to(logits_V.device)
                amount = torch.from_numpy(params.presence_penalty + params.frequency_penalty * counts)
                logits_V[ids] -= amount.to(logits_V)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
            logits_V[ids] += torch.tensor(
                list(params.logit_bias.values()), dtype=logits_V.dtype, device=logits_V.device
            )
        if self.num_output < params.min_tokens and len(self.end_ids):
            logits_V[self.end_ids.to(logits_V.device)] = -torch.inf

    @property
    def adjusts(self) -> bool:
        params = self.params
        return params.has_penalties or bool(params.logit_bias) or self.num_output < params.min_tokens


@dataclass(frozen=True)
class Sampled:
    """One chosen token per sequence, and its log-probabilities where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


@torch.inference_mode()  # the logits are an inference tensor, which penalties change in place
def sample(logits_RV: torch.Tensor, states: Sequence[SamplingState]) -> Sampled:
    """Choose a token for each row; ``logits_RV`` is float32 and may be changed in place."""
    assert logits_RV.shape[0] == len(states)
    raw = {i: logits_RV[i].clone() for i, state in enumerate(states) if state.params.logprobs is not None}
    for i, state in enumerate(states):
        if state.adjusts:
            state.adjust(logits_RV[i])
    token_ids = torch.argmax(logits_RV, dim=-1)
    rows = [i for i, state in enumerate(states) if not state.params.greedy]
    if rows:
        part = logits_RV if len(rows) == len(states) else logits_RV[rows]
        token_ids[rows] = _draw(part, [states[i] for i in rows])
    chosen = token_ids.tolist()
    logprobs: list[TokenLogprob | None] = [None] * len(states)
    for i, logits_V in raw.items():
        logprobs[i] = _logprob(logits_V, chosen[i], states[i].params.logprobs or 0)
    return Sampled(chosen, logprobs)


def _logprob(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprob:
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    top: list[tuple[int, float]] = []
    if num_top:
        values, ids = torch.topk(logprobs_V, min(num_top, logprobs_V.shape[0]))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs_V[token_id]), top)


def _draw(logits_RV: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """One draw per row; returns token ids [R]."""
    device = logits_RV.device
    params = [state.params for state in states]
    uniform_R = torch.tensor(
        [state.generator.random() for state in states], dtype=torch.float64, device=device
    )
    # What rounds to zero in float32 would divide by it; subtracting the maximum first keeps a tiny
    # temperature from overflowing.
    smallest = torch.finfo(torch.float32).tiny
    temperature_R = torch.tensor([max(p.temperature, smallest) for p in params], device=device)
    scaled_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R[:, None]
    token_ids = torch.empty(len(states), dtype=torch.long, device=device)
    plain = [i for i, p in enumerate(params) if p.top_k == 0 and p.top_p >= 1.0 and p.min_p == 0.0]
    if plain:
        token_ids[plain] = _invert(torch.softmax(scaled_RV[plain], dim=-1), uniform_R[plain])
    filtered = [i for i in range(len(params)) if i not in set(plain)]
    if filtered:
        token_ids[filtered] = _draw_filtered(
            scaled_RV[filtered], [params[i] for i in filtered], uniform_R[filtered]
        )
    return token_ids


def _draw_filtered(
    scaled_RV: torch.Tensor, params: Sequence[SamplingParams], uniform_R: torch.Tensor
) -> torch.Tensor:
    """Draw from the most likely candidates that top-k, top-p and min-p leave; returns token ids [R].

    How many candidates a row looks at is its own affair: `torch.topk` puts equal logits, frequent in
    bfloat16, into an order that depends on their number, and with it would the draw.
    """
    device, vocab = scaled_RV.device, scaled_RV.shape[1]
    top_k_R = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=device)
    top_p_R = torch.tensor([p.top_p for p in params], device=device)
    min_p_R = torch.tensor([p.min_p for p in params], device=device)
    total_R = torch.logsumexp(scaled_RV, dim=-1)
    token_ids = torch.empty(len(params), dtype=torch.long, device=device)
    rows = torch.arange(len(params), device=device)  # not drawn yet
    width = min(vocab, _CANDIDATES)
    while True:
        values_RC, ids_RC = torch.topk(scaled_RV if len(rows) == len(params) else scaled_RV[rows], width)
        probs_RC = torch.exp(values_RC - total_R[rows, None])
        rank_C = torch.arange(width, device=device)
        probs_RC = probs_RC.masked_fill(rank_C >= top_k_R[rows, None], 0.0)
        # top-p works on what top-k left, renormalised; without top-k that is everything.
        limited = top_k_R[rows] <= width
        mass_R = torch.where(limited, probs_RC.sum(dim=-1), 1.0)
        before_RC = probs_RC.cumsum(dim=-1) - probs_RC  # mass of more likely tokens
        keep_RC = (before_RC < (top_p_R[rows] * mass_R)[:, None]) | (top_p_R[rows] >= 1.0)[:, None]
        keep_RC &= probs_RC >= min_p_R[rows, None] * probs_RC[:, :1]
        keep_RC[:, 0] = True
        # Enough if top-k is among them, or, without it, if the last is out: all others are no more likely.
        enough = limited | ((top_k_R[rows] == vocab) & ~keep_RC[:, -1])
        kept_RC = probs_RC * keep_RC
        picked_R = _invert(kept_RC / kept_RC.sum(dim=-1, keepdim=True), uniform_R[rows])
        drawn_R = ids_RC.gather(1, picked_R[:, None])[:, 0]
        token_ids[rows[enough]] = drawn_R[enough]
        rows = rows[~enough]
        if not len(rows):
            return token_ids
        width = min(vocab, width * 8)


def _invert(probs_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """The index at which each row's cumulative probability passes its uniform number."""
    cumulative_RV = probs_RV.cumsum(dim=-1, dtype=torch.float64)
    # Scaled by the actual sum, so that rounding can neither miss the end nor favour it.
    target_R = uniform_R * cumulative_RV[:, -1]
    index_R = torch.searchsorted(cumulative_RV, target_R[:, None], right=True)[:, 0]
    # A target that equals the sum would fall on a token of no probability: take the last that has some.
    last_R = (cumulative_RV < cumulative_RV[:, -1:]).sum(dim=-1)
    return torch.minimum(index_R, last_R)
