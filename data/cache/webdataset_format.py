"""Stores the cache as a webdataset: tar shards with `<row>.cls` and `<row>.moments.npy` for every committed row."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from data.cache.manifest import FAILED, Plan
from data.cache.mapping import Layout

FOLDER = "shards"
LABELS = "labels.npy"
OTHER_FILES: tuple[str, ...] = (LABELS,)
KEEPS_FAILED = False  # a webdataset has no empty places
_BLOCK = 512  # tar pads every header and every member to a multiple of it
_NPY_HEADER = 128


def layout(plan: Plan) -> Layout:
    """Return the layout: header, class, header and array of a row are padded to whole blocks, so rows have one size."""
    return Layout(rows=1, lead=3 * _BLOCK + _NPY_HEADER, trail=-(_NPY_HEADER + plan.row_bytes) % _BLOCK)


def shard_file(number: int) -> str:
    return f"{FOLDER}/{number:06d}.tar"


def shard_size(plan: Plan, rows: int) -> int:
    """Return the bytes of a shard with that many rows: a tar ends with two empty blocks, padded to 20 blocks."""
    record = 20 * _BLOCK
    return -(-(layout(plan).size(plan, rows) + 2 * _BLOCK) // record) * record


def encode_shard(plan: Plan, number: int, values: NDArray[np.floating], labels: NDArray[np.int64]) -> bytes:
    """Encode one shard; failed rows are left out."""
    import webdataset

    buffer = io.BytesIO()
    start = plan.rows_of(number).start
    writer = webdataset.TarWriter(buffer, mtime=0, encoder=False)
    for place in np.flatnonzero(labels != FAILED):
        array = io.BytesIO()
        np.lib.format.write_array(array, values[place], allow_pickle=False)
        members = {"cls": str(labels[place]).encode(), "moments.npy": array.getvalue()}
        writer.write({"__key__": f"{start + place:09d}", **members})
    writer.close()
    return buffer.getvalue()


def other_files(plan: Plan, labels: NDArray[np.int64]) -> dict[str, bytes]:
    """Return all labels in one file: collecting them from the shards would mean reading the shards whole."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, labels.astype("<i8"), allow_pickle=False)
    return {LABELS: buffer.getvalue()}


def decode_labels(payload: bytes) -> NDArray[np.int64]:
    """Decode `label[N]` from the bytes of its file, whose SHA-256 was checked."""
    return np.frombuffer(payload[_NPY_HEADER:], "<i8").astype(np.int64)
