"""Reads a latent cache: a manifest beside shards of moments, in zarr v3 or as a webdataset (docs/cache-format.md).

One row is one listed image, so a row's place is known before anything is encoded. An image that could not be read has
the label -1 in its row and its reason in failures.jsonl; index i of a cache is its i-th committed row.
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

_REMEDY = "`latentmill verify --repair` writes it anew; samples are drawn again where their folder was deleted"
SHARD_ROWS = 1024  # rows a file, but for very large caches
_MOST_SHARDS = 2**14  # all are mapped into memory, often of two caches, and Linux allows a process 65,530 mappings
ROWS = "rows.jsonl"  # which image each row came from
FAILURES = "failures.jsonl"  # which images have no latents, and why
DIGESTS = "digests.txt"  # of the image file of every row, a line each


class LatentCache:
    """A finished cache. Index i is the i-th committed image; rows that failed are not counted."""

    def __init__(self, path: Path) -> None:
        """Open the cache at `path` once every file has the size that manifest and format demand.

        ValueError names the file and what is wrong. No shard is read: `verify` compares their hashes.
        """
        self.path = path
        self.manifest = Manifest.load(path)
        self._format = FORMATS[self.manifest.format]
        self._check_sizes()
        labels: NDArray[np.int64] = self._format.decode_labels(verified(path, self.manifest, self._format.LABELS))
        self.rows = np.flatnonzero(labels != FAILED)
        shards, shard = self.manifest.shards, self.rows // self.manifest.shard_rows
        committed = np.bincount(shard, minlength=len(shards))
        if len(labels) != self.manifest.rows or committed.tolist() != [s.rows - s.failed for s in shards]:
            raise ValueError(f"{path / self._format.LABELS}: labels of other images than the manifest's: {_REMEDY}")
        self.labels = labels[self.rows]
        before = np.cumsum(committed) - committed  # images in the shards before each one
        packed = np.arange(len(self.rows)) - before[shard]
        self._places = self.rows % self.manifest.shard_rows if self._format.KEEPS_FAILED else packed
        self._layout = self._format.layout(self.manifest)
        self._verified: set[int] = set()  # numbers of shards

    @functools.cached_property
    def _moments(self) -> NDArray[np.floating]:
        """All shards, mapped into memory when the first of them is read so."""
        return self._layout.map([self.path / shard.file for shard in self.manifest.shards], self.manifest)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """Moments of the images `indices` in their order: `n V 2C h w` in the cache's type. No hash is compared."""
        blocks, rows = np.divmod(self._places[indices], self._layout.rows)
        return self._moments[self.rows[indices] // self.manifest.shard_rows, blocks, rows]

    def load(self, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """As `read`, from whole shards and without mapping them: for images that lie together, and for disks that may
        go away, which is an OSError here and the end of the process there. ValueError for a shard of another size."""
        shard = self.rows[indices] // self.manifest.shard_rows
        moments = np.empty((len(indices), *self.manifest.row_shape), self.manifest.dtype)
        for number in np.unique(shard):
            mine, entry = np.flatnonzero(shard == number), self.manifest.shards[number]
            payload, places = read(self.path / entry.file), self._places_of(entry)
            if (size := len(payload)) != entry.size:
                raise ValueError(f"{self.path / entry.file}: {size} bytes, {entry.size} were written: {_REMEDY}")
            blocks, rows = np.divmod(self._places[indices[mine]], self._layout.rows)
            moments[mine] = self._layout.view(payload, self.manifest, places)[blocks, rows]
        return moments

    def read_verified(self, indices: NDArray[np.int64]) -> NDArray[np.floating]:
        """`read`, once the hash of every shard that holds one of `indices` was compared, the first time it is read.

        ValueError names a shard that is not what was written.
        """
        for number in sorted(set((self.rows[indices] // self.manifest.shard_rows).tolist()) - self._verified):
            self._check(self.manifest.shards[number])
            self._verified.add(number)
        return self.read(indices)

    def class_counts(self) -> NDArray[np.int64]:
        """Committed images of every class; those that have none are in no count."""
        return np.bincount(self.labels[self.labels != NO_CLASS], minlength=len(self.manifest.classes))

    def named_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Labels and names of the classes, for people: images without a class are under one name more."""
        classes = self.manifest.classes
        return np.where(self.labels == NO_CLASS, len(classes), self.labels), (*classes, "no class")

    def keys(self) -> list[str]:
        """The key of every committed image."""
        keys = [line["key"] for line in self.lines(ROWS)]
        return [keys[row] for row in self.rows]

    def shard_of(self, index: int) -> Shard:
        """The file that the image number `index` lies in."""
        return self.manifest.shards[self.rows[index] // self.manifest.shard_rows]

    def digests(self) -> list[str]:
        """The digest of the image file of every row; empty where it failed, or there is no file."""
        return verified(self.path, self.manifest, DIGESTS).decode().split("\n")[:-1]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of `rows.jsonl` or `failures.jsonl`, whose hash is checked."""
        return [json.loads(line) for line in verified(self.path, self.manifest, name).splitlines()]

    def verify(self) -> None:
        """Read all bytes; ValueError names the first file that is missing or not what was written."""
        for file in (*self.manifest.shards, *self.manifest.files):
            self._check(file)

    def _check(self, file: File) -> None:
        if problem := file.problem(self.path):
            raise ValueError(f"{self.path / file.file}: {problem}: {_REMEDY}")

    def _places_of(self, shard: Shard) -> int:
        """Rows that lie in a shard."""
        return shard.rows if self._format.KEEPS_FAILED else shard.rows - shard.failed

    def _check_sizes(self) -> None:
        """Before anything is allocated or opened: names and sizes follow from the format and the plan."""
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
    """The power of two of rows a shard that leaves no more shards of `rows` rows than can be mapped into memory."""
    return 1 << (-(-rows // _MOST_SHARDS) - 1).bit_length()


def verified(path: Path, plan: Manifest | Draft, name: str) -> bytes:
    """The bytes of a small file of the cache at `path`, once its hash is one that the manifest or draft records."""
    file = path / name
    payload = read(file) if file.is_file() else None
    if payload is None or File.of(name, payload) not in plan.files:
        remedy = _REMEDY if isinstance(plan, Manifest) else f"delete {path} and write it anew"
        problem = "missing" if payload is None else "damaged: its SHA-256 is not that of what was written"
        raise ValueError(f"{file}: {problem}: {remedy}")
    return payload
