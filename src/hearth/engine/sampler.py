"""Choosing tokens from logits, for a whole batch at once.

A token is drawn by inverting the cumulative distribution at one uniform number, which comes from the
request's own generator: the draws of a request with a seed do not depend on what else is in the batch.
The order is transformers': penalties, bias, forbidden ends and grammar, temperature, top-k, top-p, min-p.

Legend: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hearth.engine.grammar import Grammar
from hearth.engine.outputs import TokenLogprob
from hearth.engine.params import SamplingParams

# Candidates looked at first for top-p and min-p; the whole vocabulary is sorted only if they do not suffice.
_CANDIDATES = 256
_BLOCK = 256  # tokens of a block in which a draw looks first


class SamplingState:
    """What the sampler remembers of one sequence."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        index: int,
        eos_ids: Sequence[int],
        fallback_seed: int,
        grammar: Grammar | None = None,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.wants_logprobs = params.logprobs is not None or params.selects
        seed = fallback_seed if params.seed is None else params.seed % 2**64
        self.generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
        self.end_ids = torch.tensor(sorted(ends), dtype=torch.long)
        self._all_ends = np.array(sorted({*params.stop_token_ids, *eos_ids}), np.int64)
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
        if self.grammar is not None:
            refused_V = torch.from_numpy(~self._allowed_tokens(self.grammar)).to(logits_V.device)
            logits_V.masked_fill_(refused_V, -torch.inf)
        elif self.num_output < params.min_tokens and len(self.end_ids):
            logits_V[self.end_ids.to(logits_V.device)] = -torch.inf

    def _allowed_tokens(self, grammar: Grammar) -> np.ndarray:
        """Boolean [V]: what the grammar allows; where the text may end, also the ends, if it is time."""
        allowed_V = grammar.allowed_tokens()
        if grammar.error or not grammar.is_complete:
            return allowed_V
        timely_V = allowed_V.copy()
        timely_V[self._all_ends] = False
        if self.num_output >= self.params.min_tokens:
            timely_V[self.end_ids.numpy()] = True
        return timely_V if timely_V.any() else allowed_V  # an end that comes early beats no token at all

    @property
    def adjusts(self) -> bool:
        params = self.params
        return (
            self.grammar is not None
            or params.has_penalties
            or bool(params.logit_bias)
            or self.num_output < params.min_tokens
        )


@dataclass(frozen=True)
class Sampled:
    """One chosen token per sequence, and its log-probabilities where asked for.

    is_sound: False where the model computed NaN or infinity: there was nothing to choose from.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    is_sound: list[bool]


@torch.inference_mode()  # the logits are an inference tensor, which penalties change in place
def sample(logits_RV: torch.Tensor, states: Sequence[SamplingState]) -> Sampled:
    """Choose a token for each row; ``logits_RV`` is float32 and may be changed in place."""
    assert logits_RV.shape[0] == len(states)
    adjusted = [i for i, state in enumerate(states) if state.adjusts]
    report = _Report(logits_RV, states, keep=bool(adjusted))
    # Soundness costs no pass of its own: NaN and infinity win the argmax. Masked tokens may be -inf.
    chosen_R = _argmax(logits_RV)
    top_R = logits_RV.gather(1, chosen_R[:, None])[:, 0]
    sound_R = torch.isfinite(top_R)
    for i in adjusted:
        states[i].adjust(logits_RV[i])
    if adjusted:
        part_RV = logits_RV[adjusted]
        chosen_R[adjusted] = _argmax(part_RV)
        top_R[adjusted] = part_RV.gather(1, chosen_R[adjusted, None])[:, 0]
    rows = [i for i, state in enumerate(states) if not state.params.greedy]
    if rows:
        every = len(rows) == len(states)
        chosen_R[rows] = _draw(
            logits_RV if every else logits_RV[rows],
            top_R if every else top_R[rows],
            [states[i] for i in rows],
        )
    chosen, sound = torch.stack((chosen_R, sound_R.long())).tolist()
    return Sampled(chosen, report.logprobs(chosen_R, chosen), [bool(each) for each in sound])


def _argmax(logits_RV: torch.Tensor) -> torch.Tensor:
    """The first largest of each row, or its first NaN."""
    if logits_RV.device.type == "cpu":
        return torch.from_numpy(logits_RV.numpy().argmax(axis=1))  # 4 ms for 64 x 150,000, torch's 23
    return torch.argmax(logits_RV, dim=-1)


class _Report:
    """Log-probabilities of the model's own distribution, from the logits before anything changes them.

    Legend: Q rows that want a report.
    """

    def __init__(self, logits_RV: torch.Tensor, states: Sequence[SamplingState], *, keep: bool) -> None:
        """``keep``: copy what is needed, because the logits will be changed in place."""
        self.num_rows = len(states)
        self.rows = [i for i, state in enumerate(states) if state.wants_logprobs]
        if not self.rows:
            return
        every = len(self.rows) == len(states) and not keep
        self.logits_QV = logits_RV if every else logits_RV[self.rows]
        self.total_Q = torch.logsumexp(self.logits_QV, dim=-1)
        self.num_top = [states[i].params.logprobs or 0 for i in self.rows]

    def logprobs(self, chosen_R: torch.Tensor, chosen: Sequence[int]) -> list[TokenLogprob | None]:
        result: list[TokenLogprob | None] = [None] * self.num_rows
        if not self.rows:
            return result
        picked_Q = self.logits_QV.gather(1, chosen_R[self.rows, None])[:, 0] - self.total_Q
        tops = top_logprobs(self.logits_QV, self.total_Q, self.num_top)
        for row, value, top in zip(self.rows, picked_Q.tolist(), tops, strict=True):
            result[row] = TokenLogprob(chosen[row], value, top)
        return result


def top_logprobs(
    logits_QV: torch.Tensor, total_Q: torch.Tensor, counts: Sequence[int]
) -> list[list[tuple[int, float]]]:
    """The most likely tokens of each row, as many as ``counts`` says; ``total_Q`` is the rows' logsumexp."""
    result: list[list[tuple[int, float]]] = [[] for _ in counts]
    # Rows of one count at a time: the order of equal logits depends on the count, and must not on the batch.
    for count in sorted(set(counts) - {0}):
        rows = [i for i, each in enumerate(counts) if each == count]
        part = slice(None) if len(rows) == len(counts) else rows
        values_QK, ids_QK = torch.topk(logits_QV[part], min(count, logits_QV.shape[1]))
        values_QK = values_QK - total_Q[part, None]
        for row, ids, values in zip(rows, ids_QK.tolist(), values_QK.tolist(), strict=True):
            result[row] = list(zip(ids, values, strict=True))
    return result


