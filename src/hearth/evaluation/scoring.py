"""How well a model predicts text: perplexity and bits per byte.

Perplexity depends on the tokenizer; bits per byte does not, so it compares models with different
vocabularies, and models with file compressors.

Shapes: B windows in a batch, T tokens in a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hearth.errors import DataError, NonFiniteError

# Logits of one batch are kept under this many bytes (float32), so that a large vocabulary does not
# decide how much memory an evaluation takes.
MAX_LOGIT_BYTES = 128 << 20
# Used where a model states no limit of its own.
DEFAULT_CONTEXT_LENGTH = 2048


@dataclass(frozen=True)
class TextScore:
    """What a model made of a text.

    ``nll`` is in nats and sums over ``num_scored`` tokens. Nothing predicts the first token of a
    document, so perplexity leaves it out, and bits per byte charges it at log2(vocabulary) bits: an
    honest upper bound, since a decoder would need those bits.
    """

    nll: float
    num_scored: int
    num_unpredicted: int
    num_bytes: int
    vocab_size: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a scored token, in nats."""
        return self.nll / self.num_scored

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode the text with this model, over its UTF-8 bytes."""
        bits = self.nll / math.log(2) + self.num_unpredicted * math.log2(self.vocab_size)
        return bits / self.num_bytes

    def to_dict(self) -> dict[str, Any]:
        """All fields and derived figures, for JSON; bits per byte only where bytes were counted."""
        derived = {"loss": self.loss, "perplexity": self.perplexity}
        if self.num_bytes:
            derived["bits_per_byte"] = self.bits_per_byte
        return asdict(self) | derived


@dataclass(frozen=True)
class Window:
    """A stretch of one document; the targets from ``first_scored`` on are scored.

    ``mask`` says for each token whether it counts as a target (None: all do).
    """

    tokens_T: np.ndarray
    first_scored: int
    mask_T: np.ndarray | None

    @property
    def num_scored(self) -> int:
        if self.mask_T is None:
            return len(self.tokens_T) - self.first_scored
        return int(self.mask_T[self.first_scored :].sum())


def split_windows(
    tokens: np.ndarray, context_length: int, *, mask: np.ndarray | None = None, stride: int | None = None
) -> Iterator[Window]:
    """Cut a document into overlapping windows that score every token but the first exactly once.

    A window after the first repeats ``context_length - stride`` tokens as context, so that a scored token
    sees at least that many tokens before it.
    """
    stride = stride or context_length // 2
    assert 0 < stride < context_length, f"a stride of {stride} in a context of {context_length}"
    scored_up_to = 1
    start = 0
    while scored_up_to < len(tokens):
        end = min(start + context_length, len(tokens))
        yield Window(tokens[start:end], scored_up_to - start, None if mask is None else mask[start:end])
        scored_up_to = end
        start = end - (context_length - stride)


@torch.inference_mode()
def score_documents(
    model: torch.nn.Module,
    documents: Iterable[tuple[Sequence[int] | np.ndarray, np.ndarray | None]],
    *,
    num_bytes: int = 0,
    context_length: int | None,
    stride: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> TextScore:
    """Score documents of token ids, each with a mask of the tokens that count (None: all).

    ``num_bytes`` is the number of UTF-8 bytes of the text, or 0 where bits per byte has no meaning
    (masked chat data). ``context_length`` is the model's limit, None where it states none. ``advance`` is
    called with the number of tokens done. Raises DataError when there is nothing to score and
    NonFiniteError when the model returns NaN or infinite losses.
    """
    vocab_size = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    context_length = context_length or DEFAULT_CONTEXT_LENGTH
    windows: list[Window] = []
    num_documents = 0
    for tokens, mask in documents:
        num_documents += 1
        windows += split_windows(np.asarray(tokens), context_length, mask=mask, stride=stride)
    num_scored = sum(window.num_scored for window in windows)
    if not num_scored:
        raise DataError(
            f"nothing to score: {num_documents} documents hold no token after the first",
            fix="evaluate on a longer text",
        )
    # Longest first: the batch that needs most memory is the first one.
    windows.sort(key=lambda window: -len(window.tokens_T))
    was_training = model.training
    model.eval()
    nll = 0.0
    for batch in _batches(windows, vocab_size):
        nll += _score_batch(model, batch)
        if advance is not None:
            advance(sum(len(window.tokens_T) for window in batch))
    model.train(was_training)
    if not math.isfinite(nll):
        raise NonFiniteError(
            f"the model returned a non-finite loss ({nll}) on the evaluation text",
            fix="look at the run's loss and gradient norm; evaluate an earlier checkpoint",
        )
    return TextScore(nll, num_scored, num_documents if num_bytes else 0, num_bytes, vocab_size)


def _batches(windows: list[Window], vocab_size: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in windows:
        longest = len(batch[0].tokens_T) if batch else len(window.tokens_T)
        if batch and (len(batch) + 1) * longest * vocab_size * 4 > MAX_LOGIT_BYTES:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _score_batch(model: torch.nn.Module, batch: list[Window]) -> float:
    device = next(model.parameters()).device
    length = len(batch[0].tokens_T)
    input_ids_BT = torch.zeros(len(batch), length, dtype=torch.long)
    targets_BT = torch.full((len(batch), length), -100)
    for row, window in enumerate(batch):
        tokens = torch.from_numpy(window.tokens_T.astype(np.int64))
        input_ids_BT[row, : len(tokens)] = tokens
        targets = tokens[1:].clone()
        targets[: window.first_scored - 1] = -100
        if window.mask_T is not None:
            targets[torch.from_numpy(~window.mask_T[1:])] = -100
        targets_BT[row, : len(targets)] = targets
    # Padding stands to the right of everything that is scored, so a causal model needs no mask.
    logits_BTV = model(input_ids=input_ids_BT.to(device), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten().to(device), reduction="sum", ignore_index=-100
    )
    return float(loss)
