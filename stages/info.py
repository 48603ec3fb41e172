"""Describe a latent cache, in words and in two pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.cache.manifest import Manifest
from data.cache.reader import FAILURES, LatentCache
from data.cache.records import progress
from data.sources.base import NoImagesError, Source
from data.text import counted, human_bytes
from pipeline.config import Config
from pipeline.datasets import source_of
from pipeline.device import pick_device
from pipeline.pictures import pairs_sheet, save_figure, save_png
from pipeline.vae import FrozenVae, to_images

PAIRS = 24  # images shown beside their decoded latents
SAMPLED = 4096  # images whose latents are in the histograms


def info(config: Config, cache: Path | None) -> None:
    """Print the figures of `cache`, or of the config's, and write `info/pairs.png` and `info/histogram.png` into it.

    The pairs need the images: without them, or with another data set in the config, there are none. ValueError if a
    shard that is shown is damaged.
    """
    path = cache or config.cache.path
    committed, failed, pending = progress(path)
    if pending:
        counts = f"{committed:,} committed + {failed:,} failed + {pending:,} pending"
        print(f"{path}: not finished: {counts} = {counted(committed + failed + pending, 'image')}")
        return
    latents = LatentCache(path)
    print("\n".join(_lines(latents)))
    _save_histogram(latents, path / "info" / "histogram.png")
    print(f"histograms of latents, one per channel: {path}/info/histogram.png")
    try:
        source = source_of(config, path)
    except NoImagesError as error:
        print(f"no pictures: {error}")
        return
    if source.fingerprint() != latents.manifest.data_fingerprint:
        print(f"no pictures: {source.name} (data.source) is not the data set of this cache")
        return
    vae = FrozenVae(config.vae.source, pick_device())
    vae.check(latents.manifest.vae, path)
    shown, psnr = _save_pairs(latents, source, vae, path / "info" / "pairs.png")
    beside = f"{counted(shown, 'image')} beside {'its' if shown == 1 else 'their'} decoded latents"
    print(f"{beside}, {psnr:.1f} dB PSNR: {path}/info/pairs.png")


def _lines(latents: LatentCache) -> list[str]:
    manifest = latents.manifest
    size = sum(file.size for file in (*manifest.shards, *manifest.files))
    pixels = manifest.rows * manifest.image_size**2 * 3
    ratio = f"{size / pixels:.2f} of their RGB pixels at {manifest.image_size}x{manifest.image_size}"
    if manifest.data_bytes:
        ratio += f", {size / manifest.data_bytes:.2f} of their {human_bytes(manifest.data_bytes)} of files"
    counts = latents.class_counts()
    lines = [
        f"{latents.path}: a finished {manifest.format} cache of {manifest.data_source}",
        f"images     {manifest.rows:,} listed = {manifest.committed:,} committed + {manifest.failed:,} failed",
        f"rows       {' x '.join(map(str, manifest.row_shape))} {manifest.dtype}: views {', '.join(manifest.views)};"
        f" {manifest.store} of {manifest.latent_channels} channels",
        f"bytes      {human_bytes(size)} in {counted(len(manifest.shards), 'shard')},"
        f" {human_bytes(size // manifest.rows)} an image; {ratio}",
        f"vae        {manifest.vae.source} ({manifest.vae.class_name}), weights {manifest.vae.weights_sha256[:12]},"
        f" scaling {manifest.vae.scaling_factor:.4g}, {manifest.vae.downsampling} pixels per latent position",
        "channel    " + "".join(f"{i:>9}" for i in range(manifest.latent_channels)),
        "mean       " + "".join(f"{value:9.3f}" for value in manifest.mean),
        "std        " + "".join(f"{value:9.3f}" for value in manifest.std),
        f"classes    {len(manifest.classes)}, {_range(counts)} each",
    ]
    names = [name if name.isprintable() else repr(name) for name in manifest.classes]
    lines += [f"           {count:9,}  {name}" for name, count in zip(names, counts, strict=True)]
    failures = latents.lines(FAILURES)
    lines += [f"failed     {line['key']}: {line['reason']}" for line in failures[:10]]
    if len(failures) > 10:
        lines.append(f"           and {len(failures) - 10:,} more in {latents.path / FAILURES}")
    return lines


def _range(counts: NDArray[np.int64]) -> str:
    least, most = int(counts.min()), int(counts.max())
    return ("" if least == most else f"{least:,} to ") + counted(most, "image")


def _save_pairs(latents: LatentCache, source: Source, vae: FrozenVae, file: Path) -> tuple[int, float]:
    """Save evenly spread images of a cache above their decoded latents; return how many, and the PSNR over all."""
    chosen = np.unique(np.linspace(0, len(latents) - 1, PAIRS).astype(np.int64))
    index = {key: i for i, key in enumerate(source.keys)}
    keys = latents.keys()
    images = source.load([index[keys[i]] for i in chosen]).pixels
    means = torch.from_numpy(latents.means(chosen).astype(np.float32))
    decoded = torch.cat([to_images(vae.decode(part)) for part in means.split(4)]).cpu().numpy()
    psnrs = [_psnr(a, b) for a, b in zip(images, decoded, strict=True)]
    labels, classes = latents.named_labels()
    names = [classes[label] for label in labels[chosen]]
    save_png(pairs_sheet(images, decoded, names, [f"{value:.1f} dB" for value in psnrs]), file)
    return len(chosen), _psnr(images, decoded)


def _psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB of the mean squared error over all values."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / np.maximum(error, 1e-10)))


def _save_histogram(latents: LatentCache, file: Path) -> None:
    """Save histograms of the first view's posterior means, one panel per channel, with the Gaussian of all latents."""
    from matplotlib.figure import Figure

    manifest: Manifest = latents.manifest
    channels = manifest.latent_channels
    chosen = np.unique(np.linspace(0, len(latents) - 1, SAMPLED).astype(np.int64))
    means = latents.means(chosen).astype(np.float32)
    columns = min(4, channels)
    rows = -(-channels // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for channel, panel in enumerate(axes.flat):
        if channel >= channels:
            panel.axis("off")
            continue
        mean, std = manifest.mean[channel], manifest.std[channel]
        panel.hist(means[:, channel].ravel(), bins=100, range=(mean - 5 * std, mean + 5 * std), density=True)
        x = np.linspace(mean - 5 * std, mean + 5 * std, 200)
        panel.plot(x, np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi)), color="black", linewidth=1)
        panel.set_title(f"channel {channel}: mean {mean:.2f}, std {std:.2f}", fontsize=9)
        panel.set_yticks([])
    figure.suptitle(
        f"latents of {counted(len(chosen), 'image')}; line: the Gaussian they are normalised by", fontsize=10
    )
    save_figure(figure, file, dpi=110)
