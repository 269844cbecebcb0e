"""The parity gate: what was trained is what is served.

Two questions, asked of a model directory through both paths:

1. *Same input?* A prompt becomes token ids on the training side (the dataset's encoder, the chat renderer
   that made the loss mask) and on the serving side (the engine's tokenizer and template).
2. *Same output?* The engine continues the prompt greedily; the training-side model, run by transformers
   without any of the engine's code, must give each of those tokens the highest probability, and must want
   to stop where the engine stopped. That is the same as equality with its own greedy continuation, and it
   needs one forward pass a prompt. Log-probabilities of the tokens are compared as well.

Two tokens whose log-probabilities lie closer together than the tolerance are a tie that rounding decides;
ties are counted and reported, not hidden.

Weights or a KV cache that are compressed for serving cannot give the same tokens everywhere. Their gate asks
how far the log-probabilities of the served tokens are from the training side's: none farther than a wide
tolerance, and on average not farther than a narrow one. The report says that, and holds for that compression.

Shapes: T tokens of prompt and continuation, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from hearth.evaluation.prompts import ParityPrompt
from hearth.version import __version__

if TYPE_CHECKING:
    from hearth.engine import Completion, Engine

# Largest accepted difference of log-probabilities, in nats. float32 paths differ by the order of
# summation only; bfloat16 keeps 8 bits of a logit, which is a few hundredths of a nat near the top.
TOLERANCE_NATS = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 2.5e-1}
# For compressed serving: the largest difference of a token, and the largest mean.
COMPRESSED_NATS = {"int8": (1.0, 0.1), "fp8": (1.0, 0.1), "int4": (4.0, 0.4)}


@dataclass(frozen=True)
class Tolerance:
    """What a report allows, in nats. ``mean``: of all tokens together, None = not asked."""

    largest: float
    mean: float | None = None

    @classmethod
    def of(cls, dtype: str, weights: str = "auto", kv_dtype: str = "auto") -> Tolerance:
        """That of a way of serving; the coarser compression decides."""
        exact = TOLERANCE_NATS.get(dtype, TOLERANCE_NATS["float32"])
        allowed = [COMPRESSED_NATS[name] for name in (weights, kv_dtype) if name != "auto"]
        if not allowed:
            return cls(exact)
        largest, mean = max(allowed)
        return cls(max(largest, exact), mean)


@dataclass(frozen=True)
class PromptResult:
    """What the gate found for one prompt."""

    name: str
    num_prompt_tokens: int
    num_new_tokens: int
    ids_equal: bool
    num_ties: int
    first_difference: int | None
    expected_token: str | None
    served_token: str | None
    max_logprob_difference: float
    sum_logprob_difference: float = 0.0
    note: str = ""

    @property
    def tokens_equal(self) -> bool:
        return self.first_difference is None


@dataclass(frozen=True)
class ParityReport:
    """The verdict and its evidence. ``passed`` is what the registry's gate reads."""

    passed: bool
    dtype: str
    tolerance_nats: float
    max_tokens: int
    prompts: list[PromptResult]
    seconds: float = 0.0
    weights: str = "auto"
    kv_dtype: str = "auto"
    mean_tolerance_nats: float | None = None
    mean_logprob_difference: float = 0.0
    hearth_version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        """The report for a person, a line a prompt."""
        lines = [
            f"parity gate {'PASSED' if self.passed else 'FAILED'}: {len(self.prompts)} prompts, up to "
            f"{self.max_tokens} greedy tokens each, {self.dtype}, tolerance {self.tolerance_nats:g} nats"
        ]
        if self.mean_tolerance_nats is not None:
            lines.append(
                f"  compressed (weights {self.weights}, KV cache {self.kv_dtype}): mean difference "
                f"{self.mean_logprob_difference:.1e} nats, tolerance {self.mean_tolerance_nats:g}"
            )
        for prompt in self.prompts:
            lines.append(_render_prompt(prompt, self.tolerance_nats))
        return "\n".join(lines)


def _render_prompt(prompt: PromptResult, tolerance: float) -> str:
    problems = []
    if not prompt.ids_equal:
        problems.append("prompt token ids differ")
    if prompt.first_difference is not None:
        problems.append(
            f"token {prompt.first_difference} differs: training says {prompt.expected_token!r}, "
            f"serving says {prompt.served_token!r}"
        )
    if prompt.max_logprob_difference > tolerance:
        problems.append("log-probabilities differ")
    verdict = "FAILED " + "; ".join(problems) if problems else "same"
    ties = f", {prompt.num_ties} ties" if prompt.num_ties else ""
    note = f" ({prompt.note})" if prompt.note else ""
    return (
        f"  {prompt.name:24} {prompt.num_prompt_tokens:5} + {prompt.num_new_tokens:3} tokens  {verdict}"
        f"  [largest log-probability difference {prompt.max_logprob_difference:.1e}{ties}]{note}"
    )


