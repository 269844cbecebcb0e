"""The loss of a causal language model: a sum over valid tokens, and how many there were.

Every objective divides by the number of valid tokens of the whole optimizer step, so the result does not
depend on how a step is cut into micro-batches or how documents are packed into rows.

Shape suffixes: B rows, T positions, D hidden size, V vocabulary, N valid positions.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hearth.parallel.vocabulary import Words, own_part
from hearth.training.batches import IGNORE, Batch
from hearth.training.clipping import local

# Logits are made this many at a time: small enough for the CPU's cache, large enough for a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
_PARTS_OF_A_CHUNK = 4
_VOCAB_SLICE = 8192

# Whether the backward pass of a loss may be asked for twice, as schedules without bubbles do.
_KEEP_GRADIENTS: ContextVar[bool] = ContextVar("keep_gradients", default=False)

_heads: weakref.WeakKeyDictionary[nn.Module, tuple[nn.Module, nn.Linear] | None] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def kept_gradients(keep: bool) -> Iterator[None]:
    """Losses made within can be differentiated more than once, for the memory of the output layer."""
    token = _KEEP_GRADIENTS.set(keep)
    try:
        yield
    finally:
        _KEEP_GRADIENTS.reset(token)


def chunk_rows(device: torch.device, num_rows: int, vocab_size: int) -> int:
    """For how many positions at once the logits are made."""
    return max(64, min(num_rows, _CHUNK_ELEMENTS.get(device.type, 1 << 24) // vocab_size))


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of ``hidden @ weight.T``, without ever holding all logits.

    The gradient of a sum does not depend on what comes after it but for one factor, so both gradients are
    made together with the loss, chunk by chunk, and only scaled in ``backward``. This is the scheme of
    Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024), in plain torch with reused buffers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        compute: torch.dtype,
        words: Words | None,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        num, vocab = hidden_ND.shape[0], weight_VD.shape[0]
        exact = torch.float64 if compute == torch.float64 else torch.float32
        hidden, weight = hidden_ND.to(compute), weight_VD.to(compute)
        # As many as the others: they meet at each part.
        part = chunk_rows(hidden.device, num, vocab if words is None else words.most)
        # Many rows at once for the products, whose results are as large as the weight; few for the softmax,
        # which goes over its rows several times and stays in the cache.
        chunk = min(num, _PARTS_OF_A_CHUNK * part)
        logits_buffer = torch.empty(chunk, vocab, dtype=compute, device=hidden.device)
        exact_buffer = torch.empty(part, vocab if compute != exact else 0, dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=exact) if need_weight else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        for start in range(0, num, chunk):
            h, y = hidden[start : start + chunk], labels_N[start : start + chunk]
            logits = logits_buffer[: len(h)]
            torch.mm(h, weight.T, out=logits)
            for first in range(0, len(h), part):
                rows = slice(first, first + part)
                total += _cross_entropies(
                    logits[rows], y[rows], exact_buffer, words, grad=need_hidden or need_weight
                )
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = logits @ weight
            if grad_weight is not None:
                add_product(grad_weight, logits, h)
        ctx.gradients, ctx.kept = (grad_hidden, grad_weight), _KEEP_GRADIENTS.get()
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of this loss were taken already"
        grad_hidden, grad_weight = ctx.gradients
        if ctx.kept:
            grad_hidden, grad_weight = (None if g is None else g * grads[0] for g in ctx.gradients)
        else:
            # Scaled in place: a copy would be as large as the weight, at the peak of the step's memory.
            ctx.gradients = None
            for gradient in (grad_hidden, grad_weight):
                if gradient is not None:
                    gradient.mul_(grads[0])
        grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _cross_entropies(
    logits_PV: Tensor, labels_P: Tensor, buffer: Tensor, words: Words | None, *, grad: bool
) -> Tensor:
    """Sum of the losses of P rows. With ``grad`` the logits become their own gradients.

    ``words``: which words the logits are of, where other processes have the others.
    """
    in_place = buffer.dtype == logits_PV.dtype
    scores = logits_PV if in_place else buffer[: len(logits_PV)].copy_(logits_PV)
    if words is not None:
        losses_P = words.cross_entropies(scores, labels_P, grad=grad)
        if grad and not in_place:
            logits_PV.copy_(scores)
        return losses_P.sum()
    picked = scores.gather(1, labels_P[:, None])
    largest = scores.amax(-1, keepdim=True)
    scores.sub_(largest).exp_()
    sums = scores.sum(-1, keepdim=True)
    if grad:
        scores.mul_(sums.reciprocal())
        scores.scatter_add_(1, labels_P[:, None], torch.full_like(picked, -1.0))
        if not in_place:
            logits_PV.copy_(scores)
    return (sums.log() + largest - picked).sum()


def add_product(grad_weight_VD: Tensor, logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add logitsᵀ · hidden in the type of the sum, in slices of the vocabulary: no second weight is held."""
    if grad_weight_VD.dtype == logits_CV.dtype:
        grad_weight_VD.addmm_(logits_CV.T, hidden_CD)
        return
    for first in range(0, len(grad_weight_VD), _VOCAB_SLICE):
        words = slice(first, first + _VOCAB_SLICE)
        grad_weight_VD[words].add_(logits_CV[:, words].T @ hidden_CD)


