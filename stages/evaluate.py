"""Measure samples against real images, and record in a receipt everything that the figures depend on."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.cache.manifest import MANIFEST, Manifest
from data.cache.reader import LatentCache
from data.locks import claim
from data.sources.generated import open_generated, write_npz
from data.storage import publish_checked, read, remove, strip_checksum
from pipeline.config import Config, features_path, heldout_path
from pipeline.config_file import check_config
from pipeline.datasets import DecodedLatents, cached_sources
from pipeline.device import pick_device, process_count
from pipeline.evaluation.features import Images, compute_features
from pipeline.evaluation.measure import Measurement, Row
from pipeline.evaluation.networks import open_network
from pipeline.evaluation.receipt import print_table, save_page
from pipeline.training.checkpoint import Checkpoint, checkpoint_path, open_checkpoint
from pipeline.training.run_folder import EVAL, check_run_folder
from pipeline.vae import FrozenVae
from stages.sample import require_checkpoint, resolve_sample_settings, sample, sample_folder

PROTOCOLS = {  # settings that papers use: docs/evaluation.md
    "imagenet-50k": {"images": 50_000, "reference": "training"},
    "imagenet100-5k": {"images": 5_000, "reference": "heldout"},
}
TRAINING, HELDOUT = "training images", "held-out images"
_COMPARED = ("samples", "weights", "images", "network", "vae", "versions", "machine", "figures")  # compared by --repeat
_PACKAGES = ("torch", "diffusers", "numpy", "pillow")
_BATCH = 64  # images written to an .npz at a time
_SHOWN = 10  # differences printed


def evaluate(config: Config, run: Path, *, images: str | None = None, protocol: str | None = None) -> Path:
    """Measure the samples that `config` describes, drawing those that are missing, or the given `images`.

    Return the path of the receipt, a JSON file with an HTML page beside it. Existing features and figures are not
    computed again.
    """
    check_run_folder(run, "--run", cache=config.cache.path)
    if protocol:
        values = config.model_dump()
        config = check_config({**values, "evaluate": {**values["evaluate"], **PROTOCOLS[protocol]}}, protocol)
    evaluation = Evaluation(config, run, images)
    receipt = evaluation.receipt()
    file = run / EVAL / f"{receipt['tag']}.json"
    before = _receipt_of(file)
    if before and all(before[name] == receipt[name] for name in _COMPARED):
        receipt["seconds"] = {
            name: max(seconds, before["seconds"][name]) for name, seconds in receipt["seconds"].items()
        }
    publish_checked(file, receipt)
    print_table(receipt)
    save_page(file, receipt, evaluation.rows, evaluation.training)
    print(f"evaluate: receipt {file}, page with pictures {file.with_suffix('.html')}")
    if protocol == "imagenet-50k":
        npz = file.with_suffix(".npz")
        if not npz.exists() or not before or before["images"]["samples"] != receipt["images"]["samples"]:
            _save_npz(npz, evaluation.rows[0].images, size=config.data.image_size)
        print(f"evaluate: samples for ADM's evaluator {npz}")
    return file


def _save_npz(file: Path, images: Images, *, size: int) -> None:
    """Publish all images in the format of ADM's evaluator."""
    count = len(images.keys)
    starts = tqdm(range(0, count, _BATCH), desc="npz", unit=" batches")
    batches = (images.load(range(start, min(start + _BATCH, count))).pixels for start in starts)
    write_npz(file, batches, images.labels, size)


def repeat(file: Path) -> None:
    """Draw and measure again, from scratch, what the receipt `file` records, and print whether the figures are equal.

    SystemExit with status 1 if they are not. ValueError if the file is not a receipt or the run no longer exists.
    """
    before = _receipt_of(file)
    if not before:
        raise ValueError(f"--repeat: {file}: {'damaged, or not a receipt' if file.is_file() else 'no such file'}")
    run = file.parents[1] if file.parent.name == EVAL else Path(before["run"])  # the run may have been moved
    weights = before["config"]["evaluate"]["weights"]
    if weights and not Path(weights).exists():  # the receipt may come from another machine
        before["config"]["evaluate"]["weights"] = None
    config, work = check_config(before["config"], str(file)), file.with_name(f".repeat-{file.stem}")
    with claim(file.parent / ".locks" / file.name, "repeating"):
        remove(work)
        try:
            again = Evaluation(config, run, before["samples"].get("path"), work=work, weights=before.get("weights"))
            now = json.loads(json.dumps(again.receipt()))
        finally:
            remove(work)
    differing = [line for name in _COMPARED for line in _differences(before[name], now[name], name)]
    for line in differing[:_SHOWN]:
        print(f"evaluate: {line}")
    if len(differing) > _SHOWN:
        print(f"evaluate: and {len(differing) - _SHOWN:,} more values")
    if before["figures"] != now["figures"]:
        print(f"evaluate: not the same figures as in {file}")
        sys.exit(1)
    print(f"evaluate: the same figures to the last digit as in {file}")


