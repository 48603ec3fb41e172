"""Convert a latent cache to the other of the two formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.cache.listing import Rows
from data.cache.manifest import Plan
from data.cache.reader import FAILURES, LatentCache
from data.cache.writer import CacheWriter, EncodedShard
from data.storage import probe


def convert(source: Path, target: Path, format_: str | None) -> None:
    """Write the cache at `source` to `target` in `format_`, by default the other of the two.

    Latents, labels, keys, failures and statistics stay the same; converting back gives the original bytes.
    """
    cache = LatentCache(source)
    cache.verify()
    manifest = cache.manifest
    other = "webdataset" if manifest.format == "zarr" else "zarr"
    plan = Plan(**{**dict(manifest.plan()), "format": format_ or other})
    writer = CacheWriter(target, plan, Rows.load(source, manifest))
    if writer.is_done():
        LatentCache(target).verify()
        print(f"convert: all done: {target}")
        return
    probe(target, "TARGET")
    failures = {line["row"]: line["reason"] for line in cache.lines(FAILURES)}
    digests = dict(enumerate(cache.digests()))
    with writer.claimed():
        for shard in tqdm(writer.pending(), desc="convert", unit=" shards", mininterval=1):
            rows = np.array(plan.rows_of(shard))
            start, stop = np.searchsorted(cache.rows, [rows[0], rows[-1] + 1])
            moments = np.full((len(rows), *plan.row_shape), np.nan, plan.dtype)
            moments[cache.rows[start:stop] - rows[0]] = cache.read(np.arange(start, stop))
            mine = rows.tolist()
            failed = {row: failures[row] for row in mine if row in failures}
            writer.write(EncodedShard(shard, rows, moments, failed, {row: digests[row] for row in mine}))
        writer.finish()
    print(f"convert: {manifest.committed:,} images as {plan.format} in {target}")
