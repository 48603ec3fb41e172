"""Images/s of `latentmill decode` against the bare decoder of the VAE.

    python -m benchmarks.decode caches/cifar10

In turn, on the same latents: (1) the VAE's decoder on batches that lie in memory, in the batch size of (2), and
(2) `latentmill decode` as a user calls it, from opening the latents to the page. Then the peak memory of (2) for a
tenth and for all of the images.
"""

from __future__ import annotations

import contextlib
import io
import resource
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.loader import in_process, write_cache
from data.cache.manifest import Plan
from data.cache.reader import LatentCache
from pipeline.config import Config
from pipeline.datasets import BATCH
from pipeline.device import pick_device
from pipeline.vae import FrozenVae
from stages.decode import IMAGES, decode


@click.command()
@click.argument("cache", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--images", default=10_000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Of the bare decoder, before and after each decode.")
@click.option("--vae", default="bundled", show_default=True, help="vae.source of the cache.")
@click.option("--format", "image_format", type=click.Choice(["png", "webp", "jpeg"]), default="png", show_default=True)
@click.option("--memory/--no-memory", default=True, help="Measure the peak memory, too.")
def main(cache: Path, images: int, rounds: int, seconds: float, vae: str, image_format: str, memory: bool) -> None:
    """Measure on the first latents of CACHE."""
    config = Config.model_validate({"vae": {"source": vae}, "sample": {"image_format": image_format}})
    with tempfile.TemporaryDirectory() as folder:
        samples = _first(LatentCache(cache), min(images, len(LatentCache(cache))), Path(folder) / "samples")
        decoder = FrozenVae(vae, pick_device())
        ratios = []
        for number in range(rounds):
            before = _bare(decoder, samples, seconds)  # and after it, because the machine's speed drifts
            stage = _stage(config, samples)
            # not deleted: for minutes, ext4 would try the places of the deleted files for each new one
            (samples.path / IMAGES).rename(samples.path / f"{IMAGES} of round {number + 1}")
            after = _bare(decoder, samples, seconds)
            ratios.append(stage / statistics.mean([before, after]))
            print(
                f"round {number + 1}: bare decoder {before:.0f} and {after:.0f} images/s, decode {stage:.0f}"
                f" images/s, ratio {ratios[-1]:.3f}",
                flush=True,
            )
        print(f"decode / bare decoder before and after it: {statistics.median(ratios):.3f}")
        for count in (len(samples) // 10, len(samples)) if memory else ():
            fewer = _first(samples, count, Path(folder) / f"{count} samples")
            peak = in_process(_peak_memory, config, fewer.path)
            print(f"peak memory of decode, {count:,} images: {peak / 1024:.0f} MiB")


def _first(cache: LatentCache, count: int, path: Path) -> LatentCache:
    """The means of the first `count` images, as `latentmill sample` stores them."""
    manifest = cache.manifest
    channels, size = manifest.latent_channels, manifest.shape[1:]
    kept = {"rows": count, "store": "mean", "views": ("identity",), "shape": (channels, *size)}
    plan = Plan(**{**dict(manifest.plan()), **kept})
    labels = cache.labels[:count]
    return write_cache(path, plan, cache.keys()[:count], labels, lambda rows: cache.read(rows)[:, :1, :channels])


def _bare(vae: FrozenVae, cache: LatentCache, seconds: float) -> float:
    """The decoder alone, over and over the same few batches of latents in memory."""
    latents = torch.from_numpy(cache.read(np.arange(8 * BATCH))[:, 0].astype(np.float32)).to(vae.device)
    batches = latents.split(BATCH)
    vae.decode(batches[0])
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for batch in batches:
            vae.decode(batch)
            done += len(batch)
        if vae.device.type == "cuda":
            torch.cuda.synchronize()
    return done / (time.perf_counter() - started)


def _stage(config: Config, cache: LatentCache) -> float:
    """`latentmill decode` of images that are not decoded yet, loading the VAE included."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        decode(config, cache.path)
    return len(cache) / (time.perf_counter() - started)


def _peak_memory(config: Config, path: Path) -> int:
    """KiB that this process holds at most while it decodes."""
    _stage(config, LatentCache(path))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
