"""Log-probabilities of the labels of a batch, differentiable, without ever holding all logits.

What preference learning, reinforcement learning and reward shaping build on. Shape suffixes: B rows, T
positions, D hidden size, V vocabulary, N valid positions (in row order), S sequences.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from hearth.parallel.vocabulary import Words, own_part
from hearth.training.batches import IGNORE, Batch
from hearth.training.loss import add_product, chunk_rows, split_head


class _LinearLogProbs(torch.autograd.Function):
    """``log_softmax(hidden @ weight.T / temperature)`` at the labels, and the entropy at each position.

    The backward pass makes the logits again, chunk by chunk, from the kept normalisers: the gradient of each
    position is only known then. Entropy has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        compute: torch.dtype,
        temperature: float,
        with_entropy: bool,
        words: Words | None,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.float64 if compute == torch.float64 else torch.float32
        hidden, weight = hidden_ND.to(compute), weight_VD.to(compute)
        num = hidden.shape[0]
        logp_N = torch.empty(num, dtype=exact, device=hidden.device)
        normaliser_N, entropy_N = torch.empty_like(logp_N), torch.zeros_like(logp_N)
        chunk = chunk_rows(hidden.device, num, weight.shape[0] if words is None else words.most)
        for start in range(0, num, chunk):
            here = slice(start, start + chunk)
            scores = torch.mm(hidden[here], weight.T).to(exact)
            if temperature != 1.0:
                scores /= temperature
            if words is None:
                normaliser_N[here] = scores.logsumexp(-1)
                logp_N[here] = scores.gather(1, labels_N[here, None])[:, 0] - normaliser_N[here]
            else:
                normaliser_N[here], logp_N[here] = words.normalised(scores, labels_N[here])
            if with_entropy:
                probabilities = (scores - normaliser_N[here, None]).exp_()
                mean = probabilities.mul_(scores).sum(-1)
                entropy_N[here] = normaliser_N[here] - (mean if words is None else words.total(mean))
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, normaliser_N)
        ctx.compute, ctx.temperature, ctx.words = compute, temperature, words
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, labels_N, normaliser_N = ctx.saved_tensors
        words: Words | None = ctx.words
        grad_N = grads[0] / ctx.temperature
        hidden, weight = hidden_ND.to(ctx.compute), weight_VD.to(ctx.compute)
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=normaliser_N.dtype) if need_weight else None
        vocab = weight.shape[0] if words is None else words.most
        chunk = chunk_rows(hidden.device, hidden.shape[0], vocab)
        for start in range(0, hidden.shape[0], chunk):
            here = slice(start, start + chunk)
            scores = torch.mm(hidden[here], weight.T).to(normaliser_N.dtype)
            scores.div_(ctx.temperature).sub_(normaliser_N[here, None]).exp_()
            scores.mul_(-grad_N[here, None])
            if words is None:
                scores.scatter_add_(1, labels_N[here, None], grad_N[here, None])
            else:
                words.add_at(scores, labels_N[here], grad_N[here])
            slopes = scores.to(ctx.compute)
            if grad_hidden is not None:
                grad_hidden[here] = slopes @ weight
            if grad_weight is not None:
                add_product(grad_weight, slopes, hidden[here])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def token_logprobs(
    model: nn.Module, batch: Batch, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities logp_N of the labels that count, in row order, and entropies_N (zeros unless asked).

    Differentiable in the model's weights. float32, or float64 for a float64 model.
    """
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    labels_N = batch.labels_BT.reshape(-1)
    index = (labels_N != IGNORE).nonzero()[:, 0]
    labels_N = labels_N.index_select(0, index)
    split = split_head(model)
    if split is None:
        logits = model(**inputs).logits
        return _from_logits(logits.reshape(-1, logits.shape[-1])[index], labels_N, temperature, with_entropy)
    decoder, head = split
    hidden = decoder(**inputs).last_hidden_state
    hidden_ND, weight = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index), head.weight
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    apply: Any = _LinearLogProbs.apply
    with torch.autocast(device, enabled=False):
        hidden_ND, weight, words = own_part(hidden_ND, weight)
        found = apply(hidden_ND, weight, labels_N, compute, temperature, with_entropy, words)
    return cast(tuple[Tensor, Tensor], found)


def _from_logits(
    logits_NV: Tensor, labels_N: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    logp_NV = (logits_NV.to(exact) / temperature).log_softmax(-1)
    entropy_N = logp_NV.new_zeros(len(labels_N))
    if with_entropy:
        with torch.no_grad():
            entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return logp_NV.gather(1, labels_N[:, None])[:, 0], entropy_N


def sequence_sums(values_N: Tensor, batch: Batch) -> Tensor:
    """Sum over each sequence of a value for every label that counts; sums_S."""
    assert batch.sequences is not None, "these rows are not samples"
    segments = batch.segment_ids_BT[batch.labels_BT != IGNORE]
    return values_N.new_zeros(len(batch.sequences)).index_add(0, segments, values_N)


def sequence_logprobs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of each sequence's labels, sum_S, and how many there are, num_S."""
    logp_N, _ = token_logprobs(model, batch)
    return sequence_sums(logp_N, batch), sequence_sums(torch.ones_like(logp_N), batch)
