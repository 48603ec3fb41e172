"""Stores the cache in zarr v3: a group with `moments[N, V, 2C, h, w]`, sharded and checksummed, and `label[N]`."""

from __future__ import annotations

import asyncio

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from data.cache.manifest import FAILED, Plan
from data.cache.mapping import Layout

CHUNK_ROWS = 16  # rows per checksum
KEEPS_FAILED = True  # a failed row keeps its position, filled with NaN
FOLDER = "latents.zarr"
LABELS = f"{FOLDER}/label/c/0"
OTHER_FILES: tuple[str, ...] = (
    LABELS,
    f"{FOLDER}/label/zarr.json",
    f"{FOLDER}/moments/zarr.json",
    f"{FOLDER}/zarr.json",
)


def layout(plan: Plan) -> Layout:
    """Return the layout: uncompressed chunks in order, each followed by its CRC-32C."""
    return Layout(rows=CHUNK_ROWS, lead=0, trail=4)


def shard_file(number: int) -> str:
    return f"{FOLDER}/moments/c/{number}/0/0/0/0"


def shard_size(plan: Plan, rows: int) -> int:
    """Return the bytes of a shard with that many rows: its chunks, then 16 bytes of index per chunk, and a checksum."""
    return layout(plan).size(plan, rows) + 16 * (plan.shard_rows // CHUNK_ROWS) + 4


def encode_shard(plan: Plan, number: int, values: NDArray[np.floating], labels: NDArray[np.int64]) -> bytes:
    """Encode one shard with zarr in memory, for `data.storage` to publish. Failed rows are NaN."""
    store, moments, _ = _create(plan)
    values[labels == FAILED] = np.nan
    rows = plan.rows_of(number)
    moments[rows.start : rows.stop] = values
    return _bytes_of(store, shard_file(number))


def other_files(plan: Plan, labels: NDArray[np.int64]) -> dict[str, bytes]:
    """Return the contents of `OTHER_FILES`: all of the group except the shards."""
    store, _, label = _create(plan)
    label[:] = labels
    return {name: _bytes_of(store, name) for name in OTHER_FILES}


def decode_labels(payload: bytes) -> NDArray[np.int64]:
    """Decode `label[N]` from the bytes of its one chunk, whose SHA-256 was checked."""
    return np.frombuffer(payload[:-4], "<i8").astype(np.int64)


def _create(plan: Plan) -> tuple[MemoryStore, zarr.Array, zarr.Array]:
    """Create an empty cache in memory; return its store, `moments` and `label`."""
    store = MemoryStore()
    group = zarr.create_group(store, path=FOLDER, zarr_format=3)
    moments = group.create_array(
        "moments",
        shape=(plan.rows, *plan.row_shape),
        dtype=plan.dtype,
        chunks=(CHUNK_ROWS, *plan.row_shape),
        shards=(plan.shard_rows, *plan.row_shape),
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],  # latents do not compress, and plain chunks can be memory-mapped
        fill_value=float("nan"),  # what plain zarr reads where a shard is missing
        dimension_names=("row", "view", "channel", "y", "x"),
        config={"write_empty_chunks": True},  # a chunk of failed rows is all NaN and keeps its position
    )
    label = group.create_array(
        "label", shape=(plan.rows,), dtype="int64", chunks=(plan.rows,), fill_value=-1, compressors=[Crc32cCodec()]
    )
    return store, moments, label


def _bytes_of(store: MemoryStore, key: str) -> bytes:
    buffer = asyncio.run(store.get(key, default_buffer_prototype()))
    assert buffer is not None, key
    return buffer.to_bytes()
