"""Verify every file of a cache against its SHA-256, and encode damaged shards again."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from data.cache.listing import Rows, listing_of
from data.cache.manifest import Manifest
from data.cache.reader import ROWS, LatentCache
from data.cache.writer import CacheWriter
from data.text import counted
from pipeline.config import Config, cache_configs


def verify(config: Config, cache: Path | None, *, repair: bool) -> None:
    """Name all files of `cache`, or of the config's, that are missing or damaged; ValueError if there are any.

    With `repair` the shards among them are encoded again, from the images of `config`.
    """
    for path in [cache] if cache else [part.cache.path for part in cache_configs(config)]:
        _verify_one(config, path, repair=repair)


def _verify_one(config: Config, path: Path, *, repair: bool) -> None:
    manifest = Manifest.load(path)
    files = (*manifest.shards, *manifest.files)
    wrong = []
    with tqdm(total=sum(file.size for file in files), unit="B", unit_scale=True, desc="verify", mininterval=1) as bar:
        for file in files:
            try:
                problem = file.problem(path)
            except OSError as error:  # report it and check the other files, too
                problem = f"cannot be read: {error.strerror}"
            if problem:
                wrong.append(file.file)
                tqdm.write(f"verify: {path / file.file}: {problem}")
            bar.update(file.size)
    if not wrong:
        LatentCache(path)  # checks names and sizes
        counts = f"{counted(len(files), 'file')}, {counted(manifest.committed, 'image')}"
        print(f"verify: {counts}: all match their SHA-256: {path}")
    elif repair:
        _repair(config, path, manifest, wrong)
    else:
        raise ValueError(
            f"{path}: missing or damaged: {len(wrong):,} of {counted(len(files), 'file')}, the first {wrong[0]}:"
            " verify --repair encodes damaged shards again"
        )


def _repair(config: Config, path: Path, manifest: Manifest, wrong: list[str]) -> None:
    from pipeline.datasets import source_of
    from pipeline.device import pick_device
    from pipeline.planning import plan_rows
    from pipeline.vae import FrozenVae
    from stages.encode import encode_pending

    source = source_of(config, path)
    config = config.changed(cache=config.cache.changed(path=path))
    vae = FrozenVae(config.vae.source, pick_device())
    if ROWS in wrong and Rows.of(source).file != listing_of(manifest):
        raise ValueError(
            f"{config.cache.path}: {ROWS} is damaged and the data set has changed, so rows cannot be matched to images:"
            " encode into a new cache"
        )
    plan, rows = plan_rows(config, source, vae)
    writer = CacheWriter(config.cache.path, plan, rows)
    bad = [i for i, shard in enumerate(manifest.shards) if shard.file in wrong]
    with writer.claimed():
        writer.redo([row for shard in bad for row in plan.rows_of(shard)])
        encode_pending(writer, source, vae, config)
