"""Muon: what it makes of a gradient, and that matrices and kernels are treated alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.muon import Muon, orthogonalize
from tests.helpers.models import normals

SHAPES = [(8, 8), (8, 30), (30, 8), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_newton_schulz_iteration_in_another_order(shape: tuple[int, int]) -> None:
    """As it is usually written, on the rectangular matrix, in float64."""
    matrices = normals(3, *shape)
    x = matrices.double()
    x /= torch.linalg.matrix_norm(x, keepdim=True)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.mT) @ x + 2.0315 * (x @ x.mT) @ (x @ x.mT) @ x
    torch.testing.assert_close(orthogonalize(matrices).double(), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = normals(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    seen = u.mT @ orthogonalize(matrix[None])[0] @ v.mT
    assert (seen - seen.diagonal().diag()).abs().max() < 1e-4
    assert ((seen.diagonal() > 0.3) & (seen.diagonal() < 1.25)).all()


def test_a_gradient_of_zeros_and_its_rows_and_columns_of_zeros_move_nothing() -> None:
    matrices = normals(2, 6, 9)
    matrices[0], matrices[1, 2], matrices[1, :, 3] = 0, 0, 0
    moved = orthogonalize(matrices)
    assert not moved[0].any()
    assert not moved[1, 2].any()
    assert not moved[1, :, 3].any()


def stepped(parameters: list[nn.Parameter], steps: int = 3) -> list[torch.Tensor]:
    """The parameters after some steps with gradients that are functions of the place in the list and the step."""
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.5)
    for step in range(steps):
        for place, parameter in enumerate(parameters):
            parameter.grad = normals(parameter.numel(), seed=7 * step + place).view(parameter.shape)
        optimizer.step()
    return [parameter.detach().flatten() for parameter in parameters]


def test_a_kernel_moves_as_the_matrix_of_its_rows_in_any_memory_format() -> None:
    kernel, matrix = normals(4, 3, 3, 3), normals(4, 3, 3, 3).flatten(1)
    [expected] = stepped([nn.Parameter(matrix.clone())])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        [moved] = stepped([nn.Parameter(kernel.clone().to(memory_format=memory_format))])
        torch.testing.assert_close(moved, expected)


def test_parameters_of_one_shape_move_as_each_would_alone() -> None:
    together = stepped([nn.Parameter(normals(4, 6)), nn.Parameter(normals(4, 6)), nn.Parameter(normals(6, 4))])
    [first] = stepped([nn.Parameter(normals(4, 6))])
    torch.testing.assert_close(together[0], first)
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(8, 8), (8, 30), (30, 8)])
def test_a_step_is_about_as_long_as_one_of_adamw(shape: tuple[int, int]) -> None:
    """0.2 times the rate, as root mean square; torch's Muon on the same gradients goes the same way."""
    moved, theirs = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
    ours = Muon([moved], lr=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for parameter, optimizer in ((moved, ours), (theirs, reference)):
        for seed in range(2):
            parameter.grad = normals(*shape, seed=seed)
            optimizer.step()
            if not seed:
                assert 0.6 < parameter.detach().square().mean().sqrt() / 0.02 < 1.3
    torch.testing.assert_close(moved, theirs, atol=2e-3, rtol=0.1)  # theirs is in bfloat16


def test_a_step_that_the_device_is_told_to_skip_changes_nothing() -> None:
    """Neither weights nor momentum, though the gradient is NaN; and the next one is as if it had not been."""
    layers = [nn.Linear(6, 4), nn.Linear(6, 4)]
    layers[1].load_state_dict(layers[0].state_dict())
    muons = [Muon([layer.weight], lr=0.1, weight_decay=0.1) for layer in layers]
    good, bad = normals(4, 6), torch.full((4, 6), torch.nan)
    for layer, muon, gradients in zip(layers, muons, ([good, good], [good, bad, good]), strict=True):
        for gradient in gradients:
            layer.weight.grad = gradient.clone()
            muon.found_inf = gradient.isnan().any().float()
            before = layer.weight.detach().clone()
            muon.step()
            assert torch.equal(layer.weight, before) == bool(muon.found_inf)
    assert torch.equal(layers[0].weight, layers[1].weight)
    layers[0].weight.grad, muons[0].found_inf = good.clone(), None
    layers[1].weight.grad = good.clone()
    for muon in muons:
        muon.step()
    assert torch.equal(layers[0].weight, layers[1].weight)  # told that there is none, it is the same step
