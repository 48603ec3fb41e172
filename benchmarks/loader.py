"""How fast are random batches of latents read from a cache, against other ways to keep them on disk?

    python -m benchmarks.loader --cache caches/cifar10 [--other caches/cifar10-tar] [--synthetic 1300000] [--json FILE]

Samples/s of moments from a warm page cache, in contiguous batches of 256, ends of epochs included. All methods take
turns in every round, each in a fresh process without workers, for the same number of seconds after a warm-up; printed
are the median, the least and the most of the rounds. `--synthetic` measures on a cache of so many rows of 4x32x32, too.

Ours are `resident`, `mapped` and `streamed` of `LatentLoader`, from both formats. The others: one .npy an image, plain
zarr on our store, plain webdataset on our shards and, where installed, mosaicml-streaming and litdata. Each has what
its documents recommend, or settings that were quicker. Their batches are moments alone, ours come with labels; all but
plain zarr hold `--subset` samples at most: both favours them. Ours read ahead in one thread; torch may use all cores.
Orders differ: `streamed`, webdataset and litdata shuffle shards and what lies near each other, the rest all samples.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import psutil
import torch
import webdataset
import zarr
from numpy.typing import NDArray
from torch import Tensor

from data.cache.listing import Rows
from data.cache.manifest import Plan, VaeIdentity
from data.cache.reader import SHARD_ROWS, LatentCache, least_shard_rows
from data.cache.writer import CacheWriter, EncodedShard
from data.loader import WINDOW_BYTES, WINDOW_ROWS, LatentLoader

BATCH, SHUFFLE_BUFFER, WARM_UP, STEPS = 256, 5_000, 1.0, 2_000  # samples, samples, seconds, batches
PACKAGES = ("latentmill", "numpy", "torch", "zarr", "webdataset", "mosaicml-streaming", "litdata")
Samples = NDArray[np.floating]
Values = Callable[[NDArray[np.int64]], Samples]  # of indices


class Method(NamedTuple):
    """`batches(path)` never ends; it reads the `samples` samples in `path`.

    Whole periods of so many batches are timed: who reads far ahead gets nothing that was read before the clock started.
    """

    name: str
    path: Path
    samples: int
    batches: Callable[[Path], Iterator[Tensor]]
    ours: bool = False
    period: int = 1


def stacked(samples: Sequence[Samples]) -> Tensor:
    return torch.from_numpy(np.stack(samples))


def random_parts(count: int) -> Iterator[NDArray[np.int64]]:
    """Whole batches of indices, epoch after epoch, each a permutation."""
    random = np.random.default_rng(0)
    while True:
        yield from random.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)


def read_ours(path: Path, access: str) -> Iterator[Tensor]:
    cpu, cache = torch.device("cpu"), LatentCache(path)
    loader = LatentLoader(cache, seed=0, batch_size=BATCH, rank=0, world_size=1, device=cpu, access=access)
    return (loader.batch(step).moments for step in itertools.count())


def read_zarr(path: Path) -> Iterator[Tensor]:
    """Rows sorted within a batch, which zarr reads quicker."""
    rows, array = LatentCache(path).rows, zarr.open_array(path / "latents.zarr" / "moments", mode="r")
    for part in random_parts(len(rows)):
        yield torch.from_numpy(np.ascontiguousarray(array.oindex[np.sort(rows[part])]))


def read_webdataset(path: Path) -> Iterator[Tensor]:
    """Shards in random order without end, a shuffle buffer that is full from the first batch on."""
    files = [str(file) for file in sorted(path.glob("shards/*.tar"))]
    samples = webdataset.WebDataset(files, resampled=True, shardshuffle=False)
    samples = samples.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER).decode().to_tuple("moments.npy")
    return iter(samples.map(lambda sample: sample[0]).batched(BATCH, collation_fn=stacked))


def write_npy(path: Path, samples: Samples) -> None:
    path.mkdir(parents=True)
    for number, sample in enumerate(samples):
        np.save(path / f"{number:07d}.npy", sample)


def read_npy(path: Path) -> Iterator[Tensor]:
    files = [str(file) for file in path.iterdir()]
    return (stacked([np.load(files[i]) for i in part]) for part in random_parts(len(files)))


def write_mosaicml(path: Path, samples: Samples) -> None:
    from streaming import MDSWriter

    column = f"ndarray:{samples.dtype.name}:{','.join(str(side) for side in samples.shape[1:])}"
    with MDSWriter(out=str(path), columns={"moments": column}) as writer:
        for sample in samples:
            writer.write({"moments": sample})


def read_mosaicml(path: Path) -> Iterator[Tensor]:
    """With its own collate, which was quicker than `stacked`."""
    from streaming import StreamingDataLoader, StreamingDataset

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    loader = StreamingDataLoader(StreamingDataset(local=str(path), shuffle=True, batch_size=BATCH), batch_size=BATCH)
    return (batch["moments"] for batch in itertools.chain.from_iterable(itertools.repeat(loader)))


def write_litdata(path: Path, samples: Samples) -> None:
    """As numpy arrays, which it reads ten times as fast as tensors."""
    from litdata.streaming.cache import Cache

    writer = Cache(str(path), chunk_bytes="64MB")
    for number, sample in enumerate(samples):
        writer[number] = sample
    writer.done()
    writer.merge()


def read_litdata(path: Path) -> Iterator[Tensor]:
    """With `stacked`, which was quicker than its own collate."""
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it would ask the network
    from litdata import StreamingDataLoader, StreamingDataset

    loader = StreamingDataLoader(StreamingDataset(str(path), shuffle=True), batch_size=BATCH, collate_fn=stacked)
    return itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch


PEERS = {  # what each is made of, how it writes and reads
    "one .npy an image": ("numpy", write_npy, read_npy),
    "mosaicml-streaming": ("streaming", write_mosaicml, read_mosaicml),
    "litdata": ("litdata", write_litdata, read_litdata),
}


def write_peers(folder: Path, samples: Samples) -> Iterator[Method]:
    """What has files of its own, written into `folder`."""
    for name, (module, write, read) in PEERS.items():
        if not find_spec(module):
            print(f"{name}: not installed: pip install {name}")
            continue
        path, started = folder / module, time.perf_counter()
        write(path, samples)
        print(f"{name}: {len(samples):,} samples written in {time.perf_counter() - started:.0f} s", flush=True)
        yield Method(name, path, len(samples), read)


def write_cache(path: Path, plan: Plan, keys: Sequence[str], labels: NDArray[np.int64], values: Values) -> LatentCache:
    """A finished and verified cache whose rows are what `values` says of their numbers."""
    started = time.perf_counter()
    writer = CacheWriter(path, plan, Rows(keys, labels, plan.classes, [""] * len(keys), np.arange(len(keys))))
    with writer.claimed():
        for shard in writer.pending():
            rows = writer.rows_to_encode(shard)
            writer.write(EncodedShard(shard, rows, values(rows), {}))
        writer.finish()
    cache = LatentCache(path)
    cache.verify()
    print(f"{plan.format} cache: {len(cache):,} samples written in {time.perf_counter() - started:.0f} s", flush=True)
    return cache


def synthetic_cache(path: Path, count: int) -> LatentCache:
    """`count` rows of 4x32x32, float16: the same noise in each shard, with the row's number in its first two values."""
    noise = np.random.default_rng(0).standard_normal((SHARD_ROWS, 1, 4, 32, 32), np.float32).astype(np.float16)

    def values(numbers: NDArray[np.int64]) -> Samples:
        block = noise[: len(numbers)].copy()
        block[:, 0, 0, 0, 0], block[:, 0, 0, 0, 1] = numbers % 2048, numbers // 2048
        return block

    return write_cache(path, noise_plan(count), [str(i) for i in range(count)], np.zeros(count, np.int64), values)


