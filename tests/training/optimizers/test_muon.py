"""Orthogonalisation, of matrices and of stacks of them."""

from __future__ import annotations

import pytest
import torch

from hearth.training.optimizers.muon import MuonWithAdamW, orthogonalize


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    # The iteration is tuned for speed: Jordan 2024 gives 0.7 to 1.2 for all but tiny values.
    assert values.max() < 1.3
    assert values[: len(values) * 3 // 4].min() > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    rotated = left.T @ orthogonalize(matrix).float() @ right.T
    off_diagonal = rotated - torch.diag(rotated.diagonal())
    assert off_diagonal.abs().max() < 0.05


def test_torchs_iteration_gives_the_same() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(0)
    matrix = torch.randn(24, 40)
    expected = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(orthogonalize(matrix).float(), expected.float(), rtol=0, atol=0.03)


def test_a_stack_of_experts_is_orthogonalised_one_by_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 20) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    together = orthogonalize(stack)
    for index in range(3):
        torch.testing.assert_close(together[index], orthogonalize(stack[index]), rtol=0, atol=0.02)


def test_the_size_of_an_update_is_that_of_adamw() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.randn_like(weight)
    group = {"params": [weight], "hidden": True, "weight_decay": 0.0}
    MuonWithAdamW([group], lr=1.0, betas=(0.9, 0.95), eps=1e-8).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.2)
