"""Declares the two formats of a latent cache and the interface that each of them implements."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.cache import webdataset_format, zarr_format
from data.cache.manifest import Plan
from data.cache.mapping import Layout


class ShardFormat(Protocol):
    """Encodes rows to the bytes of shard files; modules such as `data.cache.zarr_format` implement this interface."""

    FOLDER: str  # holds the shards
    LABELS: str  # file with the label of every row
    OTHER_FILES: tuple[str, ...]  # all files of the format except the shards
    KEEPS_FAILED: bool  # whether a failed row keeps its position in the shard

    def layout(self, plan: Plan) -> Layout:
        """Return the layout of rows in a shard."""
        ...

    def shard_file(self, number: int) -> str:
        """Return the name of a shard's file, relative to the cache folder."""
        ...

    def shard_size(self, plan: Plan, rows: int) -> int:
        """Return the size in bytes of a shard with that many rows."""
        ...

    def encode_shard(self, plan: Plan, number: int, values: NDArray[np.floating], labels: NDArray[np.int64]) -> bytes:
        """Encode a shard with `values` `n V 2C h w` and `labels` `n`."""
        ...

    def other_files(self, plan: Plan, labels: NDArray[np.int64]) -> dict[str, bytes]:
        """Return the contents of `OTHER_FILES`; `labels` are those of all rows."""
        ...

    def decode_labels(self, payload: bytes) -> NDArray[np.int64]:
        """Decode the labels of all rows from the bytes of the file `LABELS`."""
        ...


FORMATS: dict[str, ShardFormat] = {"zarr": zarr_format, "webdataset": webdataset_format}
