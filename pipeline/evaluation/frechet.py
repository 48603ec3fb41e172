"""The Fréchet distance between two sets of features, modelled as Gaussians (Heusel et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.evaluation.figures import (
    GROUPS,
    Estimate,
    Features,
    blocks,
    check,
    check_dimensions,
    has_groups,
    jackknife,
    zeros,
)


@dataclass(frozen=True)
class Sums:
    """Holds the sums for mean and covariance: `count`, `total` `D`, and `outer` `D D` (outer products), float64."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Features, device: torch.device) -> Sums:
        """Sum over all rows."""
        return _sums(features, device, groups=1)[0]

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.count - other.count, self.total - other.total, self.outer - other.outer)

    def gaussian(self) -> Gaussian:
        """Compute mean and covariance, divided by n - 1 as in np.cov, ADM, EDM2, pytorch-fid and torch-fidelity."""
        mean = self.total / self.count
        return Gaussian(mean, (self.outer - torch.outer(self.total, mean)) / (self.count - 1), self.count)


def _sums(features: Features, device: torch.device, groups: int) -> list[Sums]:
    """Sum over each group of rows: row i is in group i mod `groups`."""
    check(features)
    total = zeros(groups, features.dimension, device=device)
    outer = zeros(groups, features.dimension, features.dimension, device=device)
    for block in blocks(features, device):
        for group in range(groups):
            rows = block[group::groups]
            total[group] += rows.sum(0)
            outer[group].addmm_(rows.T, rows)
    counts = [len(range(group, len(features), groups)) for group in range(groups)]
    return [Sums(*each) for each in zip(counts, total, outer, strict=True)]


@dataclass(frozen=True)
class Gaussian:
    """Holds `mean` `D` and `covariance` `D D` of `count` rows, float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @property
    def rank(self) -> int:
        """Return the maximum rank of the covariance: one less than the number of rows, at most D."""
        return min(self.count - 1, len(self.mean))

    @cached_property
    def root(self) -> Tensor:
        """Return a factor of the covariance, root @ root.T, without its null space: `D r`. Computed once."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) with covariances A and B; at least 0.

    The eigenvalues of A B are those of the symmetric matrix root(B).T A root(B): real and nonnegative, so there are no
    complex matrices, and covariances can be singular. If many sets are compared with one, pass that one as `b`: its
    root is cached.
    """
    check_dimensions(len(a.mean), len(b.mean))
    products = torch.linalg.eigvalsh(b.root.T @ a.covariance @ b.root)
    # eigenvalues beyond the rank are rounding errors, whose square roots would add up
    overlap = products[-a.rank :].clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(distance.item(), 0.0)


class FrechetFigures(NamedTuple):
    """Holds the usual distance, and its extrapolation to infinitely many images; None below 2 D rows."""

    distance: Estimate
    extrapolated: Estimate | None


def frechet(features: Features, reference: Gaussian, device: torch.device) -> FrechetFigures:
    """Compute the Fréchet distance of `features` to the reference, and its extrapolation to infinitely many images.

    The distance falls with the number of rows N, nearly linearly in 1/N (Chong and Forsyth 2020, "Effectively unbiased
    FID and Inception score and where to find them"); the intercept is the extrapolated distance. Here the line goes
    through the distance of all N rows and the mean distance of the ten sets of 9/10 N rows, which the jackknife needs
    anyway (this is its bias correction: Quenouille 1956). In simulations with Gaussians its error is about half that of
    a line through prefixes of N/2 to N rows, because all rows have equal weight. Below 2 D rows the relation is not
    linear, and there is no extrapolation.

    The interval of the distance is for its mean at this N, that of the extrapolated distance for its limit. Both keep
    the bias that comes from the reference's own number of images.
    """
    groups = _sums(features, device, GROUPS)
    whole = sum(groups[1:], start=groups[0])
    distance = frechet_distance(whole.gaussian(), reference)
    if not has_groups(whole.count):
        return FrechetFigures(Estimate(distance, None), None)
    without = [frechet_distance((whole - group).gaussian(), reference) for group in groups]
    plain = jackknife(distance, without)
    if whole.count < 2 * features.dimension:
        return FrechetFigures(plain, None)
    intercept = GROUPS * distance - (GROUPS - 1) * sum(without) / GROUPS
    return FrechetFigures(plain, jackknife(intercept, without))


def too_few(count: int, dimension: int) -> str | None:
    """Return a warning if `count` images are too few for a Fréchet distance of features of `dimension` D; else None.

    N draws from a Gaussian should have distance 0 to that Gaussian. In simulations with D = 256, they have these
    fractions of the total variance, first with equal variance in all directions, then with variance 1/i in direction i:

        N                  D              2 D             5 D             10 D            20 D
        distance           0.31   0.13    0.14   0.06     0.05   0.02     0.03   0.01     0.01   0.01
        extrapolated      -0.15  -0.05   -0.014 -0.005   -0.002 -0.001    0.000  0.000    0.000  0.000

    The first is about (1/4 + 1/D) D/N. The same is true for the reference's number of images.
    """
    if count <= dimension:
        reason = f"fewer than D + 1 = {dimension + 1}: the covariance is singular and the distance far too high"
    elif count < 2 * dimension:
        reason = f"fewer than 2 D = {2 * dimension}: the distance is far too high and cannot be extrapolated"
    elif count < 10 * dimension:
        reason = f"fewer than 10 D = {10 * dimension}: the distance is visibly too high"
    else:
        return None
    instead = "kernel distance" if count < 2 * dimension else "extrapolated Fréchet distance or the kernel distance"
    return f"{count} images are {reason}; read the {instead}"
