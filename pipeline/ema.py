"""Averages of a model's weights (EMA or power-function), and new power-function averages from saved snapshots.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.compatibility import check_width


def halflife_weight(images_seen: int, batch_size: int, halflife: float) -> float:
    """Return the weight of the newest parameters in an EMA with a half-life in images, after the step that ended at
    `images_seen`.

    The half-life is at most a tenth of the images seen, so that the random initial weights are forgotten early.
    """
    return 1 - 0.5 ** (batch_size / min(halflife, max(images_seen / 10, 1e-8)))


def power_weight(images_seen: int, batch_size: int, gamma: float) -> float:
    """Return the same weight for a power-function average, where parameters at time t have weight t^gamma (equation
    127)."""
    return 1 - (1 - batch_size / images_seen) ** (gamma + 1)


def gamma_of(width: float) -> float:
    """Return the exponent gamma of a power-function average with standard deviation `width`, a fraction of the run.

    It is the positive root of width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (equation 123). ValueError if none exists.
    """
    check_width(width, "width")
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Average:
    """Keeps a running average of a model's parameters; `weight(images_seen, batch_size)` is the newest one's weight."""

    def __init__(self, model: nn.Module, weight: Callable[[int, int], float]) -> None:
        self._weight = weight
        self._parameters = [parameter.detach() for parameter in model.parameters()]
        self.tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
        assert self.tensors.keys() == model.state_dict().keys()  # no buffers: they would not be averaged

    @torch.no_grad()
    def update(self, *, images_seen: int, batch_size: int) -> None:
        """Update the average after the step that ended at `images_seen`."""
        torch._foreach_lerp_(list(self.tensors.values()), self._parameters, self._weight(images_seen, batch_size))


def reconstruction_weights(
    snapshots: Sequence[tuple[int, float]], images_seen: int, gamma: float
) -> NDArray[np.float64]:
    """Return the weights of snapshots (images seen, gamma) whose sum best approximates the power-function average of
    `gamma` at `images_seen`, by least squares over the whole training (algorithm 3)."""
    times, gammas = (np.array(column, dtype=np.float64) for column in zip(*snapshots, strict=True))
    overlaps = _overlap(times[:, None], gammas[:, None], times[None], gammas[None])
    wanted = _overlap(times, gammas, np.array(float(images_seen)), np.array(gamma))
    return np.linalg.lstsq(overlaps, wanted, rcond=None)[0].astype(np.float64)


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of tensors, summed in float64 because the weights are large with alternating signs."""
    total = torch.zeros_like(parts[0], dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        total += part.double() * weight
    return total.to(parts[0].dtype)


def _overlap(ta: NDArray, ga: NDArray, tb: NDArray, gb: NDArray) -> NDArray[np.float64]:
    """Return the integral of the product of two profiles (g + 1) / t (x / t)^g, 0 <= x <= t (equation 151)."""
    exponent = np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * (ta / tb) ** exponent / ((ga + gb + 1) * np.maximum(ta, tb))
