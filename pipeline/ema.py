"""Averages of a model's weights on the clock of images seen, and any average of one shape from snapshots of two others.

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
    """What the newest weights count in an average with a half-life in images, after a step that ended at `images_seen`.

    Early in a run the half-life is a tenth of the images seen, so that the random start is forgotten.
    """
    return 1 - 0.5 ** (batch_size / min(halflife, max(images_seen / 10, 1e-8)))


def power_weight(images_seen: int, batch_size: int, gamma: float) -> float:
    """The same for a power-function average, in which weights of time t count as t^gamma (equation 127)."""
    return 1 - (1 - batch_size / images_seen) ** (gamma + 1)


def gamma_of(width: float) -> float:
    """The exponent of a power-function average whose standard deviation is `width`, a share of the run (equation 123):
    the real root of width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 above 0. ValueError where there is none."""
    check_width(width, "width")
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Average:
    """A weighted average of a model's parameters; `weight(images_seen, batch_size)` is what the newest count."""

    def __init__(self, model: nn.Module, weight: Callable[[int, int], float]) -> None:
        self._weight = weight
        self._parameters = [parameter.detach() for parameter in model.parameters()]
        self.tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
        assert self.tensors.keys() == model.state_dict().keys()  # it has no buffers, which would not be averaged

    @torch.no_grad()
    def update(self, *, images_seen: int, batch_size: int) -> None:
        """Move towards the model after a step that ended at `images_seen`."""
        torch._foreach_lerp_(list(self.tensors.values()), self._parameters, self._weight(images_seen, batch_size))


def reconstruction(snapshots: Sequence[tuple[int, float]], images_seen: int, gamma: float) -> NDArray[np.float64]:
    """What each of the snapshots (images seen, gamma) counts in the sum that comes closest to the power-function
    average of `gamma` at `images_seen`, by least squares over all of training (algorithm 3)."""
    times, gammas = (np.array(column, dtype=np.float64) for column in zip(*snapshots, strict=True))
    overlaps = _overlap(times[:, None], gammas[:, None], times[None], gammas[None])
    wanted = _overlap(times, gammas, np.array(float(images_seen)), np.array(gamma))
    return np.linalg.lstsq(overlaps, wanted, rcond=None)[0].astype(np.float64)


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Summed in float64: the weights are large, and their signs alternate."""
    total = torch.zeros_like(parts[0], dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        total += part.double() * weight
    return total.to(parts[0].dtype)


def _overlap(ta: NDArray, ga: NDArray, tb: NDArray, gb: NDArray) -> NDArray[np.float64]:
    """The integral of the product of two averages' profiles (g + 1) / t (x / t)^g, 0 <= x <= t (equation 151)."""
    exponent = np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * (ta / tb) ** exponent / ((ga + gb + 1) * np.maximum(ta, tb))
