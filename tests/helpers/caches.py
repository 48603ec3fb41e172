"""Small latent caches and what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.cache.listing import Rows
from data.cache.manifest import Plan
from data.cache.reader import LatentCache
from data.cache.writer import CacheWriter, EncodedShard
from data.storage import sha256_file

Moments = NDArray[np.floating]


EVERY = np.arange(75)  # all rows of `plan`


def write_shard(writer: CacheWriter, shard: int, moments: Moments, failures: Mapping[int, str]) -> None:
    rows = writer.plan.rows_of(shard)
    mine = {row: reason for row, reason in failures.items() if row in rows}
    writer.write(EncodedShard(shard, np.array(rows), moments[rows.start : rows.stop], mine))


def write(
    path: Path, plan: Plan, rows: Rows, moments: Moments, failures: Mapping[int, str] | None = None, step: int = 1
) -> LatentCache:
    """The whole cache; with the step -1 its last shard first."""
    writer = CacheWriter(path, plan, rows)
    with writer.claimed():
        for shard in writer.pending()[::step]:
            write_shard(writer, shard, moments, failures or {})
        writer.finish()
    return LatentCache(path)


def changed(plan: Plan, **changes: Any) -> Plan:
    return Plan(**(plan.model_dump() | changes))


def files(folder: Path) -> dict[str, str]:
    """Hash of every file, hidden ones included."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}
