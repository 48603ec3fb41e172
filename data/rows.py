"""Which image each row of a cache is: the listing of a data set, in the order that the cache keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.cache import ROWS
from data.source import Source


@dataclass(frozen=True)
class Rows:
    """Row i has the key `keys[i]`, the class `classes[labels[i]]` and, in its source, the index `order[i]`."""

    keys: Sequence[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    stamps: Sequence[str]  # change when an image's file changes; empty where there are no files
    order: NDArray[np.int64]

    @classmethod
    def of(cls, source: Source) -> Rows:
        return cls(source.keys, source.labels, source.classes, source.stamps, np.arange(len(source.keys)))

    @classmethod
    def load(cls, file: Path, classes: tuple[str, ...]) -> Rows:
        """What a cache's `rows.jsonl` says."""
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise ValueError(f"{file}: damaged: {error}: `latentmill verify --repair` writes it anew") from error
        labels = np.array([line["label"] for line in lines], np.int64)
        keys, stamps = [line["key"] for line in lines], [line["stamp"] for line in lines]
        return cls(keys, labels, classes, stamps, np.arange(len(lines)))

    @classmethod
    def aligned(cls, source: Source, cache: Path, classes: tuple[str, ...]) -> tuple[Rows, str]:
        """The images of `source` in the order of `cache`, whose `classes` keep their numbers, and what of the cache's
        is no longer so, in words: "" when nothing but new images, behind the old ones, distinguishes them.
        """
        rows = cls.of(source)
        if not (cache / ROWS).exists():
            return rows, ""
        old = cls.load(cache / ROWS, classes)
        now = {key: (stamp, rows.classes[label]) for key, stamp, label in rows._entries()}
        before = {key: (stamp, classes[label]) for key, stamp, label in old._entries()}
        gone = [key for key in old.keys if key not in now]
        changed = [key for key in old.keys if key in now and now[key] != before[key]]
        parts = [(gone, "gone"), (changed, "changed")]
        change = " and ".join(f"{len(keys):,} {what} (such as {keys[0]})" for keys, what in parts if keys)
        index = {key: i for i, key in enumerate(rows.keys)}
        kept = [index[key] for key in old.keys if key in index]
        order = np.array(kept + [i for i, key in enumerate(rows.keys) if key not in before], np.int64)
        return rows._reordered(order, classes), change

    def lines(self) -> bytes:
        """The contents of `rows.jsonl`."""
        return "".join(
            json.dumps({"row": row, "key": key, "label": label, "stamp": stamp}) + "\n"
            for row, (key, stamp, label) in enumerate(self._entries())
        ).encode()

    def _entries(self) -> Iterable[tuple[str, str, int]]:
        return zip(self.keys, self.stamps, self.labels.tolist(), strict=True)

    def _reordered(self, order: NDArray[np.int64], classes: tuple[str, ...]) -> Rows:
        names = (*classes, *(name for name in self.classes if name not in classes))
        number = np.array([names.index(name) for name in self.classes], np.int64)
        return Rows(
            [self.keys[i] for i in order],
            number[self.labels[order]],
            names,
            [self.stamps[i] for i in order],
            order,
        )
