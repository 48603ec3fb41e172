"""Samples against real images, beside what real images and the VAE reach, with a receipt of all that it depends on."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.cache import LatentCache
from data.generated import open_generated, write_npz
from data.manifest import MANIFEST
from data.source import Source
from data.storage import checked, publish_checked, read, remove
from pipeline.checkpoint import EMA, Checkpoint
from pipeline.evaluation.features import Images, compute_features
from pipeline.evaluation.measure import Measurement, Row
from pipeline.evaluation.networks import open_network
from pipeline.noise import NoiseProcess
from pipeline.sampling import make_scheduler
from pipeline.vae import FrozenVae
from stages.config import Config, heldout_path
from stages.datasets import DecodedLatents, open_config_sources
from stages.device import pick_device, process_count
from stages.report import print_table, save_page
from stages.sample import require_checkpoint, sample, sample_folder, settle

PROTOCOLS = {  # what papers call by these names: docs/evaluation.md
    "imagenet-50k": {"images": 50_000, "reference": "training"},
    "imagenet100-5k": {"images": 5_000, "reference": "heldout"},
}
_COMPARED = ("samples", "weights", "network", "reference", "versions", "machine", "figures")  # by --repeat
_FOLDER = "eval"  # in a run
_BATCH = 64  # images written to an .npz at a time
_PACKAGES = ("torch", "diffusers", "numpy", "pillow")


def evaluate(config: Config, run: Path, *, images: str | None = None, protocol: str | None = None) -> Path:
    """Measure the samples that `config` describes, which are drawn where they are missing, or the `images` of anybody;
    the receipt, a JSON file, beside which there is a page.

    Features and figures that are there already are not computed again.
    """
    if protocol:
        evaluate_section = config.evaluate.model_copy(update=PROTOCOLS[protocol])
        config = Config.model_validate(config.model_copy(update={"evaluate": evaluate_section}).model_dump())
    evaluation = Evaluation(config, run, images)
    receipt = evaluation.receipt()
    file = run / _FOLDER / f"{receipt['tag']}.json"
    publish_checked(file, receipt)
    print_table(receipt)
    save_page(file, receipt, evaluation.rows, evaluation.training)
    print(f"evaluate: the receipt is {file}, a page with pictures {file.with_suffix('.html')}")
    if protocol == "imagenet-50k":
        _save_npz(file.with_suffix(".npz"), evaluation.rows[0].images, size=config.data.image_size)
        print(f"evaluate: the samples for ADM's evaluator are {file.with_suffix('.npz')}")
    return file


def _save_npz(file: Path, images: Images, *, size: int) -> None:
    """Publish all images as ADM's evaluator takes them."""
    count = len(images.keys)
    starts = tqdm(range(0, count, _BATCH), desc="npz", unit=" batches")
    batches = (images.load(range(start, min(start + _BATCH, count))).pixels for start in starts)
    write_npz(file, batches, images.labels, size)


