"""Stage one: encode every image once with the frozen VAE into a latent cache."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.cache.formats import FORMATS
from data.cache.manifest import MANIFEST, Failure, Manifest, Plan
from data.cache.reader import FAILURES, LatentCache
from data.cache.records import check_plan, load_failures
from data.cache.writer import CacheWriter, DamagedShardsError, EncodedShard, Job
from data.memory import host_memory
from data.sources.base import Batch, NoImagesError, Source
from data.sources.decode import PREPROCESSING
from data.storage import free_bytes, probe
from data.text import counted, duration, human_bytes, printable
from pipeline.config import Config, cache_configs
from pipeline.datasets import open_config_sources
from pipeline.device import pick_device, process_count
from pipeline.planning import plan_rows, settings_of_plan
from pipeline.vae import FrozenVae, to_pixels

ESTIMATE_AFTER = 8  # batches, the first of which warm up


def encode(config: Config, job: Job, *, extend: bool = False, retry_failed: bool = False) -> None:
    """Write this job's shards of the cache that `config` describes, and of the cache of its held-out images.

    Finished shards are skipped. `extend` adds images that are new in the data set; `retry_failed` tries again to read
    images that could not be read.
    """
    if job.jobs > 1 and (extend or retry_failed):
        raise ValueError(
            "--extend and --retry-failed change an existing cache: use them with a single process, NPROC=1 and no --job"
        )
    parts = cache_configs(config)
    finished = _finished(parts)
    if None not in finished and job.number and not (extend or retry_failed):
        return  # only the first job lists the data set and checks that the caches still match it
    try:
        sources = open_config_sources(config)
    except NoImagesError as error:
        if None in finished or extend or retry_failed:
            raise
        lines = [_check_without_images(*pair, error) for pair in zip(parts, finished, strict=True)]  # type: ignore[arg-type]
        if job.number == 0:
            print("\n".join(lines))
        return
    for part, before in zip(parts, finished, strict=True):
        if extend or retry_failed or not before:
            probe(part.cache.path, "cache.path")  # before models are loaded
    vae = FrozenVae(config.vae.source, pick_device())
    for part, source in zip(parts, sources, strict=True):
        _encode_part(part, source, vae, job, extend=extend, retry_failed=retry_failed)
    if finished[0] and finished[0] != Manifest.load(config.cache.path):
        print(
            "encode: runs that were trained on the cache before this change cannot resume with it: use train.init=RUN"
            " to start a new run from their weights"
        )
    if None not in (now := _finished(parts)) and now != finished:
        _report_copies([part.cache.path for part in parts])


def _finished(parts: Sequence[Config]) -> list[Manifest | None]:
    paths = [part.cache.path for part in parts]
    return [Manifest.load(path) if (path / MANIFEST).exists() else None for path in paths]


def _encode_part(config: Config, source: Source, vae: FrozenVae, job: Job, *, extend: bool, retry_failed: bool) -> None:
    """Write the cache of the images of `source`."""
    plan, rows = plan_rows(config, source, vae, extend=extend, retry_failed=retry_failed)
    writer = CacheWriter(config.cache.path, plan, rows, job, change=extend or retry_failed)
    if writer.is_done() and not retry_failed:
        writer.tidy()
        LatentCache(config.cache.path)  # checks that its files exist
        if job.number == 0:
            print(f"encode: all done: {config.cache.path}")
        return
    if job.number == 0:
        listed = f"{counted(len(source.keys), 'image')} in {counted(len(source.classes), 'class')} of {source.name}"
        print("\n".join(f"encode: {line}" for line in (listed, *source.notes)))
    with writer.claimed():
        if retry_failed:
            writer.redo([failure.row for failure in load_failures(config.cache.path)])
        encode_pending(writer, source, vae, config)


def _report_copies(paths: Sequence[Path]) -> None:
    """Print how many held-out image files are byte-for-byte copies of training images."""
    if len(paths) < 2:
        return
    training, heldout = (LatentCache(path).digests() for path in paths)
    known = {each for each in training if each}
    if copies := [row for row, each in enumerate(heldout) if each in known]:
        where = f"such as row {copies[0]} of {paths[1]}"
        print(
            f"encode: {counted(len(copies), 'held-out image')} also among the training images, byte for byte ({where})"
        )


def _check_without_images(config: Config, manifest: Manifest, error: NoImagesError) -> str:
    """Check a finished cache whose images are gone and return a line about it; ValueError if `config` differs."""
    path, vae = config.cache.path, FrozenVae(config.vae.source, pick_device())
    expected = {
        **settings_of_plan(config, vae, found=manifest),
        "preprocessing": PREPROCESSING.format(matte=config.data.matte),
    }
    check_plan(path, manifest.plan().changed(**expected))
    LatentCache(path)
    made_of = "" if manifest.data_source == printable(config.data.source) else f", made of {manifest.data_source},"
    return f"encode: {error}; but the finished cache {path}{made_of} can be used without its images"


def encode_pending(writer: CacheWriter, source: Source, vae: FrozenVae, config: Config) -> None:
    """Encode the shards that `writer` lacks, then finish the cache unless shards of other jobs are missing.

    Shards that turn out to be damaged are encoded once more.
    """
    vae.precision = writer.plan.precision
    try:
        _encode_and_finish(writer, source, vae, config)
    except DamagedShardsError as error:
        if not writer.pending():  # the damaged shards belong to another job
            raise
        print(f"encode: {error}")
        _encode_and_finish(writer, source, vae, config)


def _encode_and_finish(writer: CacheWriter, source: Source, vae: FrozenVae, config: Config) -> None:
    pending = writer.pending()
    work = [_Work(shard, rows) for shard in pending for rows in _batches(writer, shard, config.cache.batch_size)]
    images = sum(len(part.rows) for part in work)
    listed = counted(writer.plan.rows, "image")
    print(f"encode: {images:,} of {listed} of {source.name} to encode on {vae.device} in {vae.precision}")
    _check_room(writer, pending)
    failed, started = load_failures(writer.path), time.monotonic()
    with (
        tqdm(total=images, unit=" images", desc="encode", mininterval=1) as bar,
        ThreadPoolExecutor(1) as publisher,  # hashes and writes a shard while the VAE encodes the next one
    ):
        published: Future[list[Failure]] | None = None
        for shard in _encode_shards(work, writer, source, vae, config, bar):
            if published:
                failed += published.result()
            _check_failures(failed, writer, config)
            published = publisher.submit(writer.write, shard)
        if published:
            failed += published.result()
        _check_failures(failed, writer, config)
    manifest = writer.finish()
    rate = images / (time.monotonic() - started)
    if manifest:
        _report(manifest, config.cache.path, failed, rate)
    else:
        print(f"encode: job {writer.job}: its shards are done, {rate:.0f} images/s; the last job writes the manifest")


class _Work(NamedTuple):
    """A batch of rows of one shard."""

    shard: int
    rows: NDArray[np.int64]


class _Batches(Dataset[tuple[Batch, NDArray[np.floating] | None]]):
    """Item i is the i-th batch of images, prefetched by a worker process and, with a `vae`, encoded by it."""

    def __init__(self, source: Source, batches: Sequence[NDArray[np.int64]], plan: Plan, vae: FrozenVae | None) -> None:
        self.source, self.batches, self.plan, self.vae = source, batches, plan, vae

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Batch, NDArray[np.floating] | None]:
        batch = self.source.load(self.batches[index].tolist())
        if self.vae is None:
            return batch, None
        moments = _encode_batch(self.vae, batch, self.plan)
        return dataclasses.replace(batch, pixels=batch.pixels[:0]), moments  # do not send the pixels back


def _batches(writer: CacheWriter, shard: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the batches of one shard: as none crosses shards, its bytes do not depend on who encodes the others."""
    rows = writer.rows_to_encode(shard)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _encode_shards(
    work: list[_Work], writer: CacheWriter, source: Source, vae: FrozenVae, config: Config, bar: tqdm
) -> Iterator[EncodedShard]:
    """Encode the batches in `work` and yield each shard when its last batch is done."""
    workers, encoding = _plan_workers(config, vae)
    dataset = _Batches(source, [writer.rows.order[part.rows] for part in work], writer.plan, vae if encoding else None)
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=min(workers, len(work))))
    rows: list[NDArray[np.int64]] = []
    moments: list[NDArray[np.floating]] = []
    failures: dict[int, str] = {}
    digests: dict[int, str] = {}
    started = time.monotonic()
    for number, part in enumerate(work):
        batch, encoded = _next_batch(loader)
        rows.append(part.rows)
        moments.append(_encode_batch(vae, batch, writer.plan) if encoded is None else encoded)
        row_of = dict(zip(batch.indices.tolist(), part.rows.tolist(), strict=True))
        failures |= {row_of[index]: reason for index, reason in batch.failures.items()}
        digests |= {row_of[index]: each for index, each in batch.digests.items()}
        bar.update(len(part.rows))
        if number == 0:
            started = time.monotonic()
        elif number == ESTIMATE_AFTER:
            left = (len(work) - number) * (time.monotonic() - started) / number
            tqdm.write(f"encode: about {duration(left)} left")
        if number + 1 == len(work) or work[number + 1].shard != part.shard:
            yield EncodedShard(part.shard, np.concatenate(rows), np.concatenate(moments), failures, digests)
            rows, moments, failures, digests = [], [], {}, {}


