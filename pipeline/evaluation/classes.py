"""Metrics that use classes: Inception score, distances within each class, and the accuracy of a linear probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.figures import (
    BLOCK,
    GROUPS,
    Estimate,
    Features,
    Selected,
    blocks,
    check,
    check_dimensions,
    group_sizes,
    has_groups,
    jackknife,
    share,
    zeros,
)
from pipeline.evaluation.frechet import Sums, frechet_distance
from pipeline.evaluation.kernel import kernel_distance, mean_similarity

_FEWEST = 50  # minimum number of images of a class in each set, for a kernel distance within it
_SHRINKAGE = 0.01  # shrinkage of the probe's covariance towards a multiple of the identity


def inception_score(features: Features, probabilities: Callable[[Tensor], Tensor], device: torch.device) -> Estimate:
    """Compute the Inception score exp(mean of KL(p(y|x) || p(y))) over all images at once (Salimans et al. 2016).

    It is between 1 and K, the number of classes. `probabilities` maps features, float32 `n D` on `device`, to p(y|x),
    float64 `n K`. ADM's evaluator uses the mean over splits of 5,000 images, which is lower, and lower still for
    smaller splits.
    """
    check(features)
    negentropy, total = zeros(GROUPS, device=device), zeros(GROUPS, 1, device=device)
    for block in blocks(features, device):
        p = probabilities(block.float().to(device)).to(block)
        for group in range(GROUPS):
            rows = p[group::GROUPS]
            negentropy[group] += torch.xlogy(rows, rows).sum()
        total = total + torch.stack([p[group::GROUPS].sum(0) for group in range(GROUPS)])

    def score(rows: int, own: Tensor, classes: Tensor) -> float:
        marginal = classes / rows
        return (own / rows - torch.xlogy(marginal, marginal).sum()).exp().item()

    count = len(features)
    value = score(count, negentropy.sum(), total.sum(0))
    if not has_groups(count):
        return Estimate(value, None)
    own, classes = negentropy.sum() - negentropy, total.sum(0) - total
    return jackknife(value, [score(count - size, own[g], classes[g]) for g, size in enumerate(group_sizes(count))])


def class_kernel_distances(features: Features, reference: Features, device: torch.device) -> dict[int, Estimate]:
    """Compute the kernel distance within each class that has at least 50 images in both sets, by label."""
    check(features, reference)
    return {
        label: kernel_distance(images, real, mean_similarity(real, device), device)
        for label, images, real in _shared_classes(features, reference, _FEWEST)
    }


def class_frechet_distances(features: Features, reference: Features, device: torch.device) -> dict[int, float]:
    """Compute the Fréchet distance within each class that has at least 2 D images in both sets, by label."""
    check(features, reference)
    return {
        label: frechet_distance(Sums.of(images, device).gaussian(), Sums.of(real, device).gaussian())
        for label, images, real in _shared_classes(features, reference, 2 * reference.dimension)
    }


def _shared_classes(features: Features, reference: Features, fewest: int) -> Iterator[tuple[int, Features, Features]]:
    for label in np.intersect1d(features.labels, reference.labels):
        rows = [Selected(each, np.flatnonzero(each.labels == label)) for each in (features, reference)]
        if label >= 0 and min(map(len, rows)) >= fewest:
            yield int(label), rows[0], rows[1]


@dataclass(frozen=True)
class Accuracy:
    """Holds the fraction of images that the probe classifies correctly, overall and by label.

    `images` is the number of images counted: those with a label that the probe was fitted to.
    """

    overall: Estimate
    by_class: dict[int, Estimate]
    images: int


@dataclass(frozen=True)
class Probe:
    """Classifies features linearly: `labels` `K` ascending, `weights` `K D` and `bias` `K`."""

    labels: NDArray[np.int64]
    weights: Tensor
    bias: Tensor

    def accuracy(self, features: Features, device: torch.device) -> Accuracy:
        """Compute how often the predicted class is the label. ValueError if no image has a label of the probe."""
        check(features)
        check_dimensions(features.dimension, self.weights.shape[1])
        known = np.isin(features.labels, self.labels)
        if not known.any():
            raise ValueError("no image has a class of the reference: an accuracy cannot be computed")
        scores = [(block @ self.weights.T + self.bias).argmax(1).cpu() for block in blocks(features, device)]
        truth = features.labels[known]
        right = self.labels[torch.cat(scores).numpy()[known]] == truth
        by_class = {int(label): right[truth == label] for label in np.unique(truth)}
        return Accuracy(
            overall=share(int(right.sum()), len(right)),
            by_class={label: share(int(each.sum()), len(each)) for label, each in by_class.items()},
            images=len(right),
        )


def fit_probe(reference: Features, device: torch.device) -> Probe:
    """Fit a linear discriminant analysis to the labelled rows: class means, one shared covariance, equal priors.

    The covariance is shrunk by 0.01 towards the identity times the mean variance. ValueError if there are fewer than
    two classes.
    """
    check(reference)
    labels = np.unique(reference.labels[reference.labels >= 0])
    if len(labels) < 2:
        raise ValueError(f"number of classes = {len(labels)}: a linear probe needs at least two classes")
    counts, totals, outer = _class_sums(reference, labels, device)
    means = totals / counts[:, None]
    within = (outer - means.T @ totals) / max(int(counts.sum()) - len(labels), 1)
    scale = within.diagonal().mean().item() or 1.0  # 0 if all images of a class are equal: use nearest mean
    identity = torch.eye(len(within), dtype=within.dtype, device=within.device)
    weights = torch.linalg.solve((1 - _SHRINKAGE) * within + _SHRINKAGE * scale * identity, means.T).T
    return Probe(labels, weights, -0.5 * (weights * means).sum(1))


def _class_sums(features: Features, labels: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts `K` and sums `K D` by class, and the sum of outer products `D D`, of the rows with `labels`."""
    counts = zeros(len(labels), device=device)
    totals = zeros(len(labels), features.dimension, device=device)
    outer = zeros(features.dimension, features.dimension, device=device)
    for i, block in enumerate(blocks(features, device)):
        own = features.labels[i * BLOCK : (i + 1) * BLOCK]
        member = torch.from_numpy(own[:, None] == labels).to(block)  # n K
        counts += member.sum(0)
        totals += member.T @ block
        outer.addmm_((block * member.sum(1, keepdim=True)).T, block)
    return counts, totals, outer
