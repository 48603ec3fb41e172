"""Do the figures see what they are meant to see? Real images with known faults, measured as samples are.

    python -m benchmarks.evaluation_faults --config configs/cifar10.yaml --set data.source=path/to/cifar10

Takes `--count` held-out images of the config and makes sets of them with one fault each: blurred, as coarse JPEG, with
wrong colours, with noise, with half of the classes missing, with a tenth of the images ten times, and images of
training themselves. Each is measured against the images of training. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data.sources.base import Batch, Source
from data.storage import publish_json
from data.text import digest
from pipeline.config import features_path
from pipeline.config_file import load_config
from pipeline.datasets import cached_sources
from pipeline.device import pick_device, process_count
from pipeline.evaluation.features import compute_features
from pipeline.evaluation.measure import Measurement, Row
from pipeline.evaluation.networks import open_network
from pipeline.evaluation.receipt import format_metric
from stages.cli import LocalPath
from stages.evaluate import HELDOUT, TRAINING

Change = Callable[[Image.Image, int], Image.Image]


@dataclass(frozen=True)
class Changed:
    """Images of `source` as `change` makes them of a picture and its index; the places in `taken` may repeat."""

    source: Source
    name: str
    change: Change
    taken: NDArray[np.int64]

    @property
    def keys(self) -> Sequence[str]:
        return [self.source.keys[i] for i in self.taken]

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.source.labels[self.taken]

    @property
    def image_size(self) -> int:
        return self.source.image_size

    @property
    def preprocessing(self) -> str:
        return self.source.preprocessing

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), self.name, str(len(self.taken))])

    def load(self, indices: Sequence[int]) -> Batch:
        batch = self.source.load(self.taken[list(indices)].tolist())
        pictures = [self.change(Image.fromarray(each), i) for each, i in zip(batch.pixels, indices, strict=True)]
        return Batch(np.asarray(indices, np.int64), np.stack([np.asarray(each) for each in pictures]))


def jpeg(image: Image.Image, _: int) -> Image.Image:
    """The coarsest quality that is still an image."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=10)
    return Image.open(buffer).convert("RGB")


def noisy(image: Image.Image, index: int) -> Image.Image:
    """A twentieth of the range, independent in each value."""
    noise = np.random.default_rng([0, index]).normal(0, 255 / 20, (*image.size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).round().astype(np.uint8))


def other_colours(image: Image.Image, _: int) -> Image.Image:
    """Red, green and blue change places."""
    red, green, blue = image.split()
    return Image.merge("RGB", (green, blue, red))


def faulty_sets(training: Source, heldout: Source, count: int) -> list[Changed]:
    """One set for each fault, all of `count` images."""
    first = np.linspace(0, len(heldout.keys) - 1, count).astype(np.int64)
    half = np.flatnonzero(heldout.labels < len(heldout.classes) // 2)
    same: Change = lambda image, _: image  # noqa: E731
    return [
        Changed(heldout, "no fault", same, first),
        Changed(heldout, "blurred (radius 0.7)", lambda image, _: image.filter(ImageFilter.GaussianBlur(0.7)), first),
        Changed(heldout, "JPEG of quality 10", jpeg, first),
        Changed(heldout, "wrong colours", other_colours, first),
        Changed(heldout, "noise", noisy, first),
        Changed(heldout, "half of the classes", same, half[np.linspace(0, len(half) - 1, count).astype(np.int64)]),
        Changed(heldout, "a tenth, ten times", same, np.repeat(first[::10], 10)[:count]),
        Changed(training, "training images", same, np.linspace(0, len(training.keys) - 1, count).astype(np.int64)),
    ]


@click.command(help=__doc__)
@click.option("--config", "file", type=LocalPath(), default=Path("configs/cifar10.yaml"))
@click.option("--set", "overrides", multiple=True)
@click.option("--count", default=2000, help="Images of each set.")
@click.option("--to", type=LocalPath(), default=Path("caches/evaluation_faults"))
def main(file: Path, overrides: tuple[str, ...], count: int, to: Path) -> None:
    config = load_config(file, overrides)
    training, heldout = cached_sources(config)
    network = open_network(config.evaluate.network, config.evaluate.weights, pick_device())
    workers = process_count(config.cache.workers)

    def row(name: str, images: Changed | Source, folder: Path) -> Row:
        return Row(name, images, compute_features(images, network, folder, workers=workers, name=name))

    real, unseen = row(TRAINING, training, features_path(config)), row(HELDOUT, heldout, features_path(config))
    measurement = Measurement(network, reference=real, training=real, heldout=unseen)
    figures = {}
    for faulty in faulty_sets(training, heldout, count):
        figures[faulty.name] = measurement.figures(row(faulty.name, faulty, to))
    names = [name for name, figure in figures["no fault"].items() if isinstance(figure, dict) and "value" in figure]
    heads = [f"{name} x1000" if name.startswith("KD-") else name for name in names]
    print("| | " + " | ".join([*heads, "copies of each other", "closer to training", "copies of training"]) + " |")
    print("|---" * (len(names) + 4) + "|")
    for name, each in figures.items():
        cells = [format_metric(each[figure], 1000 if figure.startswith("KD-") else 1) for figure in names]
        near = each["memorisation"]
        cells += [f"{each['copies']:,}", format_metric(near["closer"]), f"{near['copies']:,}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    publish_json(to / "faults.json", figures)


if __name__ == "__main__":
    main()
