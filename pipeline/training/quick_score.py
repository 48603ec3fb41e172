"""Measure an optional quick score during training: the kernel distance of a few samples, to see a run's trend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.sources.base import NO_CLASS
from data.sources.heldout import Subset
from pipeline.config import Config, features_path
from pipeline.datasets import cached_sources
from pipeline.device import process_count
from pipeline.evaluation.features import compute_features
from pipeline.evaluation.kernel import kernel_distance, mean_similarity
from pipeline.evaluation.networks import open_network

SCORED = 500  # samples
_REFERENCE = 2000  # images that they are compared with


class QuickScore:
    """Measures the kernel distance of a few samples; for figures in tables, use `latentmill evaluate`."""

    def __init__(self, config: Config, classes: NDArray[np.int64], device: torch.device) -> None:
        """Compare samples of `classes` in turn with some held-out images or, if there are none, training images."""
        self._network = open_network(config.evaluate.network, config.evaluate.weights, device)
        source = cached_sources(config)[-1]
        chosen = np.unique(np.linspace(0, len(source.keys) - 1, _REFERENCE).astype(np.int64))
        self._reference = compute_features(
            Subset(source, chosen, source.name),
            self._network,
            features_path(config),
            workers=process_count(config.cache.workers),
            name="quick score",
        )
        against = f"{len(self._reference):,} images of {source.name}"
        print(f"train: quick score: {SCORED} samples against {against}", flush=True)
        self._similarity = mean_similarity(self._reference, device)
        self.labels = np.resize(classes, SCORED)

    def measure(self, images: NDArray[np.uint8]) -> dict[str, Any]:
        """Return, for the log, the kernel distance of samples of `labels`, uint8 `SCORED S S 3`, and its interval."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # their classes alternate
        features = InMemory(self._network.features(torch.from_numpy(images)[order]).numpy())
        distance = kernel_distance(features, self._reference, self._similarity, self._network.device)
        return {
            f"KD-{self._network.name}": distance.value,
            "score_interval": distance.interval,
            "score_reference": self._reference.contents(),
        }


@dataclass(frozen=True)
class InMemory:
    """Holds a few feature vectors in memory, `vectors` float32 `N D` (see `pipeline.evaluation.figures.Features`)."""

    vectors: NDArray[np.float32]

    @property
    def dimension(self) -> int:
        return self.vectors.shape[1]

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.full(len(self.vectors), NO_CLASS, np.int64)

    def __len__(self) -> int:
        return len(self.vectors)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self.vectors[rows]
