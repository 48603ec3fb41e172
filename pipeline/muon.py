"""The Muon optimizer for matrices and convolution kernels: momentum with all singular values near one (Jordan 2024,
https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan 2024's odd polynomial: steep at 0, values 0.7..1.2 near 1
_SPANS = (2, 3)  # five iterations in two groups; X X' is recomputed between them, as its errors grow (TensorFloat-32)
_SMALL = 1e-7


class Muon(Optimizer):
    """Moves each parameter along its orthogonalised Nesterov momentum, with decoupled weight decay.

    torch.optim.Muon accepts only matrices and computes in bfloat16, which many CPUs have no instructions for. Here a
    kernel `O I h w` is the matrix `O hwI`, and parameters of one shape are orthogonalised together. The root mean
    square of a step is 0.2 `lr`, about that of AdamW, so that both can use one learning rate (Liu et al. 2025, "Muon is
    scalable for LLM training", equation 4). A step changes nothing while the tensor `found_inf` is 1, as in fused
    AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        assert all(p.ndim >= 2 for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape[0], parameter[0].numel()].append(parameter)
            for parameters in alike.values():
                self._move(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _move(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        share: Tensor | float = 1.0  # 1: take the step; 0: skip it
        if self.found_inf is not None:
            bad, share = self.found_inf > 0, 1 - self.found_inf
            gradients = [torch.where(bad, b, g) for b, g in zip(buffers, gradients, strict=True)]  # no NaN
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        steps = orthogonalize(torch.stack([each.movedim(1, -1).flatten(1) for each in ahead]))  # channels_last
        size = 0.2 * max(steps.shape[1:]) ** 0.5
        if self.found_inf is not None:
            steps = steps * share
        if weight_decay:
            torch._foreach_mul_(parameters, 1 - share * lr * weight_decay)
        moved = [step.view_as(p.movedim(1, -1)).movedim(-1, 1) for step, p in zip(steps, parameters, strict=True)]
        torch._foreach_add_(parameters, moved, alpha=-lr * size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Set all nonzero singular values of each matrix near one (0.7 to 1.2); float32 `N R C` -> the same shape.

    Each Newton-Schulz iteration X <- a X + b (X X') X + c (X X')^2 X multiplies X by a symmetric matrix that is a
    polynomial of X X'. So these matrices are multiplied first, on the shorter side, and then X once for several
    iterations (Dao et al. 2026, https://dao-lab.ai/blog/2026/gram-newton-schulz).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + _SMALL)
    for iterations in _SPANS:
        x = _iterate(x @ x.mT, iterations) @ x
    return x.mT if tall else x


def _iterate(gram: Tensor, iterations: int) -> Tensor:
    """Return the matrix by which that many iterations multiply X; `gram` is X X'."""
    a, b, c = _COEFFICIENTS
    product = None
    for iteration in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if iteration < iterations - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product
