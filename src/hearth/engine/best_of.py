"""The best n of several sequences: held back until all are done, ranked by mean log-probability."""

from __future__ import annotations

from hearth.engine.outputs import RequestOutput
from hearth.engine.params import SamplingParams


class BestOf:
    """Collects the outputs of one request's sequences, and gives out the n best when the last is finished.

    Sequences that failed or were aborted come after those that finished. Equals keep their order.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._num_returned = params.n
        self._outputs: dict[int, RequestOutput] = {}
        self._num_unfinished = params.num_sequences

    @property
    def is_done(self) -> bool:
        return self._num_unfinished == 0

    def take(self, output: RequestOutput) -> list[RequestOutput]:
        """Add what a sequence gained; the chosen ones once all are finished, numbered anew, best first."""
        held = self._outputs.setdefault(output.index, output)
        if held is not output:
            _extend(held, output)
        self._num_unfinished -= output.finished
        if not self.is_done:
            return []
        ranked = sorted(self._outputs.values(), key=_rank, reverse=True)  # a stable sort
        chosen, dropped = ranked[: self._num_returned], ranked[self._num_returned :]
        chosen[0].num_discarded_tokens = sum(len(each.token_ids) for each in dropped)
        scores = next((each.prompt_logprobs for each in ranked if each.prompt_logprobs is not None), None)
        for index, each in enumerate(chosen):
            each.index = index
            each.prompt_logprobs = scores if index == 0 else None
        return chosen


def _extend(held: RequestOutput, output: RequestOutput) -> None:
    held.text += output.text
    held.token_ids += output.token_ids
    if held.logprobs is not None and output.logprobs is not None:
        held.logprobs += output.logprobs
    if output.prompt_logprobs is not None:
        held.prompt_logprobs = output.prompt_logprobs
    held.finished, held.finish_reason = output.finished, output.finish_reason
    held.cumulative_logprob, held.error = output.cumulative_logprob, output.error


def _rank(output: RequestOutput) -> tuple[bool, float]:
    total = output.cumulative_logprob
    if total is None or not output.token_ids:
        return (False, 0.0)
    return (output.finish_reason in ("stop", "length"), total / len(output.token_ids))
