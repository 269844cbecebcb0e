"""Counting the bytes of live tensors."""

from __future__ import annotations

import torch

from hearth.training.peak_memory import peak_bytes

CPU = torch.device("cpu")
MIB = 1 << 20


def mebibyte() -> torch.Tensor:
    return torch.empty(MIB // 4)


def test_tensors_one_after_the_other_count_once() -> None:
    def work() -> None:
        for _ in range(5):
            mebibyte()

    assert peak_bytes(work, CPU) == MIB


def test_tensors_that_live_together_add_up() -> None:
    assert peak_bytes(lambda: [mebibyte() for _ in range(5)], CPU) == 5 * MIB


def test_views_and_results_in_place_cost_nothing() -> None:
    def work() -> None:
        a = mebibyte()
        a.view(2, -1).add_(1)[0].mul_(2)
        torch.neg(a, out=a)

    assert peak_bytes(work, CPU) == MIB


def test_what_was_there_before_does_not_count() -> None:
    before = mebibyte()
    assert peak_bytes(lambda: before.add_(1), CPU) == 0
    assert peak_bytes(lambda: before + 1, CPU) == MIB


def test_autograd_keeps_and_releases() -> None:
    weight = torch.nn.Parameter(torch.ones(MIB // 4))

    def chain() -> None:
        x = weight
        for _ in range(4):
            x = x.exp()
        x.sum().backward()

    # Four results are kept; in the backward pass two gradients beside those that are left.
    peak = peak_bytes(chain, CPU)
    assert 4 * MIB < peak < 6.5 * MIB
    with torch.no_grad():
        weight.grad = None
        assert 2 * MIB <= peak_bytes(lambda: weight.exp().exp().exp().exp(), CPU) < 2.1 * MIB
