"""Which image each row of a cache is: the listing of a data set, in the order that the cache keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.cache import ROWS
from data.source import NO_CLASS, Source


class Change(NamedTuple):
    """Keys in which a data set differs from the listing of a cache."""

    added: list[str]
    gone: list[str]
    edited: list[str]  # another file, or another class


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
            keys, labels, stamps = ([line[name] for line in lines] for name in ("key", "label", "stamp"))
            if not set(labels) <= {NO_CLASS, *range(len(classes))}:
                raise ValueError("a label that is none of the classes")
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{file}: damaged: {reason}: `latentmill verify --repair` writes it anew") from error
        return cls(keys, np.array(labels, np.int64), classes, stamps, np.arange(len(lines)))

    @classmethod
    def aligned(cls, source: Source, cache: Path, classes: tuple[str, ...]) -> tuple[Rows, Change]:
        """The images of `source`, those of `cache` first in its order, and what is no longer as the cache lists it.

        The cache's `classes` keep their numbers.
        """
        rows = cls.of(source)
        if not (cache / ROWS).exists():
            return rows, Change([], [], [])
        old = cls.load(cache / ROWS, classes)
        now = {key: (stamp, rows.class_of(label)) for key, stamp, label in rows._entries()}
        before = {key: (stamp, old.class_of(label)) for key, stamp, label in old._entries()}
        change = Change(
            added=[key for key in rows.keys if key not in before],
            gone=[key for key in old.keys if key not in now],
            edited=[key for key in old.keys if key in now and now[key] != before[key]],
        )
        index = {key: i for i, key in enumerate(rows.keys)}
        kept = [key for key in old.keys if key in index]
        order = np.array([index[key] for key in [*kept, *change.added]], np.int64)
        return rows._reordered(order, classes), change

    def class_of(self, label: int) -> str | None:
        """The name of a label's class; None of an image without a class."""
        return None if label == NO_CLASS else self.classes[label]

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
        labels = self.labels[order]
        return Rows(
            [self.keys[i] for i in order],
            np.where(labels == NO_CLASS, NO_CLASS, number[labels]),
            names,
            [self.stamps[i] for i in order],
            order,
        )
