"""How far a student's distribution is from a teacher's, over every token, in chunks: no logits are held.

With p the teacher's and q the student's probabilities, both softened by the temperature T:

    forward  KL(p || q)          Hinton et al. 2015: covers all that the teacher does
    reverse  KL(q || p)          Gu et al. 2023 (MiniLLM): keeps to what the teacher finds likely
    jsd      b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q     Agarwal et al. 2024 (GKD), eq. 1

The divergence is multiplied by T², which undoes the 1/T² by which softening shrinks its gradient (Hinton et
al. 2015, section 2), so that its weight beside the data's own loss means the same at every temperature.

Shape suffixes: N valid positions, C those of a chunk, D hidden size, V vocabulary (the student's, where both
are meant), U what both vocabularies have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hearth.training.loss import add_product, chunk_rows


@dataclass(frozen=True)
class Divergence:
    """Which divergence, at which temperature, and its share of the loss; the rest is cross-entropy."""

    kind: Literal["forward", "reverse", "jsd"] = "forward"
    temperature: float = 1.0
    weight: float = 0.5
    jsd_beta: float = 0.5

    def of(self, logp_CU: Tensor, logq_CU: Tensor) -> tuple[Tensor, Tensor]:
        """Divergences D_C in nats, and their slopes in the student's softened scores [C, U]."""
        q_CU = logq_CU.exp()
        if self.kind == "forward":
            p_CU = logp_CU.exp()
            return (p_CU * (logp_CU - logq_CU)).sum(1), q_CU - p_CU
        if self.kind == "reverse":
            ratio_CU = logq_CU - logp_CU
            value_C = (q_CU * ratio_CU).sum(1)
            return value_C, q_CU * (ratio_CU - value_C[:, None])
        beta = self.jsd_beta
        logm_CU = torch.logaddexp(logp_CU + math.log(beta), logq_CU + math.log1p(-beta))
        value_C = beta * (logp_CU.exp() * (logp_CU - logm_CU)).sum(1)
        ratio_CU = (1 - beta) * (logq_CU - logm_CU)
        student_C = (q_CU * ratio_CU).sum(1)
        return value_C + student_C, q_CU * (ratio_CU - student_C[:, None])


@dataclass(frozen=True)
class Scorer:
    """Where logits come from: hidden states and an output matrix, or without one the logits themselves."""

    rows_ND: Tensor
    weight_VD: Tensor | None

    @property
    def vocab_size(self) -> int:
        """Logits of a position."""
        return (self.rows_ND if self.weight_VD is None else self.weight_VD.T).shape[1]

    def to(self, compute: torch.dtype) -> Scorer:
        """With the product in another type."""
        if self.weight_VD is None:
            return self
        return Scorer(self.rows_ND.to(compute), self.weight_VD.to(compute))

    def logits(self, here: slice, exact: torch.dtype) -> Tensor:
        """Of the positions ``here`` [C, V], in a tensor of their own."""
        rows = self.rows_ND[here]
        if self.weight_VD is None:
            return rows.to(exact, copy=True)
        return torch.mm(rows, self.weight_VD.T).to(exact)


class _DistilledLoss(torch.autograd.Function):
    """weight · T² · divergence + (1 - weight) · cross-entropy, summed over N; and both apart as figures.

    As in ``hearth.training.loss`` the gradients of a sum are made together with it, chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weight_VD: Tensor | None,
        labels_N: Tensor,
        teacher: Scorer,
        settings: Divergence,
        compute: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.float64 if compute == torch.float64 else torch.float32
        student, teacher = Scorer(rows_ND, weight_VD).to(compute), teacher.to(compute)
        num, vocab = len(rows_ND), student.vocab_size
        grad_rows = torch.empty_like(rows_ND) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if weight_VD is not None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_VD, dtype=exact)
        sums = torch.zeros(3, dtype=exact, device=rows_ND.device)  # divergence, cross-entropy, agreements
        chunk = chunk_rows(rows_ND.device, num, 2 * vocab)
        for start in range(0, num, chunk):
            here = slice(start, start + chunk)
            slopes_CV = _chunk(student, teacher, labels_N[here], here, settings, sums)
            if weight_VD is None:
                if grad_rows is not None:
                    grad_rows[here] = slopes_CV
                continue
            slopes_CV = slopes_CV.to(compute)
            if grad_rows is not None:
                assert student.weight_VD is not None
                grad_rows[here] = slopes_CV @ student.weight_VD
            if grad_weight is not None:
                add_product(grad_weight, slopes_CV, student.rows_ND[here])
        ctx.gradients = grad_rows, grad_weight
        ctx.weight_dtype = None if weight_VD is None else weight_VD.dtype
        ctx.mark_non_differentiable(sums)
        factor = settings.weight * settings.temperature**2
        return factor * sums[0] + (1 - settings.weight) * sums[1], sums

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of this loss were taken already"
        grad_rows, grad_weight = ctx.gradients
        ctx.gradients = None
        for gradient in (grad_rows, grad_weight):
            if gradient is not None:
                gradient.mul_(grads[0])
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_rows, grad_weight, None, None, None, None


def _chunk(
    student: Scorer, teacher: Scorer, labels_C: Tensor, here: slice, settings: Divergence, sums: Tensor
) -> Tensor:
    """Add the chunk to ``sums``; the slopes [C, V] of the loss in the student's logits."""
    scores_CV = student.logits(here, sums.dtype)
    shared = min(student.vocab_size, teacher.vocab_size)
    wanted_CU = teacher.logits(here, sums.dtype)[:, :shared]
    sums[2] += (scores_CV[:, :shared].argmax(1) == wanted_CU.argmax(1)).sum()
    logp_CU = wanted_CU.div_(settings.temperature).log_softmax(1)
    logq_CU = (scores_CV[:, :shared] / settings.temperature).log_softmax(1)
    values_C, slopes_CU = settings.of(logp_CU, logq_CU)
    sums[0] += values_C.sum()
    logq_CV = scores_CV.log_softmax(1)
    sums[1] -= logq_CV.gather(1, labels_C[:, None]).sum()
    slopes_CV = logq_CV.exp_().mul_(1 - settings.weight)
    slopes_CV.scatter_add_(
        1, labels_C[:, None], slopes_CV.new_full((len(labels_C), 1), settings.weight - 1.0)
    )
    # T² of the loss, over the T of the softened scores.
    slopes_CV[:, :shared] += slopes_CU.mul_(settings.weight * settings.temperature)
    return slopes_CV


def distilled_loss(
    student: Scorer, teacher: Scorer, labels_N: Tensor, settings: Divergence
) -> tuple[Tensor, Tensor]:
    """The loss summed over N, differentiable in the student; and the sums [3] of the divergence (nats, not
    times T²), of the cross-entropy, and of positions where both find the same token likeliest.

    Where one vocabulary is longer (rows of padding) the distributions are compared over what both have.
    """
    rows_ND, weight_VD = student.rows_ND, student.weight_VD
    device = rows_ND.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows_ND.dtype
    if weight_VD is None:
        compute = rows_ND.dtype
    if not torch.is_grad_enabled():
        rows_ND, weight_VD = rows_ND.detach(), None if weight_VD is None else weight_VD.detach()
    apply: Any = _DistilledLoss.apply
    with torch.autocast(device, enabled=False):
        loss, sums = apply(rows_ND, weight_VD, labels_N, teacher, settings, compute)
    return loss, sums
