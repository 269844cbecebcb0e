"""Log-probabilities of the tokens of a prompt, from the same steps that compute it.

Every position of the prompt but the last wants logits for them. Those of a step are bounded, as its share of
the prompt is: 2,048 positions of a vocabulary of 150,000 would be 1.2 GB.

Legend: Q positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hearth.engine.outputs import TokenLogprob
from hearth.engine.plan import Plan
from hearth.engine.request import Request
from hearth.engine.sampler import top_logprobs

MAX_LOGITS_BYTES = 64 * 2**20
_ROWS = 16  # normalised at a time


def max_positions(vocab_size: int) -> int:
    """Positions whose float32 logits a step may hold for this purpose."""
    return max(1, MAX_LOGITS_BYTES // (4 * vocab_size))


@torch.inference_mode()
def score_prompts(
    plan: Plan, logits_RV: torch.Tensor, take: Callable[[Request, list[TokenLogprob]], None]
) -> None:
    """Pass on to ``take`` what this step says about prompts; counts their ``num_scored``."""
    first = 0
    for row in plan.rows:
        request = row.request
        if request.wants_scores:
            begin = row.end - row.num_logits
            targets = request.prompt_token_ids[begin + 1 : row.end + 1]
            if targets:
                assert begin == request.num_scored
                top = request.params.prompt_logprobs or 0
                take(request, log_probabilities(logits_RV[first : first + len(targets)], targets, top))
                request.num_scored = begin + len(targets)
        first += row.num_logits


def log_probabilities(logits_QV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """What each row's softmax gives its token, and the ``num_top`` most likely tokens beside it."""
    result = []
    for start in range(0, len(token_ids), _ROWS):
        part_QV = logits_QV[start : start + _ROWS]
        ids = list(token_ids[start : start + _ROWS])
        total_Q = torch.logsumexp(part_QV, dim=-1)
        ids_Q = torch.tensor(ids, device=part_QV.device)
        values = (part_QV.gather(1, ids_Q[:, None])[:, 0] - total_Q).tolist()
        tops = top_logprobs(part_QV, total_Q, [num_top] * len(ids))
        result += [TokenLogprob(*each) for each in zip(ids, values, tops, strict=True)]
    return result
