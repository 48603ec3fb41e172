"""All figures of a set of images against a reference, by one network."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from data.storage import checked, publish, publish_checked, read, sha256_file
from pipeline.evaluation.classes import (
    Probe,
    class_frechet_distances,
    class_kernel_distances,
    fit_probe,
    inception_score,
)
from pipeline.evaluation.features import FeatureSet, Images
from pipeline.evaluation.figures import Estimate
from pipeline.evaluation.frechet import Gaussian, Sums, frechet, too_few
from pipeline.evaluation.kernel import kernel_distance, mean_similarity
from pipeline.evaluation.neighbours import closer_than_heldout, nearest, neighbour_figures
from pipeline.evaluation.networks import FeatureNetwork

_COPIES = 0.01  # share of copies among images from which their figures have no interval
_HUNDREDTH = 100  # held-out images of which the closest hundredth is at least one
VERSION = 1  # of the figures: raise it when a change alters them, so that none is taken from before


def _rounded(value: Any) -> Any:
    """A figure, or all in a dict or list, to nine digits: the last ones of float64 sums depend on threads."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _without_intervals(figures: dict[str, Any]) -> dict[str, Any]:
    """The same figures, and those within classes, with None for each interval."""
    return {
        name: None if name == "interval" else _without_intervals(value) if isinstance(value, dict) else value
        for name, value in figures.items()
    }


@dataclass
class Row:
    """A set of images with its features and, once it is measured, its distances to the images of training."""

    name: str
    images: Images
    features: FeatureSet
    distances: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # of each row of features
    neighbours: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # rows of those of training


def _as_written(file: Path, hashed: Path) -> bool:
    """Whether a file is there with the SHA-256 that stands in `hashed`."""
    text = checked(read(hashed)) if file.exists() and hashed.exists() else None
    return text is not None and json.loads(text)["file"] == sha256_file(file)


class Measurement:
    """Measures sets of images against `reference`; what is needed of this is computed once.

    Figures of a set are kept beside its features, and not computed again.
    """

    def __init__(self, network: FeatureNetwork, *, reference: Row, training: Row, heldout: Row | None) -> None:
        self.network, self.reference, self.training, self.heldout = network, reference, training, heldout
        self.device = network.device

    def figures(self, row: Row) -> dict[str, Any]:
        """What stands in a receipt of the images of `row`: each figure's name has that of the network in it."""
        file = self._file("figures", row, self.reference, self.training).with_suffix(".json")
        text = checked(read(file)) if file.exists() else None
        if text is None:
            publish_checked(file, _rounded(self._compute(row)))
            text = checked(read(file))
            assert text
        figures: dict[str, Any] = json.loads(text)
        if row is not self.training:
            figures["memorisation"] = _rounded(self._memorisation(row))
        few_copies = figures["copies"] <= _COPIES * figures["images"]
        return figures if few_copies else _without_intervals(figures)  # which take images as independent

    def _file(self, kind: str, row: Row, *others: Row) -> Path:
        """Where something of a row is kept that depends on others, without a suffix."""
        folders = [other.features.folder.name for other in others]
        identity = repr((VERSION, self.device.type, torch.__version__, folders))
        return row.features.folder / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def _compute(self, row: Row) -> dict[str, Any]:
        features, reference, network = row.features, self.reference.features, self.network
        distances = frechet(features, self._gaussian, self.device)
        near = neighbour_figures(features, reference, self.device)
        estimates: dict[str, Estimate | None] = {
            f"KD-{network.name}": kernel_distance(features, reference, self._similarity, self.device),
            network.frechet: distances.distance,
            f"{network.frechet} extrapolated": distances.extrapolated,
            f"precision-{network.name}": near.precision,
            f"recall-{network.name}": near.recall,
            f"density-{network.name}": near.density,
            f"coverage-{network.name}": near.coverage,
        }
        if network.has_classes:
            estimates[f"IS-{network.name}"] = inception_score(features, network.probabilities, self.device)
        accuracy: dict[int, Estimate] = {}
        if self._probe and row is not self.training and (features.labels >= 0).any():
            found = self._probe.accuracy(features, self.device)
            estimates[f"accuracy-{network.name}"], accuracy = found.overall, found.by_class
        smaller = min(features, reference, key=len)
        return {
            "images": len(features),
            "copies": features.copies(),
            "warning": too_few(len(smaller), smaller.dimension),
            **{name: each and asdict(each) for name, each in estimates.items()},
            "neighbours_of": near.rows,
            "classes": self._by_class(row, accuracy),
        }

    def _by_class(self, row: Row, accuracy: dict[int, Estimate]) -> dict[str, Any]:
        """The figures within each class, by its label."""
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
        """How close the images are to those of training and, where there are held-out ones, how close these are."""
        self._find_nearest(row)
        said: dict[str, Any] = {
            "median_distance": float(np.median(row.distances)),
            "copies": int((row.distances == 0).sum()),
        }
        if not self.heldout:
            return said
        self._find_nearest(self.heldout)
        found = closer_than_heldout(row.distances, self.heldout.distances)
        said["closer"] = asdict(found.closer)
        if len(self.heldout.distances) >= _HUNDREDTH:
            said["very_close"] = asdict(found.very_close)
        return said

    def _find_nearest(self, row: Row) -> None:
        """Fill in distances and neighbours, which are kept, too."""
        if len(row.distances):
            return
        file = self._file("nearest", row, self.training).with_suffix(".safetensors")
        hashed = file.with_suffix(".json")
        if not _as_written(file, hashed):
            distances, neighbours = nearest(row.features, self.training.features, self.device)
            publish(file, safetensors.numpy.save({"distances": distances, "neighbours": neighbours}))
            publish_checked(hashed, {"file": sha256_file(file)})
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
