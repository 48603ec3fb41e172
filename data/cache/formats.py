"""The two formats of a latent cache, and what a format has to offer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.cache import webdataset_format, zarr_format
from data.cache.manifest import Plan
from data.cache.mapping import Layout


class ShardFormat(Protocol):
    """How rows become the bytes of shard files: a module such as `data.cache.zarr_format`."""

    FOLDER: str  # of the shards
    LABELS: str  # the file with the label of every row
    OTHER_FILES: tuple[str, ...]  # all files of the format but the shards
    KEEPS_FAILED: bool  # whether a row that failed has a place in its shard

    def layout(self, plan: Plan) -> Layout:
        """Where a row lies in a shard."""
        ...

    def shard_file(self, number: int) -> str:
        """The name of a shard's file in the folder of the cache."""
        ...

    def shard_size(self, plan: Plan, rows: int) -> int:
        """Bytes of a shard of that many rows."""
        ...

    def encode_shard(self, plan: Plan, number: int, values: NDArray[np.floating], labels: NDArray[np.int64]) -> bytes:
        """The bytes of a shard of `values` `n V 2C h w` and `labels` `n`."""
        ...

    def other_files(self, plan: Plan, labels: NDArray[np.int64]) -> dict[str, bytes]:
        """The contents of `OTHER_FILES`; `labels` are those of all rows."""
        ...

    def decode_labels(self, payload: bytes) -> NDArray[np.int64]:
        """The labels of all rows from the bytes of the file `LABELS`."""
        ...


FORMATS: dict[str, ShardFormat] = {"zarr": zarr_format, "webdataset": webdataset_format}
