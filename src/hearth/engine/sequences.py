"""One sequence as its caller sees it: its text, its dice, when it ends. The scheduler sees a `Request`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hearth.engine.detokenize import Detokenizer, StopChecker
from hearth.engine.outputs import RequestOutput, TokenLogprob
from hearth.engine.request import Request
from hearth.engine.sampler import SamplingState


@dataclass
class Sequence:
    """Takes the tokens of a step one by one; `flush_output` says what they add up to."""

    request: Request
    sampling: SamplingState
    detokenizer: Detokenizer | None
    stops: StopChecker
    eos_ids: tuple[int, ...]
    reason: str | None = None  # why it ended
    sum_logprob: float = 0.0  # of the tokens so far, where they are known
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    _text: str = ""
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.request.params.prompt_logprobs is not None and self.request.index == 0:
            self.prompt_logprobs.append(None)

    def append(self, token_id: int, logprob: TokenLogprob | None) -> str | None:
        """Take a new token; returns the reason if the sequence ends with it."""
        assert self.reason is None
        request, params = self.request, self.request.params
        request.tokens.append(token_id)
        self.sampling.append(token_id)
        self._token_ids.append(token_id)
        if logprob is not None:
            self.sum_logprob += logprob.logprob
            if params.logprobs is not None:
                self._logprobs.append(logprob)
        if self._is_end(token_id):
            self.reason = "stop"
        elif self.detokenizer is not None:
            text = self.detokenizer.push(token_id)
            if request.num_output_tokens >= params.min_tokens:
                text, stopped = self.stops.push(text)
                if stopped:
                    self._text += text
                    self.reason = "stop"
                    return self.reason
            self._text += text
        grammar = self.sampling.grammar
        if self.reason is None and grammar is not None and grammar.is_finished:
            self.reason = "stop"
        if self.reason is None and request.num_output_tokens >= request.max_new_tokens:
            self.reason = "length"
        if self.reason is not None:
            self._flush_text()
        return self.reason

    def _is_end(self, token_id: int) -> bool:
        """Whether this token ends the sequence and is no part of its text; tells the grammar of it."""
        if self.sampling.grammar is not None:
            return self.sampling.grammar.advance(token_id)
        params = self.request.params
        return token_id in params.stop_token_ids or (token_id in self.eos_ids and not params.ignore_eos)

    def _flush_text(self) -> None:
        """Show what was held back because a character or a stop text might have been completed."""
        if self.detokenizer is not None:
            shown, stopped = self.stops.push(self.detokenizer.flush())
            self._text += shown if stopped else shown + self.stops.flush()

    def flush_output(self) -> RequestOutput:
        """What was gained since the last call."""
        request = self.request
        ended = self.reason is not None
        output = RequestOutput(
            request_id=request.request_id,
            index=request.index,
            text=self._text,
            token_ids=self._token_ids,
            logprobs=None if request.params.logprobs is None else self._logprobs,
            finished=ended,
            finish_reason=self.reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached,
            cumulative_logprob=self.sum_logprob if ended and self.sampling.wants_logprobs else None,
        )
        if self.prompt_logprobs and not request.wants_scores:
            output.prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, []
        self._text, self._token_ids, self._logprobs = "", [], []
        return output