def noise_plan(count: int) -> Plan:
    """The plan of `count` rows of 4x32x32, float16."""
    named = {"source": "none", "class_name": "none", "weights_sha256": "0" * 64, "downsampling": 8}
    vae = VaeIdentity(**named, scaling_factor=1, shift_factor=0)
    stored = {"store": "mean", "dtype": "float16", "views": ("identity",), "shape": (4, 32, 32), "classes": ("noise",)}
    cut = {"rows": count, "shard_rows": max(SHARD_ROWS, least_shard_rows(count)), "batch_size": BATCH}
    given = {"image_size": 256, "preprocessing": "none", "data_source": "none", "data_bytes": 0}
    return Plan(**stored, **cut, **given, vae=vae, data_fingerprint="0" * 64)


def other_format(path: Path, cache: LatentCache, count: int) -> LatentCache:
    """The first `count` images of `cache` in the format that it does not have."""
    format_ = "webdataset" if cache.manifest.format == "zarr" else "zarr"
    plan = Plan(**{**dict(cache.manifest.plan()), "format": format_, "rows": count})
    return write_cache(path, plan, cache.keys()[:count], cache.labels[:count], cache.read)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own: threads and memory of others do not count against it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def warm(path: Path) -> None:
    """Read every file once, so that it lies in the page cache."""
    for file in filter(Path.is_file, path.rglob("*")):
        file.read_bytes()