def _receipt_of(file: Path) -> dict[str, Any] | None:
    """Read a receipt; return None if the file is not one, or has been changed."""
    text = strip_checksum(read(file)) if file.is_file() else None
    values = json.loads(text) if text else {}
    return values if {"config", "run", *_COMPARED} <= values.keys() else None


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    """Yield a line for every value in which two parts of receipts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}")
    elif old != new:
        yield f"{name} was {old}, is now {new}"


class Evaluation:
    """Measures samples and real images with one network, against one reference."""

    training: Row
    rows: list[Row]

    def __init__(
        self,
        config: Config,
        run: Path,
        path: str | None,
        *,
        work: Path | None = None,
        weights: dict[str, Any] | None = None,
        samples_only: bool = False,
    ) -> None:
        """Measure samples of `run`, or the images at `path`; with `samples_only`, not also the real images.

        With `work`, everything is computed again in that folder, from the checkpoint that `weights` of a receipt names,
        if it still exists."""
        self.network = open_network(config.evaluate.network, config.evaluate.weights, pick_device())
        measured_by = config.evaluate.changed(network=self.network.option)
        self.config = config.changed(evaluate=measured_by)
        self.run, self.path, self.work, self.weights = run, path, work, weights
        self._samples_only = samples_only
        self.sources = cached_sources(config)
        self.vae = FrozenVae(config.vae.source, self.network.device)
        self._notes: list[str] = []
        self._seconds: dict[str, float] = {}
        against = "-against-heldout" if config.evaluate.reference == "heldout" else ""
        self._suffix = f"-{self.network.name}{against}"  # of the receipt's file name

    def receipt(self) -> dict[str, Any]:
        """Return the figures of all sets of images, and everything that they depend on."""
        print(f"evaluate: network {self.network.name}: {self.network.resize}")
        with self._timed("samples"):
            samples, record = self._external_images(self.path) if self.path else self._samples()
        with self._timed("features"):
            self._compute_features(samples)
        with self._timed("figures"):
            figures = self._measure()
        return {**record, "figures": figures, **self._record()}

    def _samples(self) -> tuple[Images, dict[str, Any]]:
        """Return the samples of the run, drawing those that are missing, and what they depend on."""
        checkpoint = self._checkpoint()
        resolved, chosen = resolve_sample_settings(self.config, checkpoint)
        per_class = -(-self.config.evaluate.images // len(chosen))
        drawn = resolved.sample.changed(per_class=per_class)
        self.config = self.config.changed(sample=drawn)
        folder = sample(self.config, self.run, checkpoint=checkpoint, to=self.work and self.work / "samples")
        cache = LatentCache(folder)
        record = {
            "tag": f"{sample_folder(self.config, self.run, checkpoint).name}{self._suffix}",
            "samples": {
                **drawn.model_dump(mode="json", exclude={"image_format"}),
                "drawn": len(chosen) * per_class,
                "failed": cache.manifest.failed,
                "times": _times(self.config, checkpoint),
            },
            "weights": _weights(checkpoint),
        }
        return DecodedLatents(cache, self.vae), record

    def _checkpoint(self) -> Checkpoint:
        """Open the receipt's checkpoint or the newest one. ValueError if its classes are not those of the images."""
        path = checkpoint_path(self.run, self.weights["images_seen"]) if self.weights else None
        checkpoint = open_checkpoint(path) if path and path.exists() else require_checkpoint(self.run)
        classes, cache = tuple(self.sources[0].classes), self.config.cache.path
        if checkpoint.state.classes != classes:
            raise ValueError(f"{checkpoint.path}: its classes are not those of {cache}: use the config of this run")
        if (cache / MANIFEST).exists() and checkpoint.state.cache.sha256 != Manifest.load(cache).sha256():
            self._notes.append(
                f"the run was trained on another cache than the present {cache}: held-out images may be in it"
            )
        return checkpoint

    def _external_images(self, path: str) -> tuple[Images, dict[str, Any]]:
        data = self.config.data
        images = open_generated(path, image_size=data.image_size, classes=self.sources[0].classes, matte=data.matte)
        for note in images.notes:
            print(f"evaluate: {note}")
        fingerprint = images.fingerprint()
        name = re.sub(r"[^\w.-]+", "_", Path(path).resolve().stem)
        return images, {"tag": f"{name}-{fingerprint[:8]}{self._suffix}", "samples": {"path": path}, "weights": None}

    def _compute_features(self, samples: Images) -> None:
        """Make the rows: samples first, then real images and reconstructions of the held-out ones."""
        kept = self.work or features_path(self.config)
        self.rows = [self._row("samples", samples, self.work or self.run / EVAL / "features")]
        self.training = self._row(TRAINING, self.sources[0], kept)
        if len(self.sources) == 1:
            self._notes.append(
                "no images are held out (data.heldout), so there are no figures of held-out images and of the VAE"
            )
            return
        self.rows.append(self._row(HELDOUT, self.sources[1], kept))
        heldout = heldout_path(self.config)
        if self._samples_only:
            return
        if heldout and (heldout / MANIFEST).exists():
            images = DecodedLatents(LatentCache(heldout), self.vae)
            self.rows.append(self._row(f"{HELDOUT} through the VAE", images, kept))
        else:
            self._notes.append(f"{heldout} does not exist, so there is no figure of the VAE: run encode first")

    def _row(self, name: str, images: Images, folder: Path) -> Row:
        decoded = isinstance(images, DecodedLatents) and self.network.device.type != "cpu"  # one process per GPU
        workers = 0 if decoded else process_count(self.config.cache.workers)
        return Row(name, images, compute_features(images, self.network, folder, workers=workers, name=name))

    def _measure(self) -> dict[str, Any]:
        """Compute the figures of every row. If held-out images are the reference, training images are a row instead."""
        self.heldout = self.rows[1] if len(self.rows) > 1 else None
        reference = self.training
        if self.heldout and self.config.evaluate.reference == "heldout":
            reference, self.rows[1] = self.heldout, self.training
        measurement = Measurement(self.network, reference=reference, training=self.training, heldout=self.heldout)
        measured = self.rows[:1] if self._samples_only else self.rows
        return {row.name: measurement.figures(row) for row in tqdm(measured, desc="figures", unit=" sets")}

    def _record(self) -> dict[str, Any]:
        """Return what the figures of all rows depend on."""
        network, cache, rows = self.network, self.config.cache.path, (*self.rows, self.training, self.heldout)
        return {
            "run": str(self.run),
            "notes": self._notes,
            "classes": list(self.sources[0].classes),
            "images": {row.name: _contents(row) for row in rows if row},
            "reference": HELDOUT if self.config.evaluate.reference == "heldout" else TRAINING,
            "network": {"name": network.name, "sha256": network.sha256, "resize": network.resize},
            "cache": Manifest.load(cache).sha256() if (cache / MANIFEST).exists() else None,
            "vae": self.vae.identity().weights_sha256,
            "versions": {name: version(name) for name in ("latentmill", *_PACKAGES)},
            "machine": _machine(network.device),
            "seconds": self._seconds,
            "config": self.config.model_dump(mode="json"),
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] = round(time.monotonic() - started, 1)