def _plan_workers(config: Config, vae: FrozenVae) -> tuple[int, bool]:
    """Return the number of worker processes, and whether they encode or only prefetch images for the VAE.

    On a CPU, single-threaded processes are faster than the threads of one process, which wait for each other at every
    layer, and suffer less from other work (benchmarks/busy_machine.py). Each needs memory for its own batch.
    """
    workers = process_count(config.cache.workers)
    if vae.device.type != "cpu" or not workers:
        return workers, False
    need = vae.encoding_bytes(config.cache.batch_size, config.data.image_size)
    fitting = host_memory().available // (2 * need)
    return (min(workers, fitting), True) if fitting > 1 or workers == 1 else (workers, False)


def _next_batch(loader: Iterator[tuple[Batch, Any]]) -> tuple[Batch, Any]:
    try:
        return next(loader)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            "a process that reads images was killed, perhaps because memory ran out: lower cache.workers or"
            " cache.batch_size, and run the same command again to continue"
        ) from error


def _encode_batch(vae: FrozenVae, batch: Batch, plan: Plan) -> NDArray[np.floating]:
    """Return the moments `n V 2C h w` of a batch, with the views in the order of the plan.

    A short batch is padded, because kernels chosen for another shape may round differently.
    """
    count = len(batch.indices)
    images = np.concatenate([batch.pixels, np.zeros((plan.batch_size - count, *batch.pixels.shape[1:]), np.uint8)])
    pixels = to_pixels(torch.from_numpy(images).to(vae.device))
    views = [vae.encode(pixels if view == "identity" else pixels.flip(-1)) for view in plan.views]
    return torch.stack(views, dim=1)[:count, :, : plan.shape[0]].cpu().numpy()