def check(batch: Tensor, plan: Plan, sums: NDArray[np.uint32]) -> None:
    """AssertionError unless these are `BATCH` samples in one piece of memory and, given `sums`, the right ones."""
    assert batch.is_contiguous()
    assert (batch.shape, batch.dtype) == ((BATCH, *plan.row_shape), getattr(torch, plan.dtype)), batch.shape
    found = np.unique([zlib.crc32(sample) for sample in batch.numpy()])
    assert len(found) > BATCH // 2, "the same samples again"  # some, where two epochs meet
    assert not len(sums) or np.isin(found, sums).all(), "other samples"


def measure(method: Method, seconds: float, plan: Plan, sums: NDArray[np.uint32]) -> float:
    """Samples/s."""
    warm(method.path)
    batches = method.batches(method.path)
    used, started = 1, time.perf_counter()
    check(next(batches), plan, sums)
    while used % method.period or time.perf_counter() - started < WARM_UP:
        next(batches)
        used += 1
    samples, used, started = 0, 0, time.perf_counter()
    while used % method.period or time.perf_counter() - started < seconds:
        samples += len(next(batches))
        used += 1
    return samples / (time.perf_counter() - started)


def footprint(path: Path) -> dict[str, float]:
    """Seconds to open a cache (median of three), KiB by which RssAnon grows in `STEPS` random batches of `mapped`."""
    times = [time.perf_counter()]
    for _ in range(3):
        LatentCache(path)
        times.append(time.perf_counter())
    before = proc("self/status", "RssAnon")
    for _ in itertools.islice(read_ours(path, "mapped"), STEPS):
        pass
    growth = int(proc("self/status", "RssAnon").split()[0]) - int(before.split()[0])
    return {"opening_seconds": float(np.median(np.diff(times))), "rss_anon_growth_kib": growth}


def proc(file: str, name: str) -> str:
    lines = Path("/proc", file).read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(name))


def measure_set(cache: LatentCache, other: LatentCache | None, folder: Path, subset: int, timing: dict) -> dict:
    """All figures of one cache; what the methods need besides it is written into `folder`."""
    manifest, count = cache.manifest, min(len(cache), subset)
    row = "x".join(str(side) for side in manifest.row_shape)
    print(f"\n{len(cache):,} samples of {row} {manifest.dtype}, {manifest.row_bytes:,} bytes each", flush=True)
    caches = [cache, other or other_format(folder / "other", cache, count)]
    samples = cache.read(np.arange(count))
    methods = [*methods_of(caches[0]), *methods_of(caches[1]), *write_peers(folder, samples)]
    sums = np.array([zlib.crc32(sample) for sample in samples], np.uint32)
    del samples
    rates: dict[str, list[float]] = {method.name: [] for method in methods}
    for number, method in itertools.product(range(timing["rounds"]), methods):
        known = sums if method.samples == count else sums[:0]
        rates[method.name].append(in_process(measure, method, timing["seconds"], manifest.plan(), known))
        print(f"round {number + 1}  {method.name:22} {rates[method.name][-1]:12,.0f} samples/s", flush=True)
    figures = report(methods, rates, manifest.row_bytes)
    footprints = {each.manifest.format: in_process(footprint, each.path) for each in caches}
    for each, (seconds, kib) in zip(caches, (each.values() for each in footprints.values()), strict=True):
        print(f"{len(each):,} samples as {each.manifest.format}: opened in {seconds:.4f} s,", end=" ")
        print(f"RssAnon grows by {kib / 1024:.1f} MiB in {STEPS:,} mapped batches")
    return {"rows": len(cache), "row": row, "dtype": manifest.dtype, **figures, "caches": footprints}


