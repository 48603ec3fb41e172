"""Open the training and held-out images that a config names, and read decoded latents as images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.cache.listing import Rows
from data.cache.manifest import MANIFEST, Manifest
from data.cache.reader import LatentCache
from data.memory import host_memory
from data.sources.base import Batch, Source
from data.sources.files import open_source
from data.sources.heldout import Subset, open_heldout
from data.text import counted, printable
from pipeline.config import Config, cache_configs, heldout_path
from pipeline.device import halving, in_threads, process_count
from pipeline.vae import FrozenVae, to_images

BATCH = 16  # latents decoded at a time


def open_config_sources(config: Config) -> list[Source]:
    """Open the training images and, if `data.heldout` is given, the held-out images."""
    settings = config.data
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    size = settings.image_size
    whole = open_source(
        settings.source, image_size=size, count=settings.count, seed=settings.seed, matte=settings.matte, **columns
    )
    if settings.heldout is None:
        return [whole]
    return list(open_heldout(settings.heldout, whole, image_size=size, matte=settings.matte, **columns))


def cached_sources(config: Config) -> list[Source]:
    """Open the images that the caches of `config` were made from, in the order and with the class numbers of the cache.

    Without a cache they are in the order of the data set. ValueError if the images or their preprocessing have changed
    since they were encoded.
    """
    sources: list[Source] = []
    for part, source in zip(cache_configs(config), open_config_sources(config), strict=True):
        path = part.cache.path
        if (path / MANIFEST).exists():
            manifest = Manifest.load(path)
            for name, cached, now in (
                ("image_size", manifest.image_size, source.image_size),
                ("preprocessing", manifest.preprocessing, source.preprocessing),
            ):
                if cached != now:
                    raise ValueError(f"{path}: its {name} is {cached}, but {source.name} has {now}: encode again")
            rows, change = Rows.aligned(source, path, manifest)
            anew = "run encode with another cache.path"
            kinds = (
                (change.gone, "missing", anew),
                (change.edited, "changed", anew),
                (change.added, "new", "run encode --extend"),
            )
            for keys, what, remedy in kinds:
                if keys:
                    count = f"{counted(len(keys), 'image')} {what}, such as {printable(keys[0])}"
                    raise ValueError(f"{path}: {source.name} has changed since it was encoded: {count}: {remedy}")
            aligned = Subset(source, rows.order, source.name)
            aligned.labels, aligned.classes = rows.labels, rows.classes
            source = aligned
        sources.append(source)
    return sources


def source_of(config: Config, cache: Path) -> Source:
    """Open the images of the cache at `cache`: the held-out images if it is their cache, else the training images."""
    heldout = heldout_path(config)
    return open_config_sources(config)[int(heldout is not None and cache.resolve() == heldout.resolve())]


class DecodedLatents:
    """Decodes images on demand from the means of the first view in a latent cache.

    Implements `pipeline.evaluation.features.Images`.
    """

    def __init__(self, cache: LatentCache, vae: FrozenVae) -> None:
        """Raise ValueError if `vae` is not the VAE that made the cache."""
        vae.check(cache.manifest.vae, cache.path)
        self.cache, self.vae = cache, vae
        self.keys: Sequence[str] = cache.keys()
        self.labels, self.image_size = cache.labels, cache.manifest.image_size
        self.preprocessing = "decoded from the first view's means"
        self._batch = BATCH

    def fingerprint(self) -> str:
        return self.cache.manifest.sha256()

    def load(self, indices: Sequence[int]) -> Batch:
        """Decode the images at `indices`."""
        chosen = np.asarray(indices, np.int64)
        return Batch(chosen, np.concatenate(list(self.batches(chosen))))

    def workers(self) -> int:
        """Return how many batches `batches` should decode at once: on a GPU one; on a CPU one per core, as far as the
        memory allows, because threads that share a batch wait for each other at every layer."""
        if self.vae.device.type != "cpu":
            return 1
        fitting = host_memory().available // (2 * self.vae.encoding_bytes(BATCH, self.image_size))
        return max(1, min(process_count("auto"), fitting))

    def batches(self, chosen: NDArray[np.int64], workers: int = 1) -> Iterator[NDArray[np.uint8]]:
        """Yield the images at `chosen`, uint8 `n S S 3`, batch by batch; `workers` batches are decoded at once.

        Only full batches are decoded, so that the bits do not depend on the selection.
        """
        filled = np.concatenate([chosen, np.repeat(chosen[:1], -len(chosen) % self._batch)])
        done = 0
        one_by_one = halving(self._decode, filled, self._batch, "decode")
        parts = [filled[i : i + self._batch] for i in range(0, len(filled), self._batch)]
        for pixels in one_by_one if workers == 1 else in_threads(self._decode, parts, workers):
            self._batch = len(pixels)  # smaller from now on if more did not fit into memory
            if done < len(chosen):
                yield pixels[: len(chosen) - done]
            done += len(pixels)

    def _decode(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        latents = self.cache.read_verified(indices)[:, 0, : self.cache.manifest.latent_channels]
        return to_images(self.vae.decode(torch.from_numpy(latents.astype(np.float32)))).cpu().numpy()