def repeat(file: Path) -> None:
    """Draw and measure again, from nothing, what the receipt `file` says, and say whether it is the same.

    SystemExit with status 1 where it is not. ValueError when the file is no receipt, or the run is no longer there.
    """
    text = checked(read(file)) if file.is_file() else None
    if text is None:
        raise ValueError(f"--repeat: {file}: {'damaged, or no receipt' if file.is_file() else 'no such file'}")
    before = json.loads(text)
    path, work = before["samples"].get("path"), file.with_name(f".repeat-{file.stem}")
    run = file.parents[1] if file.parent.name == _FOLDER else Path(before["run"])  # which may have been moved
    try:
        receipt = Evaluation(Config.model_validate(before["config"]), run, path, work=work).receipt()
    finally:
        remove(work)
    now = json.loads(json.dumps(receipt))
    for name in _COMPARED:
        for line in _differences(before.get(name), now.get(name), name):
            print(f"evaluate: {line}")
    if before["figures"] != now["figures"]:
        print(f"evaluate: not the same figures as in {file}")
        sys.exit(1)
    print(f"evaluate: the same figures to the last digit as in {file}")


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    """A line for every value in which two parts of receipts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}")
    elif old != new:
        yield f"{name} was {old}, is now {new}"


class Evaluation:
    """Samples and real images, all by one network and against one reference."""

    training: Row
    rows: list[Row]

    def __init__(self, config: Config, run: Path, path: str | None, *, work: Path | None = None) -> None:
        """Of the samples of `run`, or of the images at `path`; with `work`, all is computed anew in that folder."""
        self.config, self.run, self.path, self.work = config, run, path, work
        self.network = open_network(config.evaluate.network, config.evaluate.weights, pick_device())
        self.sources = open_config_sources(config)
        self.vae = FrozenVae(config.vae.source, self.network.device)
        self._seconds: dict[str, float] = {}
        against = "-against-heldout" if config.evaluate.reference == "heldout" else ""
        self._suffix = f"-{self.network.name}{against}"  # of the receipt's name

    def receipt(self) -> dict[str, Any]:
        """The figures of all sets of images, and what they depend on."""
        print(f"evaluate: by {self.network.name}: {self.network.resize}")
        with self._timed("samples"):
            samples, record = self._images_of_anybody(self.path) if self.path else self._samples()
        with self._timed("features"):
            self._compute_features(samples)
        with self._timed("figures"):
            figures = self._measure()
        return {**record, "figures": figures, **self._record()}

    def _samples(self) -> tuple[Images, dict[str, Any]]:
        """The samples of the run, and what they depend on."""
        checkpoint = require_checkpoint(self.run)
        settled, chosen = settle(self.config, checkpoint)
        per_class = -(-self.config.evaluate.images // len(chosen))
        drawn = settled.sample.model_copy(update={"per_class": per_class})
        self.config = self.config.model_copy(update={"sample": drawn})
        folder = sample(self.config, self.run, to=self.work and self.work / "samples")
        cache = LatentCache(folder)
        record = {
            "tag": f"{sample_folder(self.config, self.run, checkpoint).name}{self._suffix}",
            "samples": {
                **drawn.model_dump(mode="json"),
                "drawn": len(chosen) * per_class,
                "failed": cache.manifest.failed,
                "times": _times(self.config, checkpoint),
            },
            "weights": _weights(checkpoint),
        }
        return DecodedLatents(cache, self.vae), record

    def _images_of_anybody(self, path: str) -> tuple[Images, dict[str, Any]]:
        data = self.config.data
        images = open_generated(path, image_size=data.image_size, classes=self.sources[0].classes, matte=data.matte)
        for note in images.notes:
            print(f"evaluate: {note}")
        fingerprint = images.fingerprint()
        tag = f"{Path(path).stem}-{fingerprint[:8]}{self._suffix}"
        return images, {"tag": tag, "samples": {"path": path, "fingerprint": fingerprint}}

    def _compute_features(self, samples: Images) -> None:
        """The rows: samples first, then real images and reconstructions of those that are held out."""
        beside = self.config.cache.path
        data = self.work or beside.with_name(f"{beside.name}-features")
        self.rows = [self._row("samples", samples, self.work or self.run / _FOLDER / "features")]
        self.training = self._row("training images", self.sources[0], data)
        if len(self.sources) == 1:
            print("evaluate: no images are held out (data.heldout), so there is nothing real to compare samples with")
            return
        self.rows.append(self._row("held-out images", self.sources[1], data))
        heldout = heldout_path(self.config)
        if heldout and (heldout / MANIFEST).exists():
            images = DecodedLatents(LatentCache(heldout), self.vae)
            self.rows.append(self._row("held-out images through the VAE", images, data))
        else:
            print(f"evaluate: {heldout} is not there, so there is no figure of the VAE: run encode first")

    def _row(self, name: str, images: Images, folder: Path) -> Row:
        decoded = isinstance(images, DecodedLatents) and self.network.device.type != "cpu"  # no process shares a GPU
        workers = 0 if decoded else process_count(self.config.cache.workers)
        return Row(name, images, compute_features(images, self.network, folder, workers=workers, name=name))

    def _measure(self) -> dict[str, Any]:
        """The figures of every row. Where held-out images are the reference, those of training are a row instead."""
        heldout = self.rows[1] if len(self.rows) > 1 else None
        reference = self.training
        if heldout and self.config.evaluate.reference == "heldout":
            reference, self.rows[1] = heldout, self.training
        measurement = Measurement(self.network, reference=reference, training=self.training, heldout=heldout)
        return {row.name: measurement.figures(row) for row in tqdm(self.rows, desc="figures", unit=" sets")}

    def _record(self) -> dict[str, Any]:
        """What the figures of all rows depend on."""
        network, cache = self.network, self.config.cache.path
        reference: Source = self.sources[self.config.evaluate.reference == "heldout"]
        return {
            "run": str(self.run),
            "classes": list(self.sources[0].classes),
            "network": {"name": network.name, "sha256": network.sha256, "resize": network.resize},
            "reference": {
                "images": reference.name,
                "count": len(reference.keys),
                "preprocessing": reference.preprocessing,
                "fingerprint": reference.fingerprint(),
            },
            "cache": json.loads(read(cache / MANIFEST))["sha256"] if (cache / MANIFEST).exists() else None,
            "vae": self.vae.identity().weights_sha256,
            "versions": {name: version(name) for name in ("latentmill", *_PACKAGES)},
            "machine": {
                "device": str(network.device),
                "processor": torch.backends.cpu.get_cpu_capability(),
                "system": platform.platform(),
            },
            "seconds": self._seconds,
            "config": self.config.model_dump(mode="json"),
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] = round(time.monotonic() - started, 1)


def _times(config: Config, checkpoint: Checkpoint) -> list[float]:
    """The noise levels of flow matching, 1 to 0, or the timesteps at which the model is asked."""
    settings = config.sample
    scheduler = make_scheduler(settings.scheduler, NoiseProcess(**checkpoint.state["noise"]), settings.steps)
    values = scheduler.sigmas if settings.scheduler == "euler" else scheduler.timesteps
    return [round(float(value), 6) for value in values]


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.state
    average = (
        f"power-function average of width {state['widths'][0]:g}"
        if state["widths"]
        else (f"exponential average with a half-life of {state['train']['ema_halflife']:,} images")
    )
    return {
        "checkpoint": str(checkpoint.path),
        "images_seen": checkpoint.images_seen,
        "average": average,
        "sha256": state["sha256"][f"{EMA[0]}/diffusion_pytorch_model.safetensors"],
        "train_seed": state["train"]["seed"],
    }
