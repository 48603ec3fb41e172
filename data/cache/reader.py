"""Reads a latent cache: a manifest beside shards of moments, in zarr v3 or as a webdataset (docs/cache-format.md).

Each row is one listed image, so its position is known before anything is encoded. An image that could not be read has
the label -1 in its row and a reason in failures.jsonl; index i of a cache is its i-th committed row.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.cache.formats import FORMATS
from data.cache.manifest import FAILED, Draft, File, Manifest, Shard
from data.sources.base import NO_CLASS
from data.storage import read

_REMEDY = "run `latentmill verify --repair` to encode it again; for samples, delete their folder and sample again"
SHARD_ROWS = 1024  # rows per file, except in very large caches
_MAX_SHARDS = 2**14  # all are memory-mapped, often for two caches; Linux allows a process 65,530 mappings
ROWS = "rows.jsonl"  # which image each row came from
FAILURES = "failures.jsonl"  # which images have no latents, and why
DIGESTS = "digests.txt"  # digest of the image file of every row, one per line


class LatentCache:
    """Reads a finished cache. Index i is the i-th committed image; failed rows are not counted."""

    def __init__(self, path: Path) -> None:
        """Open the cache at `path` after checking that every file has the size that manifest and format require.

        ValueError names the file and what is wrong. No shard is read: `verify` compares their checksums.
        """
        self.path = path
        self.manifest = Manifest.load(path)
        self._format = FORMATS[self.manifest.format]
        self._check_sizes()
        payload = read_verified_file(path, self.manifest, self._format.LABELS)
        labels: NDArray[np.int64] = self._format.decode_labels(payload)
        self.rows = np.flatnonzero(labels != FAILED)
        shards, shard = self.manifest.shards, self.rows // self.manifest.shard_rows
        committed = np.bincount(shard, minlength=len(shards))
        if len(labels) != self.manifest.rows or committed.tolist() != [s.rows - s.failed for s in shards]:
            raise ValueError(f"{path / self._format.LABELS}: its labels do not fit the manifest: {_REMEDY}")
        self.labels = labels[self.rows]
        before = np.cumsum(committed) - committed  # committed images before each shard
        packed = np.arange(len(self.rows)) - before[shard]
        self._places = self.rows % self.manifest.shard_rows if self._format.KEEPS_FAILED else packed
        self._layout = self._format.layout(self.manifest)
        self._verified: set[int] = set()  # numbers of shards

    @functools.cached_property
    def _moments(self) -> NDArray[np.floating]:
        """Return all shards, memory-mapped on first use."""
        return self._layout.map([self.path / shard.file for shard in self.manifest.shards], self.manifest)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """Gather the moments of the images `indices`, in that order: `n V 2C h w` in the cache's dtype; unverified."""
        blocks, rows = np.divmod(self._places[indices], self._layout.rows)
        return self._moments[self.rows[indices] // self.manifest.shard_rows, blocks, rows]

    def load(self, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """Gather as `read` does, but from whole shards and without mapping them: for adjacent images, and for disks
        that may be disconnected, which raises OSError here but kills a process that maps them. ValueError if a shard
        has another size."""
        shard = self.rows[indices] // self.manifest.shard_rows
        moments = np.empty((len(indices), *self.manifest.row_shape), self.manifest.dtype)
        for number in np.unique(shard):
            mine, entry = np.flatnonzero(shard == number), self.manifest.shards[number]
            payload, places = read(self.path / entry.file), self._places_of(entry)
            if (size := len(payload)) != entry.size:
                raise ValueError(f"{self.path / entry.file}: {size} bytes, expected {entry.size}: {_REMEDY}")
            blocks, rows = np.divmod(self._places[indices[mine]], self._layout.rows)
            moments[mine] = self._layout.view(payload, self.manifest, places)[blocks, rows]
        return moments

    def read_verified(self, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """Gather as `read` does, after comparing the SHA-256 of every shard that is read for the first time.

        ValueError names a damaged shard.
        """
        for number in sorted(set((self.rows[indices] // self.manifest.shard_rows).tolist()) - self._verified):
            self._check(self.manifest.shards[number])
            self._verified.add(number)
        return self.read(indices)

    def means(self, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """Gather the posterior means of the first view, `n C h w` in the cache's dtype, as `read_verified` does."""
        return self.read_verified(indices)[:, 0, : self.manifest.latent_channels]

    def class_counts(self) -> NDArray[np.int64]:
        """Count the committed images of every class; images without a class are not counted."""
        return np.bincount(self.labels[self.labels != NO_CLASS], minlength=len(self.manifest.classes))

    def named_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return labels and class names for display: images without a class get one more name, `no class`."""
        classes = self.manifest.classes
        return np.where(self.labels == NO_CLASS, len(classes), self.labels), (*classes, "no class")

    def keys(self) -> list[str]:
        """Return the key of every committed image."""
        keys = [line["key"] for line in self.lines(ROWS)]
        return [keys[row] for row in self.rows]

    def shard_of(self, index: int) -> Shard:
        """Return the shard that holds image number `index`."""
        return self.manifest.shards[self.rows[index] // self.manifest.shard_rows]

    def digests(self) -> list[str]:
        """Return the digest of every row's image file; empty if the row failed or there is no file."""
        return read_verified_file(self.path, self.manifest, DIGESTS).decode().split("\n")[:-1]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of `rows.jsonl` or `failures.jsonl`, after checking its SHA-256."""
        return [json.loads(line) for line in read_verified_file(self.path, self.manifest, name).splitlines()]

    def verify(self) -> None:
        """Read all bytes; ValueError names the first file that is missing or damaged."""
        for file in (*self.manifest.shards, *self.manifest.files):
            self._check(file)

    def _check(self, file: File) -> None:
        if problem := file.problem(self.path):
            raise ValueError(f"{self.path / file.file}: {problem}: {_REMEDY}")

    def _places_of(self, shard: Shard) -> int:
        """Return how many rows the file of a shard holds."""
        return shard.rows if self._format.KEEPS_FAILED else shard.rows - shard.failed

    def _check_sizes(self) -> None:
        """Check names and sizes, which follow from the format and the plan, before anything is allocated or opened."""
        manifest = self.manifest
        others = sorted(file.file for file in manifest.files)
        if others != sorted([*self._format.OTHER_FILES, ROWS, FAILURES, DIGESTS]):
            raise ValueError(f"{self.path}: files = {others}: not those of a {manifest.format} cache")
        for number, shard in enumerate(manifest.shards):
            places = self._places_of(shard)
            expected = (self._format.shard_file(number), self._format.shard_size(manifest, places))
            if (shard.file, shard.size) != expected:
                raise ValueError(
                    f"{self.path}: shards.{number} = {shard.file}, {shard.size} bytes: {places} rows of"
                    f" {manifest.row_shape} {manifest.dtype} would be {expected[0]}, {expected[1]} bytes"
                )
        for file in (*manifest.shards, *manifest.files):
            if problem := file.size_problem(self.path):
                raise ValueError(f"{self.path / file.file}: {problem}: {_REMEDY}")


def least_shard_rows(rows: int) -> int:
    """Return the smallest power of two of rows per shard for which all shards of `rows` rows can be memory-mapped."""
    return 1 << (-(-rows // _MAX_SHARDS) - 1).bit_length()


def read_verified_file(path: Path, plan: Manifest | Draft, name: str) -> bytes:
    """Read a small file of the cache at `path`; ValueError unless its SHA-256 is recorded in the manifest or draft."""
    file = path / name
    payload = read(file) if file.is_file() else None
    if payload is None or File.of(name, payload) not in plan.files:
        remedy = _REMEDY if isinstance(plan, Manifest) else f"delete {path} and create it again"
        problem = "missing" if payload is None else "damaged: its SHA-256 is not the recorded one"
        raise ValueError(f"{file}: {problem}: {remedy}")
    return payload
