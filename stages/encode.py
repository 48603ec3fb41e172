"""Stage one: every image through the frozen VAE once, into a latent cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.cache import SHARD_ROWS, CacheWriter
from data.folder import PREPROCESSING
from data.manifest import Manifest, Plan
from data.source import Batch, Source, open_source
from pipeline.vae import FrozenVae, to_pixels
from stages.config import Config
from stages.device import pick_device


def encode(config: Config) -> Manifest:
    """Write the cache that `config` describes, or what is missing of it."""
    source = open_source(
        config.data.source, image_size=config.data.image_size, count=config.data.count, seed=config.data.seed
    )
    vae = FrozenVae(config.vae.source, pick_device())
    writer = CacheWriter(config.cache.path, make_plan(config, source, vae), source.keys, source.labels)
    if writer.done:
        print(f"encode: all done: {config.cache.path}")
        return writer.finish()
    pending = writer.pending()
    rows = sum(len(writer.rows_of(shard)) for shard in pending)
    print(f"encode: {rows:,} of {len(source.keys):,} images of {source.name} to encode on {vae.device}")
    started = time.monotonic()
    with tqdm(total=rows, unit=" images", desc="encode", mininterval=1) as bar:
        for shard, moments, failures in _encode_shards(writer, pending, source, vae, config, bar):
            writer.write(shard, moments, failures)
    manifest = writer.finish()
    _report(manifest, config.cache.path, rows / (time.monotonic() - started))
    return manifest


def make_plan(config: Config, source: Source, vae: FrozenVae) -> Plan:
    """What the manifest pins, before anything is encoded."""
    if config.data.image_size % vae.downsampling:
        raise ValueError(
            f"data.image_size = {config.data.image_size}: this VAE turns {vae.downsampling}x{vae.downsampling} pixels"
            f" into one latent position: choose a multiple of {vae.downsampling}"
        )
    side = config.data.image_size // vae.downsampling
    channels = vae.model.config["latent_channels"]
    return Plan(
        store=config.cache.store,
        dtype=config.cache.dtype,
        views=("identity", "flip") if config.cache.flip else ("identity",),
        shape=(2 * channels if config.cache.store == "moments" else channels, side, side),
        rows=len(source.keys),
        shard_rows=SHARD_ROWS,
        batch_size=config.cache.batch_size,
        classes=source.classes,
        data_source=source.name,
        data_fingerprint=source.fingerprint(),
        image_size=config.data.image_size,
        preprocessing=PREPROCESSING,
        vae=vae.identity(),
    )


class _Batches(Dataset[Batch]):
    """Item i is the i-th batch of images; a worker process reads it ahead of the VAE."""

    def __init__(self, source: Source, batches: list[range]) -> None:
        self.source, self.batches = source, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.source.load(self.batches[index])


def _encode_shards(
    writer: CacheWriter, shards: list[int], source: Source, vae: FrozenVae, config: Config, bar: tqdm
) -> Iterator[tuple[int, NDArray[np.floating], dict[int, str]]]:
    """Shard number, moments `rows V 2C h w` and failures, in turn.

    Batches start anew with each shard, so a shard's bytes do not depend on which shards this process encodes.
    """
    size = config.cache.batch_size
    batches = [[rows[i : i + size] for i in range(0, len(rows), size)] for rows in map(writer.rows_of, shards)]
    dataset = _Batches(source, [batch for group in batches for batch in group])
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=config.cache.workers))
    for shard, group in zip(shards, batches, strict=True):
        moments: list[NDArray[np.floating]] = []
        failures: dict[int, str] = {}
        for _ in group:
            batch: Batch = next(loader)
            moments.append(_encode_batch(vae, batch, writer.plan))
            failures |= batch.failures
            bar.update(len(batch.indices))
        yield shard, np.concatenate(moments), failures


def _encode_batch(vae: FrozenVae, batch: Batch, plan: Plan) -> NDArray[np.floating]:
    """Moments `n V 2C h w` of a batch, the views in the order of the plan."""
    pixels = to_pixels(torch.as_tensor(batch.pixels).to(vae.device))
    views = [vae.encode(pixels if view == "identity" else pixels.flip(-1)) for view in plan.views]
    moments = torch.stack(views, dim=1)
    return moments[:, :, : plan.shape[0]].cpu().numpy()


def _report(manifest: Manifest, path: Path, rate: float) -> None:
    size = sum(shard.size for shard in manifest.shards) / 1e6
    classes = len(manifest.classes)
    print(f"encode: {manifest.committed:,} images in {classes} classes, {size:.1f} MB in {path}, {rate:.0f} images/s")
    if manifest.failed:
        first = manifest.failures[0]
        print(f"encode: {manifest.failed:,} images could not be read, listed in {path}/manifest.json; the first:")
        print(f"encode: {first.key}: {first.reason}")
