"""The images that a config names, those of training and those that are held out, and those of latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.cache.listing import Rows
from data.cache.manifest import MANIFEST, Manifest
from data.cache.reader import LatentCache
from data.sources.base import Batch, Source
from data.sources.files import open_source
from data.sources.heldout import Subset, open_heldout
from data.text import counted, printable
from pipeline.config import Config, heldout_path, parts_of
from pipeline.vae import FrozenVae, to_images

BATCH = 16  # latents that are decoded at a time


def open_config_sources(config: Config) -> list[Source]:
    """The images of training and, where `data.heldout` is given, those that are held out."""
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
    """The images that the caches of `config` were made from, in their order and with their numbers of the classes; as
    they are listed where there is no cache.

    ValueError where they have changed since they were encoded, or are brought to pixels otherwise.
    """
    sources: list[Source] = []
    for part, source in zip(parts_of(config), open_config_sources(config), strict=True):
        path = part.cache.path
        if (path / MANIFEST).exists():
            manifest = Manifest.load(path)
            for name, cached, now in (
                ("image_size", manifest.image_size, source.image_size),
                ("preprocessing", manifest.preprocessing, source.preprocessing),
            ):
                if cached != now:
                    raise ValueError(f"{path}: its {name} is {cached}, of {source.name} it is {now}: encode again")
            rows, change = Rows.aligned(source, path, manifest)
            for keys, what in ((change.gone, "gone"), (change.edited, "changed"), (change.added, "new")):
                if keys:
                    count = f"{counted(len(keys), 'image')} {what}, such as {printable(keys[0])}"
                    raise ValueError(f"{path}: {source.name} is not what was encoded: {count}: encode again")
            aligned = Subset(source, rows.order, source.name)
            aligned.labels, aligned.classes = rows.labels, rows.classes
            source = aligned
        sources.append(source)
    return sources


def source_of(config: Config, cache: Path) -> Source:
    """The images of training, or the held-out ones where `cache` is that of these."""
    heldout = heldout_path(config)
    return open_config_sources(config)[int(heldout is not None and cache.resolve() == heldout.resolve())]


class DecodedLatents:
    """The images of a latent cache, decoded from the first view's means as they are asked for (see
    `pipeline.evaluation.features.Images`)."""

    def __init__(self, cache: LatentCache, vae: FrozenVae) -> None:
        """ValueError when `vae` is not the one whose latents these are."""
        vae.check(cache.manifest.vae, cache.path)
        self.cache, self.vae = cache, vae
        self.keys: Sequence[str] = cache.keys()
        self.labels, self.image_size = cache.labels, cache.manifest.image_size
        self.preprocessing = "decoded from the first view's means"

    def fingerprint(self) -> str:
        return self.cache.manifest.sha256()

    def load(self, indices: Sequence[int]) -> Batch:
        """Batches of one size are decoded, the last one filled up, so that no bit depends on which are asked for."""
        chosen = np.asarray(indices, np.int64)
        images = []
        for start in range(0, len(chosen), BATCH):
            rows = chosen[start : start + BATCH]
            filled = np.concatenate([rows, np.repeat(rows[:1], BATCH - len(rows))])
            latents = self.cache.read_verified(filled)[:, 0, : self.cache.manifest.latent_channels]
            pixels = self.vae.decode(torch.from_numpy(latents.astype(np.float32)))
            images.append(to_images(pixels)[: len(rows)].cpu().numpy())
        return Batch(chosen, np.concatenate(images))
