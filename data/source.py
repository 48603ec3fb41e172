"""Where images come from: a data set is a list of keys with a class each, read by index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_IDENTITY = (  # what file systems call the size, the time and the hash of a file, and where in it an image lies
    *("size", "mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "md5Hash", "crc32c", "blob_id"),
    *("CRC", "date_time", "offset", "row"),
)


class NoImagesError(ValueError):
    """There is nothing where a data set is said to be, or nothing that is an image."""


@dataclass
class Batch:
    """Images read for `indices`. Rows of `pixels` whose index is in `failures` are zero and must not be used."""

    indices: NDArray[np.int64]
    pixels: NDArray[np.uint8]  # n S S 3, RGB
    failures: dict[int, str] = field(default_factory=dict)  # index -> reason


class Source(Protocol):
    """A labelled image data set; image i has the key `keys[i]` and the class `classes[labels[i]]`."""

    name: str
    classes: tuple[str, ...]
    keys: Sequence[str]
    labels: NDArray[np.int64]
    stamps: Sequence[str]  # one an image, changes when its bytes do; empty strings where there are no files
    size: int  # bytes of all image files; 0 where there are none
    preprocessing: str

    def fingerprint(self) -> str:
        """A digest that changes when an image is added, removed, renamed, rewritten or given another class."""
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


def counted(number: int, noun: str) -> str:
    """A number of things for people: `1 image`, `1,024 images`, `2 classes`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def stamp(info: Mapping[str, Any]) -> str:
    """A short digest of what distinguishes a file from its next version, of a file system's `info` about it."""
    return digest(f"{name}={info[name]}" for name in _IDENTITY if info.get(name) is not None)[:16]


def open_source(source: str, *, image_size: int, count: int, seed: int, matte: str) -> Source:
    """The data set that `data.source` names: `solids`, or image files in a folder or in archives, here or at a URL.

    `count` and `seed` describe the solids alone; files have their own. `matte` is the colour behind transparent ones.
    """
    from data.files import ImageFiles
    from data.solids import Solids

    if source == "solids":
        return Solids(count=count, seed=seed, image_size=image_size)
    return ImageFiles(source, image_size=image_size, matte=matte)
