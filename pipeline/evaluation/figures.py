"""What all figures share: how features are read, and a figure with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 1000  # rows in work at once: one constant, since the last bits of a sum depend on where it is cut
LIMIT = 10_000  # rows of a set where the work grows with their square
GROUPS = 10  # of the jackknife; BLOCK is a multiple, so that row i of a block is in group i mod 10 too
_STUDENT = 2.262  # the 97.5 % point of Student's t with GROUPS - 1 degrees of freedom
NORMAL = 1.960  # the same of the normal distribution


class Features(Protocol):
    """Feature vectors of N images, read by index. Their order is fixed and random: the first n are a fair sample."""

    @property
    def dimension(self) -> int:
        """D, the length of a vector."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """`N`: the class of each image; negative: none."""

    def __len__(self) -> int: ...

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of these rows: `n D`."""


@dataclass(frozen=True)
class Selected:
    """Some rows of other features, such as those of one class: `rows` int64, ascending."""

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
    """ValueError for a set of fewer than two images, or sets whose vectors differ in length."""
    for features in sets:
        if len(features) < 2:
            raise ValueError(f"number of images = {len(features)}: figures need at least two")
        check_dimensions(sets[0].dimension, features.dimension)


def check_dimensions(one: int, other: int) -> None:
    """ValueError for vectors that differ in length."""
    if one != other:
        raise ValueError(
            f"features of {one} and of {other} numbers an image: only features of the same network can be compared"
        )


def blocks(features: Features, device: torch.device, stop: int | None = None) -> Iterator[Tensor]:
    """The rows up to `stop` (default: all) as float64 `n D`, n = BLOCK but for the last.

    On `device`, or on the CPU for one without float64 (mps). ValueError for a row that is not finite.
    """
    stop = len(features) if stop is None else min(stop, len(features))
    for start in range(0, stop, BLOCK):
        rows = features.read(slice(start, min(start + BLOCK, stop))).astype(np.float64)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            row = start + int(finite.argmin())
            row = int(features.rows[row]) if isinstance(features, Selected) else row
            raise ValueError(f"features of image {row} (counted from 0) hold NaN or infinity: look at it, measure anew")
        yield torch.from_numpy(rows).to(_working(device))


def zeros(*shape: int, device: torch.device) -> Tensor:
    """Float64, where `blocks` puts the rows."""
    return torch.zeros(*shape, dtype=torch.float64, device=_working(device))


def _working(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval, which covers the true one in about 95 % of all draws of the images measured.

    It says how far the figure would move with other images of the same model. Other trainings, other reference images
    and the figure's bias are not in it. None where there are too few images to tell.
    """

    value: float
    interval: tuple[float, float] | None


def group_sizes(rows: int) -> list[int]:
    """How many of `rows` rows each group of the jackknife holds."""
    return [len(range(group, rows, GROUPS)) for group in range(GROUPS)]


def has_groups(rows: int) -> bool:
    """Whether `rows` rows are enough for the jackknife: two in each group."""
    return rows >= 2 * GROUPS


def jackknife(value: float, without: Sequence[float]) -> Estimate:
    """The interval of `value` from what it is `without` each of the groups (the delete-a-group jackknife)."""
    spread = sum((each - sum(without) / GROUPS) ** 2 for each in without)
    margin = _STUDENT * math.sqrt((GROUPS - 1) / GROUPS * spread)
    return Estimate(value, (value - margin, value + margin))


def share(hits: int, of: int) -> Estimate:
    """The share of `hits`, with Wilson's interval: as if each were an independent draw."""
    value, weight = hits / of, NORMAL**2 / of
    centre = (value + weight / 2) / (1 + weight)
    margin = math.sqrt(value * (1 - value) * weight + weight**2 / 4) / (1 + weight)
    low, high = max(centre - margin, 0.0), min(centre + margin, 1.0)
    return Estimate(value, (min(low, value), max(high, value)))  # of 0 and of 1, bounds are the value but for rounding


def mean_of(values: Tensor) -> Estimate:
    """The mean of at least two values, with an interval from its standard error: as if they were independent."""
    value, margin = values.mean().item(), NORMAL * values.std().item() / math.sqrt(len(values))
    return Estimate(value, (value - margin, value + margin))