def continue_greedily(
    engine: Engine, prompts: Sequence[ParityPrompt], *, max_tokens: int
) -> list[Completion]:
    """The serving side: greedy continuations of all prompts in one batch, with log-probabilities."""
    from hearth.engine import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=1)
    return list(engine.generate([list(prompt.served_ids) for prompt in prompts], params))


def check_continuations(
    model: torch.nn.Module,
    prompts: Sequence[ParityPrompt],
    completions: Sequence[Completion],
    *,
    dtype: str,
    stop_ids: frozenset[int],
    max_tokens: int,
    weights: str = "auto",
    kv_dtype: str = "auto",
    tolerance_nats: float | None = None,
    advance: Callable[[int], None] | None = None,
) -> ParityReport:
    """The training side: force the engine's ``completions`` through ``model`` and judge them.

    ``stop_ids`` end a generation on the training side. ``weights`` and ``kv_dtype`` say how the engine
    compressed. ``advance`` is called with 1 a prompt.
    """
    started = time.monotonic()
    tolerance = Tolerance.of(dtype, weights, kv_dtype)
    if tolerance_nats is not None:
        tolerance = Tolerance(tolerance_nats)
    results = []
    for prompt, completion in zip(prompts, completions, strict=True):
        results.append(_check(model, prompt, completion, stop_ids, tolerance.largest))
        if advance is not None:
            advance(1)
    num_tokens = sum(result.num_new_tokens for result in results)
    mean = sum(result.sum_logprob_difference for result in results) / max(1, num_tokens)
    passed = bool(results) and all(
        result.ids_equal and result.tokens_equal and result.max_logprob_difference <= tolerance.largest
        for result in results
    )
    return ParityReport(
        passed=passed and (tolerance.mean is None or mean <= tolerance.mean),
        dtype=dtype,
        tolerance_nats=tolerance.largest,
        max_tokens=max_tokens,
        prompts=results,
        seconds=time.monotonic() - started,
        weights=weights,
        kv_dtype=kv_dtype,
        mean_tolerance_nats=tolerance.mean,
        mean_logprob_difference=mean,
    )


@torch.inference_mode()
def _check(
    model: torch.nn.Module,
    prompt: ParityPrompt,
    completion: Completion,
    stop_ids: frozenset[int],
    tolerance: float,
) -> PromptResult:
    device = next(model.parameters()).device
    num_prompt = len(prompt.trained_ids)
    served = list(completion.token_ids)
    input_ids_T = torch.tensor([*prompt.trained_ids, *served], device=device)
    logits_TV = model(input_ids=input_ids_T[None], use_cache=False).logits[0, num_prompt - 1 :].float()
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    served_logprobs = _chosen_logprobs(completion)
    num_ties, worst, total, first_difference, expected = 0, 0.0, 0.0, None, None
    for position in range(len(served) + 1):
        if position and served[position - 1] in stop_ids:
            if position < len(served) or completion.finish_reason != "stop":
                first_difference, expected = position, "(stopped)"  # serving ran on where training ends
            break
        top = int(logprobs_TV[position].argmax())
        if position < len(served):
            accepted = {served[position]}
            difference = abs(float(logprobs_TV[position, served[position]]) - served_logprobs[position])
            worst = max(worst, math.inf if math.isnan(difference) else difference)
            total += difference
        elif completion.finish_reason != "length":
            # An engine may or may not hand out the stop token itself; where it does not, the training side
            # must want a stop token at the position after the last served token.
            accepted = set(stop_ids)
        else:
            break
        if top in accepted:
            continue
        best = max((float(logprobs_TV[position, token]) for token in accepted), default=-math.inf)
        if float(logprobs_TV[position, top]) - best <= tolerance:
            num_ties += 1
            continue
        first_difference, expected = position, prompt.show(top)
        break
    got = None
    if first_difference is not None:
        got = prompt.show(served[first_difference]) if first_difference < len(served) else "(stopped)"
        got = "(went on)" if got == expected else got
    return PromptResult(
        name=prompt.name,
        num_prompt_tokens=num_prompt,
        num_new_tokens=len(served),
        ids_equal=prompt.ids_equal and prompt.trained_ids == prompt.served_ids,
        num_ties=num_ties,
        first_difference=first_difference,
        expected_token=expected,
        served_token=got,
        max_logprob_difference=worst,
        sum_logprob_difference=total,
        note=prompt.note,
    )


def _chosen_logprobs(completion: Completion) -> list[float]:
    assert completion.logprobs is not None, "the gate asks the engine for log-probabilities"
    return [entry.logprob for entry in completion.logprobs]