def methods_of(cache: LatentCache) -> Iterator[Method]:
    """What reads the files of a cache: all accesses for which there is memory, and the plain library."""
    size, format_ = len(cache) * cache.manifest.row_bytes, cache.manifest.format
    window = min(WINDOW_ROWS, len(cache), WINDOW_BYTES // cache.manifest.row_bytes)
    for access, period in {"resident": 1, "mapped": 1, "streamed": max(window // BATCH, 1)}.items():
        if access != "resident" or size < 0.8 * psutil.virtual_memory().available:
            reader = functools.partial(read_ours, access=access)
            yield Method(f"{access}, {format_}", cache.path, len(cache), reader, ours=True, period=period)
        else:
            print(f"{access}, {format_}: left out, {size / 1e9:.1f} GB do not fit into memory")
    plain = {"zarr": read_zarr, "webdataset": read_webdataset}[format_]
    yield Method(f"plain {format_}", cache.path, len(cache), plain)


def report(methods: list[Method], rates: dict[str, list[float]], row_bytes: int) -> dict[str, Any]:
    """Print the table; its figures. The ratios are of medians, ours by the other's."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    names, rivals = [m.name for m in methods if m.ours], [m.name for m in methods if not m.ours]
    ratios = {rival: {name: medians[name] / medians[rival] for name in names} for rival in rivals}
    print(f"\n{'':22} {'samples':>10} {'samples/s':>11} {'least':>11} {'most':>11} {'MB/s':>7}")
    for name, _, count, *_ in methods:
        rate = f"{medians[name]:11,.0f} {min(rates[name]):11,.0f} {max(rates[name]):11,.0f}"
        print(f"{name:22} {count:10,} {rate} {medians[name] * row_bytes / 1e6:7,.0f}")
    print(f"\n{'ours / theirs':22}", *(f"{name:>21}" for name in names))
    for rival in rivals:
        print(f"{rival:22}", *(f"{ratios[rival][name]:21,.1f}" for name in names))
    held = {method.name: method.samples for method in methods}
    return {"samples": held, "samples_per_second": rates, "medians": medians, "ours_by_theirs": ratios}


def surroundings() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    versions |= {each.name: each.version for each in distributions() if each.name in PACKAGES}
    hardware = {"cpu": proc("cpuinfo", "model name"), "cores": os.cpu_count(), "memory": proc("meminfo", "MemTotal")}
    return {"versions": versions, "hardware": hardware, "torch_threads": torch.get_num_threads(), "batch_size": BATCH}


@click.command(help=__doc__)
@click.option("--cache", type=click.Path(path_type=Path, exists=True), help="A finished cache.")
@click.option(
    "--other", type=click.Path(path_type=Path, exists=True), help="It in the other format; made if not given."
)
@click.option("--synthetic", type=click.IntRange(BATCH), help="Also measure on a cache of so many rows of noise.")
@click.option("--subset", default=100_000, show_default=True, help="Samples that the others hold at most.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="A method, a round.")
@click.option("--json", "result", type=click.Path(path_type=Path), help="Also write all figures to this file.")
def main(cache: Path | None, other: Path | None, synthetic: int | None, subset: int, **timing: Any) -> None:
    result: Path | None = timing.pop("result")
    figures = surroundings() | timing
    print(json.dumps(figures))
    with tempfile.TemporaryDirectory() as inside:
        if cache:
            pair = LatentCache(cache), LatentCache(other) if other else None
            figures["cache"] = measure_set(*pair, Path(inside) / "given", subset, timing)
        if synthetic:
            noise = synthetic_cache(Path(inside) / "noise", synthetic)
            figures["synthetic"] = measure_set(noise, None, Path(inside) / "made", subset, timing)
    if result:
        result.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