def linear_cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over N of the cross-entropy of hidden · weightᵀ; products in autocast's type where it is on.

    ``weight_VD`` may be spread by words over a group of processes, all of which must ask.
    """
    device = hidden_ND.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    apply: Any = _LinearCrossEntropy.apply
    if not torch.is_grad_enabled():
        # ``needs_input_grad`` knows nothing of no_grad: an evaluation would make the weight's gradient too.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    # Inside, types are chosen by hand; autocast would convert the buffers behind our back.
    with torch.autocast(device, enabled=False):
        hidden_ND, weight_VD, words = own_part(hidden_ND, weight_VD)
        return cast(Tensor, apply(hidden_ND, weight_VD, labels_N, compute, words))


def nothing_of(hidden_ND: Tensor, weight_VD: Tensor | None) -> Tensor:
    """A loss of zero that depends on both: replicas wait for a gradient of every weight that trains."""
    zero = hidden_ND.sum() * 0.0
    return zero if weight_VD is None else zero + local(weight_VD).sum() * 0.0


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def split_head(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """Decoder and output layer, if the model's logits are exactly ``head(decoder(ids))``; None otherwise.

    Some architectures scale or cap their logits; whether one does is found by trying it on a few tokens.
    """
    if model not in _heads:
        _heads[model] = _probe_head(model)
    return _heads[model]


def use_split_of(tried: nn.Module, model: nn.Module) -> None:
    """What was found for a model holds for another of its kind: a stage of it, or one without weights yet."""
    if model not in _heads:
        _heads[model] = None if split_head(tried) is None else (unwrap(model).base_model, _head_of(model))


def _head_of(model: nn.Module) -> nn.Linear:
    head: nn.Linear = unwrap(model).get_output_embeddings()
    return head


def _probe_head(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    inner = unwrap(model)
    try:
        decoder, head = inner.base_model, inner.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if decoder is inner or type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return None
    device = head.weight.device
    ids = torch.arange(1, 9, device=device).remainder(head.weight.shape[0])[None]
    was_training = inner.training
    inner.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            whole = inner(input_ids=ids, use_cache=False).logits
            hidden = getattr(decoder(input_ids=ids, use_cache=False), "last_hidden_state", None)
            same = hidden is not None and torch.equal(head(hidden), whole)
    except (RuntimeError, TypeError, ValueError):
        same = False
    finally:
        inner.train(was_training)
    return (decoder, head) if same else None


def token_loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the losses of a batch's valid labels, and their number. Differentiable; 0 for no valid label.

    Rows are packed: there is no attention mask, and positions that start again at 0 tell transformers where
    documents begin. That detection needs ``use_cache=False``: a cache turns it off.
    """
    labels_N = batch.labels_BT.reshape(-1)
    valid_N = labels_N != IGNORE
    num_valid = int(batch.num_valid)
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    split = split_head(model)
    if split is None:
        logits = model(**inputs).logits
        logits_NV = logits.reshape(-1, logits.shape[-1])
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss = F.cross_entropy(logits_NV.to(exact), labels_N, ignore_index=IGNORE, reduction="sum")
        return loss, num_valid
    decoder, head = split
    hidden_BTD = decoder(**inputs).last_hidden_state
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    if num_valid == 0:
        return nothing_of(hidden_ND, head.weight), 0
    if num_valid < labels_N.numel():
        index = valid_N.nonzero()[:, 0]
        hidden_ND, labels_N = hidden_ND.index_select(0, index), labels_N.index_select(0, index)
    return linear_cross_entropy_sum(hidden_ND, head.weight, labels_N), num_valid
