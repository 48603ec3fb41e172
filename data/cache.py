"""The latent cache: a manifest beside a zarr v3 group with `moments[N, V, 2C, h, w]` and `label[N]`.

One row is one listed image, so a row's place is known before anything is encoded. An image that could not be read
leaves NaN moments and the label -1 in its row, and its reason in the manifest; `LatentCache` passes such rows over.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from data.manifest import MANIFEST, Failure, Manifest, Plan, Shard, first_difference
from data.source import printable
from data.storage import publish, publish_json, remove, sha256_file

CHUNK_ROWS = 16  # rows under one checksum
SHARD_ROWS = 1024  # rows a file
_GROUP = "latents.zarr"
_INDEX = "rows.jsonl"
_PLAN = "plan.json"
_RECORDS = "records"
_PROVENANCE = {"batch_size", "data_source", "source"}  # recorded, but what they led to is pinned by the other fields


class CacheWriter:
    """Writes the shards that a cache still lacks; a crash at any point loses the shard at hand and no other."""

    def __init__(self, path: Path, plan: Plan, keys: Sequence[str], labels: NDArray[np.int64]) -> None:
        """Start or continue the cache at `path`. ValueError names the field in which what lies there differs."""
        assert len(keys) == len(labels) == plan.rows
        self.path, self.plan, self.keys, self.labels = path, plan, keys, labels
        self._check_existing()
        if not (path / _PLAN).exists() and not self.done:
            publish_json(path / _PLAN, plan.model_dump(mode="json"))

    @property
    def done(self) -> bool:
        return (self.path / MANIFEST).exists()

    def pending(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        count = -(-self.plan.rows // self.plan.shard_rows)
        return [] if self.done else [i for i in range(count) if not self._record_file(i).exists()]

    def rows_of(self, shard: int) -> range:
        """The rows that shard number `shard` holds."""
        start = shard * self.plan.shard_rows
        return range(start, min(start + self.plan.shard_rows, self.plan.rows))

    def write(self, shard: int, moments: NDArray[np.floating], failures: dict[int, str]) -> None:
        """Publish one shard: `moments` are `rows V 2C h w`, `failures` maps a row to its reason.

        Rows with values that are not finite in the cache's type become failures: they are never committed.
        """
        rows = self.rows_of(shard)
        with np.errstate(over="ignore"):  # what overflows is found below and becomes a failure
            values = moments.astype(self.plan.dtype)
        broken = ~np.isfinite(values).all(axis=(1, 2, 3, 4))
        reasons = {rows[i]: "the VAE's output is NaN or infinite" for i in np.flatnonzero(broken)} | failures
        good = np.array([row not in reasons for row in rows])
        values[~good] = np.nan
        file, payload = _encode_shard(self.plan, rows, values)
        publish(self.path / file, payload)
        total, squares, count = _sums(self.plan, values[good])
        record = Shard(
            file=file,
            start=rows.start,
            rows=len(rows),
            size=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
            values=count,
            total=tuple(total),
            squares=tuple(squares),
            failures=tuple(
                Failure(row=r, key=printable(self.keys[r]), reason=printable(reasons[r])) for r in sorted(reasons)
            ),
        )
        publish_json(self._record_file(shard), record.model_dump(mode="json"))

    def finish(self) -> Manifest:
        """Write what is left once every shard is there, the manifest last."""
        if self.done:
            self._tidy()
            return Manifest.load(self.path)
        assert not self.pending()
        count = -(-self.plan.rows // self.plan.shard_rows)
        shards = [Shard.model_validate_json(self._record_file(i).read_bytes()) for i in range(count)]
        failed = sum(len(shard.failures) for shard in shards)
        if failed == self.plan.rows:
            first = next(failure for shard in shards for failure in shard.failures)
            for name in (_GROUP, _RECORDS, _PLAN):  # never the folder itself: it may hold what is not ours
                remove(self.path / name)
            raise ValueError(f"no image could be encoded: {first.key}: {first.reason}")
        labels = self.labels.copy()
        labels[[failure.row for shard in shards for failure in shard.failures]] = -1
        for name, payload in _metadata(self.plan, labels).items():
            publish(self.path / _GROUP / name, payload)
        lines = (json.dumps({"row": row, "key": key, "label": int(labels[row])}) for row, key in enumerate(self.keys))
        publish(self.path / _INDEX, "".join(line + "\n" for line in lines).encode())
        mean, std = _merge(shards)
        manifest = Manifest(
            **dict(self.plan),
            committed=self.plan.rows - failed,
            failed=failed,
            mean=mean,
            std=std,
            shards=tuple(shards),
        )
        manifest.save(self.path)
        self._tidy()
        return manifest

    def _tidy(self) -> None:
        remove(self.path / _RECORDS)
        remove(self.path / _PLAN)

    def _record_file(self, shard: int) -> Path:
        return self.path / _RECORDS / f"{shard:06d}.json"

    def _check_existing(self) -> None:
        found: Plan
        if self.done:
            found = Manifest.load(self.path)
        elif (self.path / _PLAN).exists():
            found = Plan.model_validate_json((self.path / _PLAN).read_bytes())
        elif self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ValueError(
                f"{self.path}: this folder has files, but is no latent cache: choose an empty or a new one"
            )
        else:
            return
        difference = first_difference(self.plan, found, ignored=_PROVENANCE)
        if difference:
            name, ours, theirs = (_short(part) for part in difference)
            raise ValueError(
                f"{self.path}: the cache there has {name} = {theirs}, this run has {ours}:"
                " choose another folder (cache.path for encode) or delete this one"
            )


class LatentCache:
    """Reads a finished cache. Index i is the i-th committed image; rows that failed are not counted."""

    def __init__(self, path: Path) -> None:
        """Open the cache at `path`, checking that every shard is there with its size; ValueError names what is not."""
        self.path = path
        self.manifest = Manifest.load(path)
        self._shards = [self._map(shard) for shard in self.manifest.shards]
        failed = np.array([failure.row for failure in self.manifest.failures], np.int64)
        self.rows = np.setdiff1d(np.arange(self.manifest.rows), failed)
        labels = zarr.open_array(path / _GROUP / "label", mode="r", zarr_format=3)
        self.labels: NDArray[np.int64] = np.asarray(labels[:])[self.rows]
        if (self.labels < 0).any():
            raise ValueError(f"{path / _GROUP / 'label'}: labels of committed images are missing; encode again")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """Moments of the images `indices` in their order: `n V 2C h w` in the cache's type."""
        rows = self.rows[indices]
        out = np.empty((len(rows), len(self.manifest.views), *self.manifest.shape), self.manifest.dtype)
        shards, places = np.divmod(rows, self.manifest.shard_rows)
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            out[mine] = self._shards[shard]["rows"][np.divmod(places[mine], CHUNK_ROWS)]
        return out

    def keys(self) -> list[str]:
        """The key of every committed image."""
        with open(self.path / _INDEX, encoding="utf-8") as lines:
            keys = [json.loads(line)["key"] for line in lines]
        return [keys[row] for row in self.rows]

    def verify(self) -> None:
        """Compare every shard with its SHA-256; ValueError names the first that differs."""
        for shard in self.manifest.shards:
            if sha256_file(self.path / shard.file) != shard.sha256:
                raise ValueError(f"{self.path / shard.file}: damaged: its SHA-256 is not the manifest's; encode again")

    def _map(self, shard: Shard) -> NDArray[np.void]:
        """Map a shard's chunks into memory: each is `CHUNK_ROWS` rows and a checksum of 4 bytes, in order."""
        file = self.path / shard.file
        if not file.is_file():
            raise ValueError(f"{file}: missing: {shard.rows} rows of the cache are gone; encode again")
        size = file.stat().st_size
        if size != shard.size:
            raise ValueError(f"{file}: {size} bytes, the manifest says {shard.size}; encode again")
        row = (CHUNK_ROWS, len(self.manifest.views), *self.manifest.shape)
        chunk = np.dtype([("rows", self.manifest.dtype, row), ("crc32c", "<u4")])
        return np.memmap(file, dtype=chunk, mode="r", shape=(-(-shard.rows // CHUNK_ROWS),))


def _create(plan: Plan) -> tuple[MemoryStore, zarr.Array, zarr.Array]:
    """An empty cache in memory: its store, `moments` and `label`."""
    store = MemoryStore()
    group = zarr.create_group(store, zarr_format=3)
    row = (len(plan.views), *plan.shape)
    moments = group.create_array(
        "moments",
        shape=(plan.rows, *row),
        dtype=plan.dtype,
        chunks=(CHUNK_ROWS, *row),
        shards=(plan.shard_rows, *row),
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],  # latents are noise to a compressor, and plain chunks can be memory-mapped
        fill_value=float("nan"),
        dimension_names=("row", "view", "channel", "y", "x"),
        config={"write_empty_chunks": True},  # a chunk of failures is NaN throughout, and still has its place
    )
    label = group.create_array(
        "label", shape=(plan.rows,), dtype="int64", chunks=(plan.rows,), fill_value=-1, compressors=[Crc32cCodec()]
    )
    return store, moments, label


def _encode_shard(plan: Plan, rows: range, values: NDArray[np.floating]) -> tuple[str, bytes]:
    """File name and bytes of one shard, made by zarr in memory so that this project's storage publishes them."""
    store, moments, _ = _create(plan)
    moments[rows.start : rows.stop] = values
    key = f"moments/c/{rows.start // plan.shard_rows}/0/0/0/0"
    return f"{_GROUP}/{key}", _bytes_of(store, key)


def _metadata(plan: Plan, labels: NDArray[np.int64]) -> dict[str, bytes]:
    """Every file of the group but the shards of `moments`."""
    store, _, label = _create(plan)
    label[:] = labels
    return {key: _bytes_of(store, key) for key in ("label/c/0", "label/zarr.json", "moments/zarr.json", "zarr.json")}


def _bytes_of(store: MemoryStore, key: str) -> bytes:
    buffer = asyncio.run(store.get(key, default_buffer_prototype()))
    assert buffer is not None, key
    return buffer.to_bytes()


def _sums(plan: Plan, values: NDArray[np.floating]) -> tuple[list[float], list[float], int]:
    """Sums over rows, views and positions of the posterior's first and second moments, one a latent channel."""
    channels = plan.latent_channels
    mean = values[:, :, :channels].astype(np.float64)
    second = mean**2
    if plan.store == "moments":
        second += values[:, :, channels:].astype(np.float64) ** 2
    axes = (0, 1, 3, 4)
    return mean.sum(axes).tolist(), second.sum(axes).tolist(), mean.size // channels


def _merge(shards: Sequence[Shard]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel over all shards."""
    count = sum(shard.values for shard in shards)
    mean = np.sum([shard.total for shard in shards], axis=0) / count
    variance = np.sum([shard.squares for shard in shards], axis=0) / count - mean**2
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(variance, 0)).tolist())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
