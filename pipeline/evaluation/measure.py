"""Compute all metrics of a set of images against a reference, with the features of one network."""

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

from data.storage import publish, publish_checked, read, sha256_file, strip_checksum
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

_COPIES = 0.01  # with a larger fraction of copies among the images, metrics have no interval
_HUNDREDTH = 100  # minimum number of held-out images for the metric of the closest 1 %
VERSION = 1  # increase it when a change of the code alters metrics, so that no old ones are reused


def _rounded(value: Any) -> Any:
    """Round numbers, also in a dict or list, to nine digits: the last ones of float64 sums depend on threads."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _without_intervals(figures: dict[str, Any]) -> dict[str, Any]:
    """Replace every interval by None, also in the metrics within classes."""
    return {
        name: None if name == "interval" else _without_intervals(value) if isinstance(value, dict) else value
        for name, value in figures.items()
    }


@dataclass
class Row:
    """Holds a set of images, its features and, once it is measured, its distances to the training images."""

    name: str
    images: Images
    features: FeatureSet
    distances: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # one per row of features
    neighbours: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # rows of training


def _is_intact(file: Path, hashed: Path) -> bool:
    """Return whether `file` exists and has the SHA-256 that is recorded in `hashed`."""
    text = strip_checksum(read(hashed)) if file.exists() and hashed.exists() else None
    return text is not None and json.loads(text)["file"] == sha256_file(file)


class Measurement:
    """Measures sets of images against `reference`, whose statistics are computed once.

    The metrics of a set are stored with its features and reused.
    """

    def __init__(self, network: FeatureNetwork, *, reference: Row, training: Row, heldout: Row | None) -> None:
        self.network, self.reference, self.training, self.heldout = network, reference, training, heldout
        self.device = network.device

    def figures(self, row: Row) -> dict[str, Any]:
        """Return the metrics of `row` as they are stored in a receipt; their names contain the name of the network."""
        file = self._file("figures", row, self.reference, self.training).with_suffix(".json")
        text = strip_checksum(read(file)) if file.exists() else None
        if text is None:
            publish_checked(file, _rounded(self._compute(row)))
            text = strip_checksum(read(file))
            assert text
        figures: dict[str, Any] = json.loads(text)
        if row is not self.training:
            figures["memorisation"] = _rounded(self._memorisation(row))
        few_copies = figures["copies"] <= _COPIES * figures["images"]
        return figures if few_copies else _without_intervals(figures)  # they assume independent images

    def _file(self, kind: str, row: Row, *others: Row) -> Path:
        """Return the path, without suffix, of a stored result of `row` that depends on `others`."""
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
        """Compute the metrics within each class, by label."""
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
        """Measure how close the images are to training images and, if possible, compare with held-out images."""
        self._find_nearest(row)
        result: dict[str, Any] = {
            "median_distance": float(np.median(row.distances)),
            "copies": int((row.distances == 0).sum()),
        }
        if not self.heldout:
            return result
        self._find_nearest(self.heldout)
        found = closer_than_heldout(row.distances, self.heldout.distances)
        result["closer"] = asdict(found.closer)
        if len(self.heldout.distances) >= _HUNDREDTH:
            result["very_close"] = asdict(found.very_close)
        return result

    def _find_nearest(self, row: Row) -> None:
        """Fill in distances and neighbours of `row`, and store them on disk."""
        if len(row.distances):
            return
        file = self._file("nearest", row, self.training).with_suffix(".safetensors")
        hashed = file.with_suffix(".json")
        if not _is_intact(file, hashed):
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
        """Fit a linear probe to the training images; None if there are fewer than two classes."""
        labels = self.training.features.labels
        return fit_probe(self.training.features, self.device) if len(np.unique(labels[labels >= 0])) > 1 else None
