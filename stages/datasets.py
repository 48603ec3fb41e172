"""The images that a config names: those of training, and those that are held out."""

from __future__ import annotations

from pathlib import Path

from data.heldout import open_heldout
from data.source import Source, open_source
from stages.config import Config, heldout_path


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


def source_of(config: Config, cache: Path) -> Source:
    """The images of training, or the held-out ones where `cache` is that of these."""
    return open_config_sources(config)[int(cache == heldout_path(config))]
