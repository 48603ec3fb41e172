"""Defines what a source of images offers: a list of keys with a class each, read by index.

To add pixels from another place, implement `Source` and open it in `data.sources.files.open_source`. To add another
kind of archive of image files, implement `data.sources.files.Container` (docs/architecture.md).
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.text import digest, printable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

NO_CLASS = -2  # label of an image without a class in a data set where others have one
_IDENTITY = (  # names in file systems for size, time and hash of a file, and for an image's position in it
    *("size", "mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "md5Hash", "crc32c", "blob_id"),
    *("CRC", "date_time", "offset", "row"),
)


class NoImagesError(ValueError):
    """Reports that the path of a data set does not exist or holds no image."""


@dataclass
class Batch:
    """Holds the images of `indices`. Rows of `pixels` whose index is in `failures` are zero and must not be used."""

    indices: NDArray[np.int64]
    pixels: NDArray[np.uint8]  # n S S 3, RGB
    failures: dict[int, str] = field(default_factory=dict)  # index -> reason
    digests: dict[int, str] = field(default_factory=dict)  # index -> digest of its file's bytes, if there is a file


class Source(Protocol):
    """Is the interface of labelled image data sets; image i has the key `keys[i]` and the class `classes[labels[i]]`.

    The label of an image without a class is `NO_CLASS`.
    """

    name: str
    classes: tuple[str, ...]
    keys: Sequence[str]
    labels: NDArray[np.int64]
    stamps: Sequence[str]  # one per image, from the file's size and time (`stamp`); "" for an image without a file
    size: int  # bytes of all image files; 0 if there are none
    image_size: int  # pixels per side
    notes: Sequence[str]  # for the user, about the listing: what was skipped or assumed
    preprocessing: str

    def fingerprint(self) -> str:
        """Return a digest that changes when an image is added, removed, renamed, rewritten or given another class."""
        ...

    def load(self, indices: Sequence[int]) -> Batch:
        """Read the images of `indices`; one that cannot be read becomes a failure of the batch, not an exception."""
        ...

    def digest(self, index: int) -> str:
        """Read one image file and return the digest of its bytes; OSError or ValueError with the reason."""
        ...


class PerProcessFileSystem:
    """Opens a file system again in every process: open files and connections do not survive a fork."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs, self._pid = fs, os.getpid()

    def get(self) -> AbstractFileSystem:
        if self._pid != os.getpid():
            self._fs, self._pid = copy.deepcopy(self._fs), os.getpid()  # fsspec opens a copy again
        return self._fs


class Skipped:
    """Counts the files that a listing skips, by kind, with one example of each kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, example: str) -> None:
        count, first = self._kinds.get(kind, (0, example))
        self._kinds[kind] = count + 1, min(first, example)

    def lines(self, *, but: str | None = None) -> list[str]:
        """Return what was skipped, except for the kind `but`, in one line; no line if nothing was."""
        found = [(kind, *entry) for kind, entry in self._kinds.items() if kind != but]
        kinds = [f"{count:,} {kind} (such as {printable(first)})" for kind, count, first in found]
        return [f"skipped: {', '.join(kinds)}"] if kinds else []


def read_file(fs: AbstractFileSystem, path: str, end: int | None = None) -> bytes:
    """Read a file, or its first `end` bytes; ValueError if it is a damaged member of a zip file."""
    try:
        return bytes(fs.cat_file(path, start=None if end is None else 0, end=end))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"damaged in the zip file: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError("damaged in the zip file: its offset is negative") from error


def content_digest(payload: bytes) -> str:
    """Return a digest of a file's bytes, in hexadecimal; BLAKE2 is as fast as reading them."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def stamp(info: Mapping[str, Any]) -> str:
    """Return a text that changes with a file's version, from a file system's `info` about it: the size, and a short
    digest of size, times and hashes."""
    identity = digest(f"{name}={info[name]}" for name in _IDENTITY if info.get(name) is not None)[:16]
    return f"{info.get('size')}-{identity}"


def same_size(one: str, other: str) -> bool:
    """Return whether two stamps are of files of the same size."""
    return one.split("-")[0] == other.split("-")[0]
