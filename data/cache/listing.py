"""Lists which image each row of a cache holds: the listing of a data set, in the order that the cache keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.cache.manifest import Draft, File, Manifest
from data.cache.reader import ROWS, read_verified_file
from data.sources.base import NO_CLASS, Source, same_size

_DIGESTS_AT_A_TIME = 256  # files per item of a worker process


class Change(NamedTuple):
    """Lists the keys in which a data set differs from the listing of a cache."""

    added: list[str]
    gone: list[str]
    edited: list[str]  # different file or class
    touched: list[str]  # different time, but the same size and class: perhaps a copy


@dataclass(frozen=True)
class Rows:
    """Lists all rows: row i has the key `keys[i]`, class `classes[labels[i]]` and, in its source, index `order[i]`."""

    keys: Sequence[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    stamps: Sequence[str]  # one per row; changes when the image file changes; empty if there is no file
    order: NDArray[np.int64]

    @classmethod
    def of(cls, source: Source) -> Rows:
        return cls(source.keys, source.labels, source.classes, source.stamps, np.arange(len(source.keys)))

    @classmethod
    def load(cls, cache: Path, plan: Manifest | Draft) -> Rows:
        """Read `rows.jsonl` of the cache at `cache`; ValueError unless its SHA-256 is recorded in `plan`."""
        lines = [json.loads(line) for line in read_verified_file(cache, plan, ROWS).splitlines()]
        keys, labels, stamps = ([line[name] for line in lines] for name in ("key", "label", "stamp"))
        return cls(keys, np.array(labels, np.int64), plan.classes, stamps, np.arange(len(lines)))

    @classmethod
    def aligned(cls, source: Source, cache: Path, plan: Manifest | Draft) -> tuple[Rows, Change]:
        """Order the images of `source` as `cache` does, new ones last; also return how the two listings differ.

        The cache's classes keep their numbers. ValueError if the cache's listing is damaged, unless that of `source`
        is identical to it.
        """
        rows, classes = cls.of(source), plan.classes
        if rows.classes == classes and rows.file == listing_of(plan):
            return rows, Change([], [], [], [])
        old = cls.load(cache, plan)
        now = {key: (stamp, rows.class_of(label)) for key, stamp, label in rows._entries()}
        before = {key: (stamp, old.class_of(label)) for key, stamp, label in old._entries()}
        differing = [key for key in old.keys if key in now and now[key] != before[key]]
        touched = [key for key in differing if now[key][1] == before[key][1] and same_size(now[key][0], before[key][0])]
        alike = set(touched)
        change = Change(
            added=[key for key in rows.keys if key not in before],
            gone=[key for key in old.keys if key not in now],
            edited=[key for key in differing if key not in alike],
            touched=touched,
        )
        index = {key: i for i, key in enumerate(rows.keys)}
        kept = [key for key in old.keys if key in index]
        order = np.array([index[key] for key in [*kept, *change.added]], np.int64)
        return rows._reordered(order, classes), change

    def with_stamps_of(self, cache: Path, plan: Manifest | Draft, keys: Iterable[str]) -> Rows:
        """Return the same rows with the stamps of `cache` for `keys`, whose files differ in time only."""
        old, wanted = Rows.load(cache, plan), set(keys)
        stamps = {key: stamp for key, stamp in zip(old.keys, old.stamps, strict=True) if key in wanted}
        return replace(self, stamps=[stamps.get(k, stamp) for k, stamp in zip(self.keys, self.stamps, strict=True)])

    def class_of(self, label: int) -> str | None:
        """Return the name of a label's class; None for an image without a class."""
        return None if label == NO_CLASS else self.classes[label]

    @cached_property
    def file(self) -> File:
        """Return size and SHA-256 of `rows.jsonl`."""
        return File.of(ROWS, self.lines())

    def lines(self) -> bytes:
        """Return the contents of `rows.jsonl`."""
        return "".join(
            json.dumps({"row": row, "key": key, "label": label, "stamp": stamp}) + "\n"
            for row, (key, stamp, label) in enumerate(self._entries())
        ).encode()

    def _entries(self) -> Iterable[tuple[str, str, int]]:
        return zip(self.keys, self.stamps, self.labels.tolist(), strict=True)

    def _reordered(self, order: NDArray[np.int64], classes: tuple[str, ...]) -> Rows:
        names = (*classes, *(name for name in self.classes if name not in classes))
        number = np.array([names.index(name) for name in self.classes], np.int64)
        labels = self.labels[order]
        return Rows(
            [self.keys[i] for i in order],
            np.where(labels == NO_CLASS, NO_CLASS, number[labels]),
            names,
            [self.stamps[i] for i in order],
            order,
        )


def listing_of(plan: Manifest | Draft) -> File:
    """Return size and SHA-256 of the `rows.jsonl` of a cache or, while it is being replaced, of the new one."""
    return next(file for file in plan.files if file.file == ROWS)


def digests_of(source: Source, indices: NDArray[np.int64], *, workers: int) -> list[str]:
    """Read the file of each image with `workers` processes and return its digest; empty if it cannot be read."""
    from torch.utils.data import DataLoader

    parts = np.array_split(indices, -(-len(indices) // _DIGESTS_AT_A_TIME))
    loader: Iterable[list[str]] = DataLoader(_Digests(source, parts), batch_size=None, num_workers=workers)  # type: ignore[arg-type]
    return [each for part in tqdm(loader, desc="compare", mininterval=1) for each in part]


@dataclass(frozen=True)
class _Digests:
    """Computes as item i the digests of the i-th part of the images."""

    source: Source
    parts: Sequence[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> list[str]:
        return [self._digest(index) for index in self.parts[number].tolist()]

    def _digest(self, index: int) -> str:
        try:
            return self.source.digest(index)
        except (OSError, ValueError):
            return ""
