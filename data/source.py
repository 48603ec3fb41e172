"""Where images come from: a data set is a list of keys with a class each, read by index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass
class Batch:
    """Images read for `indices`. Rows of `pixels` whose index is in `failures` are zero and must not be used."""

    indices: NDArray[np.int64]
    pixels: NDArray[np.uint8]  # n S S 3, RGB
    failures: dict[int, str] = field(default_factory=dict)  # index -> reason


class Source(Protocol):
    """A labelled image data set; image i has the key `keys[i]` and the class `classes[labels[i]]`."""

    classes: tuple[str, ...]
    keys: Sequence[str]
    labels: NDArray[np.int64]
    name: str

    def fingerprint(self) -> str:
        """A digest that changes when an image is added, removed, renamed or rewritten."""
        ...

    def load(self, indices: Sequence[int]) -> Batch:
        """Read the images of `indices`; one that cannot be read is a failure of the batch, not an exception."""
        ...


def digest(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text."""
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return sha.hexdigest()


def printable(name: str) -> str:
    """A file's name with bytes that are not UTF-8 as backslash escapes: JSON cannot hold them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def open_source(source: str, *, image_size: int, count: int, seed: int) -> Source:
    """The data set that `data.source` names: `solids` or a folder of class folders.

    `count` and `seed` describe the solids alone; a folder has its own.
    """
    from data.folder import ImageFolder
    from data.solids import Solids

    if source == "solids":
        return Solids(count=count, seed=seed, image_size=image_size)
    return ImageFolder(Path(source), image_size=image_size)
