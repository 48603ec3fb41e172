"""Open the training and held-out images that a config names, and read decoded latents as images."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.cache.listing import Rows
from data.cache.manifest import MANIFEST, Manifest
from data.cache.reader import LatentCache
from data.memory import host_memory
from data.sources.base import Batch, Source
from data.sources.files import open_source
from data.sources.heldout import Subset, open_heldout
from data.text import counted, printable
from pipeline.config import Config, cache_configs, heldout_path
from pipeline.device import halving, process_count
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


class Latents(NamedTuple):
    """Holds some latents of a cache: their rows, their classes, and their means `n C h w` as they are stored."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    means: NDArray[np.floating]

    def split(self, size: int) -> Iterator[Latents]:
        """Yield `size` of them at a time."""
        for start in range(0, len(self.rows), size):
            part = slice(start, start + size)
            yield Latents(self.rows[part], self.labels[part], self.means[part])


class Decoder:
    """Decodes latents to images, always as many at a time, so that the bits of an image do not depend on the others."""

    def __init__(self, vae: FrozenVae) -> None:
        self.vae = vae
        self._batch = BATCH
        self._turn = contextlib.nullcontext() if vae.device.type == "cpu" else threading.Lock()

    def __call__(self, latents: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Decode at most `BATCH` latents `n C h w` to images, uint8 `n S S 3`.

        Threads may call it at once; a GPU decodes for one of them at a time.
        """
        filled = np.concatenate([latents, np.repeat(latents[:1], BATCH - len(latents), axis=0)])
        with self._turn:
            parts = list(halving(self._decode, torch.from_numpy(filled.astype(np.float32)), self._batch, "decode"))
            self._batch = min(map(len, parts))  # smaller from now on if more did not fit into memory
        return np.concatenate(parts)[: len(latents)]

    def _decode(self, latents: Tensor) -> NDArray[np.uint8]:
        return to_images(self.vae.decode(latents)).cpu().numpy()

    def workers(self, image_size: int) -> int:
        """Return how many threads should call it at once: one per core, on a CPU as far as the memory allows."""
        cores = process_count("auto")
        if self.vae.device.type != "cpu":
            return cores
        fitting = host_memory().available // (2 * self.vae.encoding_bytes(BATCH, image_size))
        return max(1, min(cores, fitting))


class DecodedLatents:
    """Decodes images on demand from the means of the first view in a latent cache.

    Implements `pipeline.evaluation.features.Images`.
    """

    def __init__(self, cache: LatentCache, vae: FrozenVae) -> None:
        """Raise ValueError if `vae` is not the VAE that made the cache."""
        vae.check(cache.manifest.vae, cache.path)
        self.cache, self._decoder = cache, Decoder(vae)
        self.keys: Sequence[str] = cache.keys()
        self.labels, self.image_size = cache.labels, cache.manifest.image_size
        self.preprocessing = "decoded from the first view's means"

    def fingerprint(self) -> str:
        return self.cache.manifest.sha256()

    def load(self, indices: Sequence[int]) -> Batch:
        """Decode the images at `indices`."""
        chosen = np.asarray(indices, np.int64)
        parts = (chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH))
        return Batch(chosen, np.concatenate([self._decoder(self.cache.means(part)) for part in parts]))
