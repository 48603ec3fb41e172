"""Metrics by nearest neighbours in feature space: precision, recall, density, coverage, memorisation."""

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

_PRECISION_NEIGHBOURS, _DENSITY_NEIGHBOURS = 3, 5  # k of the original papers
_ROUNDING = 1e-12  # bound on the rounding error of a squared distance, relative to the squared lengths of the vectors
_CLOSE = 0.01  # fraction of held-out images that defines "very close"


@dataclass(frozen=True)
class NeighbourFigures:
    """Holds precision and recall (Kynkäänniemi et al. 2019, k = 3), density and coverage (Naeem et al. 2020, k = 5).

    Each image has a ball whose radius is the distance to its k-th nearest neighbour in the same set. Precision: the
    fraction of images in any ball of the reference; recall: the fraction of the reference in any ball of the images;
    density: the mean number of reference balls that contain an image, divided by k; coverage: the fraction of reference
    balls that contain an image. A ball includes its surface, so a set has precision and recall 1 to itself (and density
    1 + 1/k).

    `rows` rows of each set are used: all four values depend on this number. The intervals assume independent rows and
    fixed balls, so they are approximate.
    """

    rows: int
    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def neighbour_figures(features: Features, reference: Features, device: torch.device) -> NeighbourFigures:
    """Compute these metrics from the first rows of both sets: as many as the smaller set has, at most LIMIT.

    In a set with k rows or fewer, the farthest row is used as the k-th nearest.
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
    """Return the squared distances of each row to its 3rd and its 5th nearest neighbour: `2 N`."""
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
    """Return squared distances `n m` of rows `n D` and `m D`, minus `slack` times the squared lengths.

    A slack above the rounding error makes sure that points on the surface of a ball count as inside, also equal rows.
    """
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(lengths, x, y.T, beta=1 - slack, alpha=-2)


def nearest(
    features: Features, reference: Features, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the Euclidean distance of each row to the nearest row of the reference, and that row: `N` and `N`.

    An exact copy has distance exactly 0; among rows at the same distance, the first one counts.
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
    """Return the squared distance of each row of `x` to the nearest of `y`, and its index.

    Candidates are found with matrix products, which have rounding errors, and then measured by differences.
    """
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
    """Holds how close images are to the training images, compared with held-out images, which cannot be memorised.

    `closer`: the fraction of pairs (image, held-out image) in which the image is closer to its nearest training image,
    where a tie counts half (Mann-Whitney statistic; Meehan et al. 2020): 0.5 if both sets are alike, more if images are
    copied; its interval includes the variation of both sets. `very_close`: the fraction of images closer than the
    nearest 1 % of the held-out images: about 0.01 if both sets are alike. `copies`: number of images at distance 0.
    """

    closer: Estimate
    very_close: Estimate
    copies: int


def closer_than_heldout(distances: NDArray[np.float64], heldout: NDArray[np.float64]) -> Memorisation:
    """Compare the distances (by `nearest`) to training of images (`N`) with those of held-out images (`M`)."""
    if min(len(distances), len(heldout)) < 2:
        raise ValueError(
            f"distances of {len(distances)} images and {len(heldout)} held out: at least two of each are needed"
        )
    farther, closer = 1 - _ranks(distances, heldout), _ranks(heldout, distances)
    value = float(farther.mean())
    # DeLong et al. 1988: variance over images plus variance over held-out images
    margin = NORMAL * math.sqrt(farther.var(ddof=1) / len(distances) + closer.var(ddof=1) / len(heldout))
    threshold = np.sort(heldout)[max(round(_CLOSE * (len(heldout) + 1)), 1) - 1]
    return Memorisation(
        closer=Estimate(value, (max(value - margin, 0.0), min(value + margin, 1.0))),
        very_close=share(int((distances < threshold).sum()), len(distances)),
        copies=int((distances == 0).sum()),
    )


def _ranks(values: NDArray[np.float64], among: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each value the fraction of `among` below it, where ties count half."""
    among = np.sort(among)
    below = np.searchsorted(among, values, "left") + np.searchsorted(among, values, "right")
    return below / (2 * len(among))
