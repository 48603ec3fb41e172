"""What grows with the number of rows of a cache: opening it, the order of an epoch, memory; not the disk.

    python -m benchmarks.large_cache [--rows 100000000] [--seconds 15]

The cache's files have all their size and no contents, so that 819 GB of latents lie on any disk. Prints how long it
takes to open, to have the first batch of 256, samples/s from then on, and the memory that is held, for both ways of
reading a cache that has no room in memory.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.loader import BATCH, in_process, noise_plan, proc, read_ours
from data.cache import zarr_format
from data.cache.manifest import File, Manifest, Shard
from data.cache.reader import DIGESTS, FAILURES, ROWS


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(BATCH), default=100_000_000, show_default=True)
@click.option("--seconds", default=15.0, show_default=True, help="Reading, each way.")
def main(rows: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as inside:
        cache = Path(inside) / "cache"
        sparse_cache(cache, rows)
        print(f"{rows:,} samples of 4x32x32 float16, {rows * 8192 / 1e9:,.0f} GB", flush=True)
        for access in ("mapped", "streamed"):
            each = in_process(measure, cache, access, seconds)
            print(
                f"{access:10} opened in {each['opening']:.1f} s, first batch after {each['first']:.1f} s more, then"
                f" {each['rate']:,.0f} samples/s; {each['held'] / 1e9:.1f} GB held",
                flush=True,
            )


def sparse_cache(path: Path, count: int) -> None:
    """A cache of `count` rows of zeros whose files, but for its labels, take no disk and were never hashed."""
    plan = noise_plan(count)

    def hollow(name: str, size: int) -> dict[str, Any]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with open(path / name, "wb") as file:
            file.truncate(size)
        return {"file": name, "size": size, "sha256": "0" * 64}

    def shard(number: int) -> Shard:
        rows, sums = len(plan.rows_of(number)), (0.0,) * plan.latent_channels
        file = hollow(zarr_format.shard_file(number), zarr_format.shard_size(plan, rows))
        return Shard(**file, rows=rows, failed=0, values=rows, total=sums, squares=sums)

    shards = tuple(shard(number) for number in range(plan.shard_count))
    names = {ROWS, FAILURES, DIGESTS, *zarr_format.OTHER_FILES} - {zarr_format.LABELS}
    labels = bytes(8 * count + 4)  # the class 0 of every row, and a checksum that only zarr looks at
    (path / zarr_format.LABELS).parent.mkdir(parents=True)
    (path / zarr_format.LABELS).write_bytes(labels)
    files = (File.of(zarr_format.LABELS, labels), *(File(**hollow(name, 1)) for name in sorted(names)))
    moments = {"mean": (0.0,) * plan.latent_channels, "std": (1.0,) * plan.latent_channels}
    Manifest(**dict(plan), committed=count, failed=0, **moments, shards=shards, files=files).save(path)


def measure(path: Path, access: str, seconds: float) -> dict[str, float]:
    """Seconds to open the cache and to its first batch, samples/s from then on, and bytes of memory that are held."""
    before, times = proc("self/status", "RssAnon"), [time.perf_counter()]
    batches = read_ours(path, access)
    times.append(time.perf_counter())
    next(batches)
    times.append(time.perf_counter())
    used = 0
    while time.perf_counter() - times[-1] < seconds:
        next(batches)
        used += 1
    rate = used * BATCH / (time.perf_counter() - times[-1])
    held = 1024 * (int(proc("self/status", "RssAnon").split()[0]) - int(before.split()[0]))
    opened, first = np.diff(times)
    return {"opening": opened, "first": first, "rate": rate, "held": held}


if __name__ == "__main__":
    main()