def _draw(logits_RV: torch.Tensor, top_R: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """One draw per row, whose largest logit is ``top_R``; returns token ids [R]."""
    device = logits_RV.device
    params = [state.params for state in states]
    uniform_R = torch.tensor(
        [state.generator.random() for state in states], dtype=torch.float64, device=device
    )
    # What rounds to zero in float32 would divide by it; subtracting the maximum first keeps a tiny
    # temperature from overflowing.
    smallest = torch.finfo(torch.float32).tiny
    temperature_R = torch.tensor([max(p.temperature, smallest) for p in params], device=device)
    token_ids = torch.empty(len(states), dtype=torch.long, device=device)
    filters = [p.top_k != 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params]
    for filtered in set(filters):
        rows = [i for i, each in enumerate(filters) if each is filtered]
        part = slice(None) if len(rows) == len(params) else rows
        scaled_RV = logits_RV[part] - top_R[part, None]
        scaled_RV /= temperature_R[part, None]
        if filtered:
            token_ids[part] = _draw_filtered(scaled_RV, [params[i] for i in rows], uniform_R[part])
        else:
            token_ids[part] = _draw_plain(scaled_RV, uniform_R[part])
    return token_ids


def _draw_plain(scaled_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Draw from the whole softmax, without its cumulative sum: first a block of tokens, then one of them.

    Returns token ids [R] and overwrites ``scaled_RV``, whose largest value is 0 in each row.
    """
    num_rows, vocab = scaled_RV.shape
    weights_RV = scaled_RV.exp_()
    num_whole = vocab // _BLOCK
    sums_RB = weights_RV[:, : num_whole * _BLOCK].view(num_rows, num_whole, _BLOCK).sum(dim=-1)
    rest_R1 = weights_RV[:, num_whole * _BLOCK :].sum(dim=-1, keepdim=True)
    sums_RB = torch.cat((sums_RB, rest_R1), dim=-1).double()
    block_R, share_R = _invert(sums_RB, uniform_R)
    ids_RC = block_R[:, None] * _BLOCK + torch.arange(_BLOCK, device=scaled_RV.device)
    weights_RC = weights_RV.gather(1, ids_RC.clamp(max=vocab - 1)) * (ids_RC < vocab)
    place_R, _ = _invert(weights_RC, share_R)
    return block_R * _BLOCK + place_R


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
        picked_R, _ = _invert(kept_RC, uniform_R[rows])
        drawn_R = ids_RC.gather(1, picked_R[:, None])[:, 0]
        token_ids[rows[enough]] = drawn_R[enough]
        rows = rows[~enough]
        if not len(rows):
            return token_ids
        width = min(vocab, width * 8)


def _invert(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index at which each row's cumulative weight passes its uniform number, and how far into it.

    Returns ids [R] and the position within the weight of that id [R], in [0, 1): again uniform.
    """
    cumulative_RV = weights_RV.cumsum(dim=-1, dtype=torch.float64)
    # Scaled by the actual sum, so that rounding can neither miss the end nor favour it.
    target_R = uniform_R * cumulative_RV[:, -1]
    index_R = torch.searchsorted(cumulative_RV, target_R[:, None], right=True)[:, 0]
    # A target that equals the sum would fall on a token of no weight: take the last that has some.
    last_R = (cumulative_RV < cumulative_RV[:, -1:]).sum(dim=-1)
    index_R = torch.minimum(index_R, last_R)
    weight_R = weights_RV.gather(1, index_R[:, None])[:, 0].double()
    before_R = cumulative_RV.gather(1, index_R[:, None])[:, 0] - weight_R
    return index_R, ((target_R - before_R) / weight_R).clamp(0.0, 1.0 - 2.0**-53)
