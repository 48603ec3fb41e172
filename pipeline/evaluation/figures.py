"""Shared parts of all metrics ("figures"): reading features in blocks, and estimates with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 1000  # rows per block; a constant, because the last bits of a sum depend on where it is split
LIMIT = 10_000  # maximum rows of a set, for metrics whose cost is quadratic
GROUPS = 10  # groups of the jackknife; BLOCK is a multiple, so row i of a block is also in group i mod 10
_STUDENT = 2.262  # 97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom
NORMAL = 1.960  # 97.5 % quantile of the normal distribution


class Features(Protocol):
    """Describes feature vectors of N images, read by index, in a fixed random order: the first n are a fair sample."""

    @property
    def dimension(self) -> int:
        """Return D, the length of a vector."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return the class of each image, `N`; negative: no class."""

    def __len__(self) -> int: ...

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Read the vectors of these rows: `n D`."""


@dataclass(frozen=True)
class Selected:
    """Selects some rows of other features, such as those of one class: `rows` int64, ascending."""

    features: Features
    rows: NDArray[np.int64]

    @property
    def dimension(self) -> int:
        return self.features.dimension

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.features.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self.features.read(self.rows[rows])


def check(*sets: Features) -> None:
    """Raise ValueError if a set has fewer than two images, or if the vectors of the sets differ in length."""
    for features in sets:
        if len(features) < 2:
            raise ValueError(f"number of images = {len(features)}: metrics need at least two")
        check_dimensions(sets[0].dimension, features.dimension)


def check_dimensions(one: int, other: int) -> None:
    """Raise ValueError if the lengths of two vectors differ."""
    if one != other:
        raise ValueError(
            f"features with {one} and {other} numbers per image: only features of the same network can be compared"
        )


def blocks(features: Features, device: torch.device, stop: int | None = None) -> Iterator[Tensor]:
    """Yield the rows up to `stop` (default: all) in blocks, float64 `n D`, n = BLOCK except for the last block.

    They are on `device`, or on the CPU if the device has no float64 (mps). ValueError if a row is not finite.
    """
    stop = len(features) if stop is None else min(stop, len(features))
    for start in range(0, stop, BLOCK):
        rows = features.read(slice(start, min(start + BLOCK, stop))).astype(np.float64)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            row = start + int(finite.argmin())
            row = int(features.rows[row]) if isinstance(features, Selected) else row
            raise ValueError(f"features of image {row} (counted from 0) contain NaN or infinity: check this image")
        yield torch.from_numpy(rows).to(_working(device))


def zeros(*shape: int, device: torch.device) -> Tensor:
    """Return float64 zeros on the device where `blocks` puts the rows."""
    return torch.zeros(*shape, dtype=torch.float64, device=_working(device))


def _working(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class Estimate:
    """Holds a metric and its 95 % confidence interval; None if there are too few images for one.

    The interval shows how much the metric would change with other images of the same model. It does not include other
    training runs, other reference images or the bias of the metric.
    """

    value: float
    interval: tuple[float, float] | None


def group_sizes(rows: int) -> list[int]:
    """Return how many of `rows` rows are in each group of the jackknife."""
    return [len(range(group, rows, GROUPS)) for group in range(GROUPS)]


def has_groups(rows: int) -> bool:
    """Return whether `rows` rows are enough for the jackknife: two in each group."""
    return rows >= 2 * GROUPS


def jackknife(value: float, without: Sequence[float]) -> Estimate:
    """Compute the interval of `value` from its values `without` each group (delete-a-group jackknife)."""
    spread = sum((each - sum(without) / GROUPS) ** 2 for each in without)
    margin = _STUDENT * math.sqrt((GROUPS - 1) / GROUPS * spread)
    return Estimate(value, (value - margin, value + margin))


def share(hits: int, of: int) -> Estimate:
    """Return the fraction hits / of with Wilson's interval, which assumes independent draws."""
    value, weight = hits / of, NORMAL**2 / of
    centre = (value + weight / 2) / (1 + weight)
    margin = math.sqrt(value * (1 - value) * weight + weight**2 / 4) / (1 + weight)
    low, high = max(centre - margin, 0.0), min(centre + margin, 1.0)
    return Estimate(value, (min(low, value), max(high, value)))  # for 0 and 1 a bound equals the value up to rounding


def mean_of(values: Tensor) -> Estimate:
    """Return the mean of at least two values with an interval from its standard error, assuming independence."""
    value, margin = values.mean().item(), NORMAL * values.std().item() / math.sqrt(len(values))
    return Estimate(value, (value - margin, value + margin))
