"""The kernel distance between two sets of features: KID (Binkowski et al. 2018), but over all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluation.figures import (
    BLOCK,
    GROUPS,
    LIMIT,
    Estimate,
    Features,
    blocks,
    check,
    group_sizes,
    has_groups,
    jackknife,
    zeros,
)


def kernel_distance(
    features: Features, reference: Features, reference_similarity: float, device: torch.device
) -> Estimate:
    """Compute the unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    Its expected value is 0 for two sets from the same distribution. It uses all pairs of the first LIMIT rows of each
    set; KID averages over random subsets of at most 1,000 rows. `reference_similarity` is the reference's
    `mean_similarity`, which is computed only once.
    """
    value, without = _distances(features, reference, reference_similarity, device)
    return jackknife(value, without) if without else Estimate(value, None)


def kernel_difference(
    one: Features, other: Features, reference: Features, reference_similarity: float, device: torch.device
) -> Estimate:
    """Compute the kernel distance of `one` minus that of `other`, whose rows are paired: row i uses the same draws.

    The jackknife leaves out the same rows of both sets, so that the common part of the draws cancels.
    """
    assert len(one) == len(other)
    value, without = _distances(one, reference, reference_similarity, device)
    value_2, without_2 = _distances(other, reference, reference_similarity, device)
    differences = [a - b for a, b in zip(without, without_2, strict=True)]
    return jackknife(value - value_2, differences) if differences else Estimate(value - value_2, None)


def _distances(
    features: Features, reference: Features, reference_similarity: float, device: torch.device
) -> tuple[float, list[float]]:
    """Return the distance of all rows, and without each group of the jackknife (empty if there are too few rows)."""
    check(features, reference)
    within, across = _within(features, device), _across(features, reference, device)
    count, others = min(len(features), LIMIT), min(len(reference), LIMIT)

    def distance(rows: int, own: Tensor, cross: Tensor) -> float:
        return (own / (rows * (rows - 1)) + reference_similarity - 2 * cross / (rows * others)).item()

    value = distance(count, within.sum(), across.sum())
    if not has_groups(count):
        return value, []
    own = within.sum() - within.sum(0) - within.sum(1) + within.diagonal()
    cross = across.sum() - across
    return value, [distance(count - size, own[g], cross[g]) for g, size in enumerate(group_sizes(count))]


def mean_similarity(features: Features, device: torch.device) -> float:
    """Return the mean of the kernel over all pairs of different rows among the first LIMIT."""
    check(features)
    count = min(len(features), LIMIT)
    return _within(features, device).sum().item() / (count * (count - 1))


def _within(features: Features, device: torch.device) -> Tensor:
    """Sum the kernel over pairs of different rows, by the groups of both rows: `GROUPS GROUPS`."""
    sums = zeros(GROUPS, GROUPS, device=device)
    for i, x in enumerate(blocks(features, device, LIMIT)):
        for j, y in enumerate(blocks(features, device, min((i + 1) * BLOCK, LIMIT))):
            similarity = _kernel(x, y)
            if i == j:
                similarity.fill_diagonal_(0)
            part = _membership(x).T @ similarity @ _membership(y)
            sums += part if i == j else part + part.T
    return sums


def _across(features: Features, reference: Features, device: torch.device) -> Tensor:
    """Sum the kernel over pairs of one row of each set, by the groups of `features`: `GROUPS`."""
    sums = zeros(GROUPS, device=device)
    for x in blocks(features, device, LIMIT):
        for y in blocks(reference, device, LIMIT):
            sums += _membership(x).T @ _kernel(x, y).sum(1)
    return sums


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base * base * base


def _membership(block: Tensor) -> Tensor:
    """Return a matrix `n GROUPS`: 1 if the row is in the group, else 0."""
    eye = torch.eye(GROUPS, dtype=block.dtype, device=block.device)
    return eye.repeat(len(block) // GROUPS + 1, 1)[: len(block)]
