"""Figures by nearest neighbours in feature space: precision, recall, density, coverage, memorisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline.evaluation.figures import (
    BLOCK,
    LIMIT,
    NORMAL,
    Estimate,
    Features,
    blocks,
    check,
    mean_of,
    share,
)

_PRECISION_NEIGHBOURS, _DENSITY_NEIGHBOURS = 3, 5  # as their authors chose
_ROUNDING = 1e-12  # of a squared distance, relative to the squared lengths of the vectors
_CLOSE = 0.01  # the share of held-out images that count as very close


@dataclass(frozen=True)
class NeighbourFigures:
    """Improved precision and recall (Kynkäänniemi et al. 2019, k = 3), density and coverage (Naeem et al. 2020, k = 5).

    Around each image lies a ball that reaches to its k-th nearest neighbour of the same set. Precision: the share of
    images in some ball of the reference; recall: the share of the reference in some ball of the images; density: how
    many balls of the reference an image is in, on average, over k; coverage: the share of the reference's balls with an
    image in them. The surface is part of a ball, so a set has precision and recall 1 to itself (and density 1 + 1/k).

    Of `rows` rows of each set: all four change with that number. The intervals take rows as independent and the balls
    as given, and so are approximate.
    """

    rows: int
    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def neighbour_figures(features: Features, reference: Features, device: torch.device) -> NeighbourFigures:
    """Of the first rows of both sets: as many as the smaller one has, at most LIMIT.

    In a set with no more than k rows the farthest one takes the place of the k-th nearest.
    """
    check(features, reference)
    rows = min(len(features), len(reference), LIMIT)
    own_radii, _ = _squared_radii(features, rows, device)
    near_radii, far_radii = _squared_radii(reference, rows, device)
    precise, inside = [], []
    recalled, covered = (torch.zeros_like(own_radii, dtype=torch.bool) for _ in range(2))
    for x, radii in zip(blocks(features, device, rows), own_radii.split(BLOCK), strict=True):
        found, count = torch.zeros_like(radii, dtype=torch.bool), torch.zeros_like(radii)
        for j, y in enumerate(blocks(reference, device, rows)):
            part = slice(j * BLOCK, (j + 1) * BLOCK)
            squared = _squared_distances(x, y, slack=_ROUNDING)
            in_far_ball = squared <= far_radii[part]
            found |= (squared <= near_radii[part]).any(1)
            count += in_far_ball.sum(1)
            recalled[part] |= (squared <= radii[:, None]).any(0)
            covered[part] |= in_far_ball.any(0)
        precise.append(found)
        inside.append(count)
    shares = [share(int(hits.sum()), rows) for hits in (torch.cat(precise), recalled, covered)]
    density = mean_of(torch.cat(inside) / min(_DENSITY_NEIGHBOURS, rows - 1))
    return NeighbourFigures(rows, shares[0], shares[1], density, shares[2])


def _squared_radii(features: Features, rows: int, device: torch.device) -> Tensor:
    """The squared distances of each row to its 3rd and to its 5th nearest neighbour: `2 N`."""
    most = min(_DENSITY_NEIGHBOURS, rows - 1)
    radii = []
    for i, x in enumerate(blocks(features, device, rows)):
        nearest = x.new_empty(len(x), 0)
        for j, y in enumerate(blocks(features, device, rows)):
            squared = _squared_distances(x, y)
            if i == j:
                squared.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squared], dim=1)
            nearest = nearest.topk(min(most, nearest.shape[1]), largest=False).values
        radii.append(nearest[:, [min(_PRECISION_NEIGHBOURS, most) - 1, most - 1]])
    return torch.cat(radii).T


def _squared_distances(x: Tensor, y: Tensor, slack: float = 0.0) -> Tensor:
    """`n D` and `m D` -> `n m`, from lengths and products, less `slack` of the squared lengths.

    A slack above the rounding keeps on a ball's surface what is on it, and equal rows together.
    """
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(lengths, x, y.T, beta=1 - slack, alpha=-2)


def nearest(
    features: Features, reference: Features, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The Euclidean distance of each row to the nearest of all rows of the reference, and that row: `N` and `N`.

    An exact copy is at exactly 0; of several at the same distance, the first counts.
    """
    check(features, reference)
    distances, rows = [], []
    for x in tqdm(blocks(features, device), total=-(-len(features) // BLOCK), desc="nearest images", leave=False):
        best = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        best_row = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for j, y in enumerate(blocks(reference, device)):
            squared, row = _nearest_in_block(x, y)
            closer = squared < best
            best = torch.where(closer, squared, best)
            best_row = torch.where(closer, row + j * BLOCK, best_row)
        distances.append(best.sqrt().cpu())
        rows.append(best_row.cpu())
    return torch.cat(distances).numpy(), torch.cat(rows).numpy()


def _nearest_in_block(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The squared distance of each row of `x` to the nearest of `y`, and its index: the candidates are found by
    products, which round, and then measured by differences, which do not."""
    squared = _squared_distances(x, y)
    rounding = _ROUNDING * (x.square().sum(1) + y.square().sum(1).max())
    candidates = squared <= (squared.amin(1) + rounding)[:, None]
    at, of = candidates.nonzero(as_tuple=True)
    exact = torch.cat([(x[i] - y[j]).square().sum(1) for i, j in zip(at.split(BLOCK), of.split(BLOCK), strict=True)])
    best = x.new_full((len(x),), torch.inf).scatter_reduce(0, at, exact, "amin")
    first = exact == best[at]
    return best, torch.full_like(best, len(y), dtype=torch.int64).scatter_reduce(0, at[first], of[first], "amin")


@dataclass(frozen=True)
class Memorisation:
    """How close images lie to the training images, beside held-out ones that the model cannot have learnt by heart.

    `closer`: the share of pairs of an image and a held-out one in which the image lies closer to its nearest training
    image (Mann and Whitney's statistic; Meehan et al. 2020), a tie counts half: 0.5 where both are alike, more where
    images are copied; its interval holds the spread of both sets. `very_close`: the share of images closer than the
    nearest 1 % of the held-out ones: about 0.01 where both are alike. `copies`: images at distance 0.
    """

    closer: Estimate
    very_close: Estimate
    copies: int


def closer_than_heldout(distances: NDArray[np.float64], heldout: NDArray[np.float64]) -> Memorisation:
    """From the distances of images (`N`) and of held-out images (`M`) to the nearest training image, by `nearest`."""
    if min(len(distances), len(heldout)) < 2:
        raise ValueError(
            f"distances of {len(distances)} images and {len(heldout)} held out: at least two of each are needed"
        )
    farther, closer = 1 - _ranks(distances, heldout), _ranks(heldout, distances)
    value = float(farther.mean())
    # DeLong et al. 1988: the spread over images and that over held-out images
    margin = NORMAL * math.sqrt(farther.var(ddof=1) / len(distances) + closer.var(ddof=1) / len(heldout))
    threshold = np.sort(heldout)[max(round(_CLOSE * (len(heldout) + 1)), 1) - 1]
    return Memorisation(
        closer=Estimate(value, (max(value - margin, 0.0), min(value + margin, 1.0))),
        very_close=share(int((distances < threshold).sum()), len(distances)),
        copies=int((distances == 0).sum()),
    )


def _ranks(values: NDArray[np.float64], among: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each value: the share of `among` below it, ties counting half."""
    among = np.sort(among)
    below = np.searchsorted(among, values, "left") + np.searchsorted(among, values, "right")
    return below / (2 * len(among))