def _contents(row: Row) -> dict[str, Any]:
    """Describe a set of images: name, preprocessing, counts, and a digest of pixels and labels without file times."""
    failures = [f"{key}: {reason}" for key, reason in row.features.failures.items()]
    return {
        "source": getattr(row.images, "name", row.name),
        "preprocessing": row.images.preprocessing,
        "count": len(row.features),
        "failed": len(failures),
        "first_failure": failures[0] if failures else None,
        "sha256": row.features.contents(),
    }


def _machine(device: torch.device) -> dict[str, str]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _times(config: Config, checkpoint: Checkpoint) -> list[float]:
    """Return the timesteps at which sampling steps begin, 1000 (pure noise) to 0."""
    settings = config.sample
    levels = checkpoint.state.noise.levels(settings.steps, start=settings.start, shift=settings.shift)
    return [round(level.timestep, 3) for level in levels]


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe the averaged weights that samples are drawn from."""
    state = checkpoint.state
    halflife = f"exponential average with a half-life of {state.train['ema_halflife']:,} images"
    widths = state.widths
    return {
        "checkpoint": checkpoint.path.name,
        "images_seen": checkpoint.images_seen,
        "average": f"power-function average of width {widths[0]:g}" if widths else halflife,
        "sha256": checkpoint.ema_sha256,
        "train_seed": state.train["seed"],
        "cache": state.cache.sha256,
    }