def _check_room(writer: CacheWriter, shards: list[int]) -> None:
    """Print how many bytes the shards will take; ValueError if the disk has no room for them."""
    plan = writer.plan
    size = sum(FORMATS[plan.format].shard_size(plan, len(plan.rows_of(shard))) for shard in shards)
    free = free_bytes(writer.path)
    where = f"{counted(len(shards), 'shard')} to write, {human_bytes(free)} free on the disk"
    print(f"encode: {human_bytes(size)} in {where}")
    if size > free:
        raise ValueError(
            f"cache.path: {writer.path}: {human_bytes(size)} are needed and {human_bytes(free)} are free:"
            " choose another disk, or cache.store=mean or cache.flip=false, each of which halves the size"
        )


def _check_failures(failed: list[Failure], writer: CacheWriter, config: Config) -> None:
    limit = config.cache.max_failures
    if len(failed) > limit:
        writer.write_failures()
        raise ValueError(
            f"{counted(len(failed), 'image')} could not be read, more than cache.max_failures = {limit}: the first is"
            f" {failed[0].key}: {failed[0].reason}; all are listed in {writer.path / FAILURES}. Encoded images are"
            " kept: repair the files and use --retry-failed, or raise cache.max_failures"
        )


def _report(manifest: Manifest, path: Path, failed: list[Failure], rate: float) -> None:
    size = sum(shard.size for shard in manifest.shards)
    classes = counted(len(manifest.classes), "class")
    counts = f"{manifest.committed:,} committed + {manifest.failed:,} failed = {manifest.rows:,} listed"
    print(f"encode: {counts} images in {classes}, {human_bytes(size)} in {path}, {rate:.0f} images/s")
    if empty := np.flatnonzero(LatentCache(path).class_counts() == 0).tolist():
        first = printable(manifest.classes[empty[0]])
        print(f"encode: {counted(len(empty), 'class')} without images, such as {first}: it cannot be sampled")
    if failed:
        print(f"encode: {counted(manifest.failed, 'image')} could not be read, listed in {path / FAILURES}; the first:")
        print(f"encode: {failed[0].key}: {failed[0].reason}")


def parse_job(text: str | None) -> Job:
    """Return the job that `--job 3/16` selects; without it, this process's share if a launcher started several."""
    if text is None:
        return Job(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    number, _, jobs = text.partition("/")
    if not (number.isdecimal() and jobs.isdecimal() and 1 <= int(number) <= int(jobs)):
        raise ValueError(f"--job {text}: give I/N with 1 <= I <= N, such as 3/16")
    return Job(int(number) - 1, int(jobs))
