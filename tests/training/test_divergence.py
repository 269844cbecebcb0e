"""The loss of distillation against plain torch in float64: values, gradients, vocabularies of two lengths."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hearth.training.divergence import Divergence, Scorer, distilled_loss

NUM, STUDENT_WIDTH, TEACHER_WIDTH, VOCAB = 150, 12, 20, 97


def plain(student: Tensor, teacher: Tensor, labels: Tensor, settings: Divergence) -> tuple[Tensor, ...]:
    """The formulas as the papers write them, with all logits held."""
    shared = min(student.shape[1], teacher.shape[1])
    q = (student[:, :shared] / settings.temperature).softmax(1)
    p = (teacher[:, :shared] / settings.temperature).softmax(1)
    if settings.kind == "forward":
        divergence = F.kl_div(q.log(), p, reduction="sum")
    elif settings.kind == "reverse":
        divergence = F.kl_div(p.log(), q, reduction="sum")
    else:
        beta = settings.jsd_beta
        mixture = beta * p + (1 - beta) * q
        divergence = beta * F.kl_div(mixture.log(), p, reduction="sum")
        divergence = divergence + (1 - beta) * F.kl_div(mixture.log(), q, reduction="sum")
    entropy = F.cross_entropy(student, labels, reduction="sum")
    loss = settings.weight * settings.temperature**2 * divergence + (1 - settings.weight) * entropy
    agreements = (student[:, :shared].argmax(1) == teacher[:, :shared].argmax(1)).sum()
    return loss, divergence, entropy, agreements


SETTINGS = [
    Divergence(kind, temperature, weight, beta)
    for (kind, beta), (temperature, weight) in itertools.product(
        [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)], [(1.0, 0.5), (2.5, 0.7), (0.7, 1.0)]
    )
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("teacher_vocab", [VOCAB, VOCAB + 16, VOCAB - 16])
def test_values_and_gradients_are_those_of_the_formulas(settings: Divergence, teacher_vocab: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(NUM, STUDENT_WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCAB, STUDENT_WIDTH, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(NUM, TEACHER_WIDTH, dtype=torch.float64)
    their_head = torch.randn(teacher_vocab, TEACHER_WIDTH, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (NUM,))
    loss, sums = distilled_loss(Scorer(hidden, head), Scorer(theirs, their_head), labels, settings)
    found = torch.autograd.grad(loss * 0.3, (hidden, head))
    wanted_loss, *wanted_sums = plain(hidden @ head.T, theirs @ their_head.T, labels, settings)
    wanted = torch.autograd.grad(wanted_loss * 0.3, (hidden, head))
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(sums, torch.stack([value.double() for value in wanted_sums]))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("settings", SETTINGS[::3], ids=str)
def test_logits_instead_of_hidden_states(settings: Divergence) -> None:
    torch.manual_seed(1)
    ours = torch.randn(NUM, VOCAB, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(NUM, VOCAB, dtype=torch.float64)
    kept = ours.detach().clone(), theirs.clone()
    labels = torch.randint(0, VOCAB, (NUM,))
    loss, _ = distilled_loss(Scorer(ours, None), Scorer(theirs, None), labels, settings)
    wanted = plain(ours, theirs, labels, settings)[0]
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(wanted, ours))
    assert torch.equal(ours.detach(), kept[0]), "the logits of others are not overwritten"
    assert torch.equal(theirs, kept[1])


def test_a_generalised_jsd_lies_between_both_directions() -> None:
    """GKD, section 3: JSD(b) / b tends to the forward KL for b -> 0, JSD(b) / (1 - b) to the reverse."""
    torch.manual_seed(2)
    logp, logq = (torch.randn(9, 31, dtype=torch.float64).log_softmax(1) for _ in range(2))
    forward, _ = Divergence("forward").of(logp, logq)
    reverse, _ = Divergence("reverse").of(logp, logq)
    small, _ = Divergence("jsd", jsd_beta=1e-6).of(logp, logq)
    large, _ = Divergence("jsd", jsd_beta=1 - 1e-6).of(logp, logq)
    torch.testing.assert_close(small / 1e-6, forward, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(large / 1e-6, reverse, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_square_of_the_temperature_keeps_the_size_of_the_gradient(kind: str) -> None:
    """Hinton et al. 2015, section 2: without it the gradient would shrink with 1/T²."""
    torch.manual_seed(3)
    theirs = torch.randn(64, VOCAB, dtype=torch.float64)
    sizes = []
    for temperature in (20.0, 80.0):
        ours = torch.zeros(64, VOCAB, dtype=torch.float64, requires_grad=True)
        settings = Divergence(kind, temperature, 1.0)  # type: ignore[arg-type]
        loss, _ = distilled_loss(Scorer(ours, None), Scorer(theirs, None), torch.zeros(64).long(), settings)
        sizes.append(float(torch.autograd.grad(loss, ours)[0].norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_a_teacher_like_the_student_leaves_only_the_data() -> None:
    torch.manual_seed(4)
    ours = torch.randn(NUM, VOCAB, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (NUM,))
    for kind in ("forward", "reverse", "jsd"):
        settings = Divergence(kind, 2.0, 0.4)  # type: ignore[arg-type]
        loss, sums = distilled_loss(Scorer(ours, None), Scorer(ours.detach(), None), labels, settings)
        assert float(sums[0]) == pytest.approx(0.0, abs=1e-9)
        assert int(sums[2]) == NUM
        torch.testing.assert_close(loss, 0.6 * F.cross_entropy(ours, labels, reduction="sum"))


def test_no_gradients_are_made_where_none_are_wanted() -> None:
    rows = torch.randn(8, 16, requires_grad=True)
    with torch.no_grad():
        loss, _ = distilled_loss(Scorer(rows, None), Scorer(rows, None), torch.zeros(8).long(), Divergence())
    assert not loss.requires_grad
