"""All figures of a set of images against a reference, by one network."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from data.storage import checked, publish, publish_checked, read
from pipeline.evaluation.classes import (
    Probe,
    class_frechet_distances,
    class_kernel_distances,
    fit_probe,
    inception_score,
)
from pipeline.evaluation.features import FeatureSet, Images
from pipeline.evaluation.frechet import Gaussian, Sums, frechet, too_few
from pipeline.evaluation.kernel import kernel_distance, mean_similarity
from pipeline.evaluation.neighbours import closer_than_heldout, nearest, neighbour_figures
from pipeline.evaluation.networks import FeatureNetwork

VERSION = 1  # of the figures: raise it when a change alters them, so that none is taken from before


def _rounded(value: Any) -> Any:
    """A figure, or all in a dict or list, to nine digits: the last ones of float64 sums depend on threads."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


@dataclass
class Row:
    """A set of images with its features and, once it is measured, its distances to the images of training."""

    name: str
    images: Images
    features: FeatureSet
    distances: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # of each row of features
    neighbours: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # rows of those of training


class Measurement:
    """Measures sets of images against `reference`; what is needed of this is computed once.

    Figures of a set are kept beside its features, and not computed again.
    """

    def __init__(self, network: FeatureNetwork, *, reference: Row, training: Row, heldout: Row | None) -> None:
        self.network, self.reference, self.training, self.heldout = network, reference, training, heldout
        self.device = network.device

    def figures(self, row: Row) -> dict[str, Any]:
        """What stands in a receipt of the images of `row`: each figure's name has that of the network in it."""
        identity = repr((VERSION, self.device.type, self.reference.features.folder.name))
        file = row.features.folder / f"figures-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        text = checked(read(file)) if file.exists() else None
        if text is None:
            publish_checked(file, _rounded(self._compute(row)))
            text = checked(read(file))
            assert text
        figures: dict[str, Any] = json.loads(text)
        if self.heldout and row is not self.training:
            figures["memorisation"] = self._memorisation(row)
        return figures

    def _compute(self, row: Row) -> dict[str, Any]:
        features, reference, network = row.features, self.reference.features, self.network
        distances = frechet(features, self._gaussian, self.device)
        near = neighbour_figures(features, reference, self.device)
        figures = {
            f"KD-{network.name}": kernel_distance(features, reference, self._similarity, self.device),
            network.frechet: distances.distance,
            f"{network.frechet} extrapolated": distances.extrapolated,
            f"precision-{network.name}": near.precision,
            f"recall-{network.name}": near.recall,
            f"density-{network.name}": near.density,
            f"coverage-{network.name}": near.coverage,
        }
        if network.has_classes:
            figures[f"IS-{network.name}"] = inception_score(features, network.probabilities, self.device)
        accuracy = self._probe.accuracy(features, self.device) if self._probe and (features.labels >= 0).any() else None
        if accuracy:
            figures[f"accuracy-{network.name}"] = accuracy.overall
        return {
            "images": len(features),
            "failed": len(features.failures),
            "copies": features.copies(),
            "rows_of_neighbours": near.rows,
            "warning": too_few(len(features), features.dimension),
            **{name: figure and asdict(figure) for name, figure in figures.items()},
            "classes": self._by_class(row, accuracy.by_class if accuracy else {}),
        }

    def _by_class(self, row: Row, accuracy: dict[int, Any]) -> dict[str, Any]:
        """The figures within each class, by its index."""
        sets = row.features, self.reference.features, self.device
        kernel, distances = class_kernel_distances(*sets), class_frechet_distances(*sets)
        labels, counts = np.unique(row.features.labels, return_counts=True)
        return {
            str(label): {
                "images": int(count),
                f"KD-{self.network.name}": asdict(kernel[label]) if label in kernel else None,
                self.network.frechet: distances.get(label),
                f"accuracy-{self.network.name}": asdict(accuracy[label]) if label in accuracy else None,
            }
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
        }

    def _memorisation(self, row: Row) -> dict[str, Any]:
        """How close the images are to those of training, and how close held-out ones are."""
        assert self.heldout
        for each in (row, self.heldout):
            self._find_nearest(each)
        found = closer_than_heldout(row.distances, self.heldout.distances)
        return _rounded({"median_distance": float(np.median(row.distances)), **asdict(found)})

    def _find_nearest(self, row: Row) -> None:
        """Fill in distances and neighbours, which are kept, too."""
        if len(row.distances):
            return
        identity = repr((VERSION, self.device.type, self.training.features.folder.name))
        file = row.features.folder / f"nearest-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        if not file.exists():
            distances, neighbours = nearest(row.features, self.training.features, self.device)
            publish(file, safetensors.numpy.save({"distances": distances, "neighbours": neighbours}))
        kept = safetensors.numpy.load(read(file))
        row.distances, row.neighbours = kept["distances"], kept["neighbours"]

    @cached_property
    def _gaussian(self) -> Gaussian:
        return Sums.of(self.reference.features, self.device).gaussian()

    @cached_property
    def _similarity(self) -> float:
        return mean_similarity(self.reference.features, self.device)

    @cached_property
    def _probe(self) -> Probe | None:
        """Fitted to the images of training; None where there are no two classes to tell apart."""
        labels = self.training.features.labels
        return fit_probe(self.training.features, self.device) if len(np.unique(labels[labels >= 0])) > 1 else None
