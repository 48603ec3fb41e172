"""Where images come from: a data set is a list of keys with a class each, read by index."""

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

NO_CLASS = -2  # the label of an image that has no class, beside others that have one
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
    digests: dict[int, str] = field(default_factory=dict)  # index -> that of its file's bytes, where there is a file


class Source(Protocol):
    """A labelled image data set; image i has the key `keys[i]` and the class `classes[labels[i]]`.

    A label is `NO_CLASS` where the image has none.
    """

    name: str
    classes: tuple[str, ...]
    keys: Sequence[str]
    labels: NDArray[np.int64]
    stamps: Sequence[str]  # one an image, of the file's size and time (`stamp`); empty strings where there are no files
    size: int  # bytes of all image files; 0 where there are none
    image_size: int  # pixels a side
    notes: Sequence[str]  # what a person should know of the listing: what was passed over, what was assumed
    preprocessing: str

    def fingerprint(self) -> str:
        """A digest that changes when an image is added, removed, renamed, rewritten or given another class."""
        ...

    def load(self, indices: Sequence[int]) -> Batch:
        """Read the images of `indices`; one that cannot be read is a failure of the batch, not an exception."""
        ...

    def digest(self, index: int) -> str:
        """The digest of one image file's bytes, read now; OSError or ValueError with the reason."""
        ...


class PerProcess:
    """A file system that every process opens for itself: open files and connections do not survive a fork."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs, self._pid = fs, os.getpid()

    def here(self) -> AbstractFileSystem:
        if self._pid != os.getpid():
            self._fs, self._pid = copy.deepcopy(self._fs), os.getpid()  # fsspec copies by opening anew
        return self._fs


class PassedOver:
    """Counts what a listing leaves out, by kind, and keeps the first name of each kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, example: str) -> None:
        count, first = self._kinds.get(kind, (0, example))
        self._kinds[kind] = count + 1, min(first, example)

    def lines(self, *, but: str | None = None) -> list[str]:
        """What was passed over, `but` for one kind, in one line; no line where that is nothing."""
        found = [(kind, *entry) for kind, entry in self._kinds.items() if kind != but]
        kinds = [f"{count:,} {kind} (such as {printable(first)})" for kind, count, first in found]
        return [f"passed over: {', '.join(kinds)}"] if kinds else []


def read_file(fs: AbstractFileSystem, path: str, end: int | None = None) -> bytes:
    """The bytes of a file, or of its beginning; ValueError where it is a member of a zip file that is damaged."""
    try:
        return bytes(fs.cat_file(path, start=None if end is None else 0, end=end))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"damaged in the zip file: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError("damaged in the zip file: it would begin before the file does") from error


def content_digest(payload: bytes) -> str:
    """A digest of a file's bytes, in hexadecimal; BLAKE2 is as quick as reading them."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def stamp(info: Mapping[str, Any]) -> str:
    """What distinguishes a file from its next version, of a file system's `info` about it: the size, and a short digest
    of this and of times and hashes."""
    identity = digest(f"{name}={info[name]}" for name in _IDENTITY if info.get(name) is not None)[:16]
    return f"{info.get('size')}-{identity}"


def same_size(one: str, other: str) -> bool:
    """Whether two stamps are of files of the same size."""
    return one.split("-")[0] == other.split("-")[0]
