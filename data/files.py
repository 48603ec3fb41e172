"""Image files as a data set: in a folder, in zip, tar or Parquet files, on this machine or at an fsspec URL."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import fsspec
import numpy as np
from fsspec import AbstractFileSystem
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from data.archives import ParquetFiles, PerProcess, TarShards
from data.images import DECODER_ERRORS, PREPROCESSING, SUFFIXES, decode_image, is_image
from data.source import Batch, NoImagesError, digest, printable, stamp

MAX_FILE_BYTES = 2**30  # of one image file: what a zip says of its size is checked before it is unpacked
MAX_CLASSES = 1_000_000  # where their names are not known
CLASSES = "classes.txt"
_LISTS = ("metadata.csv", "metadata.jsonl", "dataset.json")


class Container(Protocol):
    """Image files in one place; `labels` are names of classes, or their numbers."""

    keys: list[str]
    labels: list[str | int]
    stamps: list[str]
    classes: tuple[str, ...] | None  # where the container names them
    size: int

    def read(self, index: int) -> bytes:
        """The bytes of file `index`; OSError or ValueError with the reason. May be called in any process."""
        ...


class ImageFiles:
    """Labelled image files (see `data.source.Source`), wherever they lie."""

    def __init__(self, url: str, *, image_size: int, matte: str = "white") -> None:
        """ValueError when there is nothing at `url`, or nothing that is a labelled image."""
        self.name, self.image_size, self.matte = printable(url), image_size, matte
        self.preprocessing = PREPROCESSING.format(matte=matte)
        self._container = open_container(url)
        self.keys: Sequence[str] = self._container.keys
        self.stamps: Sequence[str] = self._container.stamps
        self.size = self._container.size
        if not self.keys:
            raise NoImagesError(
                f"data.source: no images under {url}: put them in one folder per class, such as {url}/cat/1.jpg"
                f" (formats: {' '.join(sorted(SUFFIXES))}); docs/data.md has the other ways"
            )
        self.classes, self.labels = _number_classes(self._container, url)

    def fingerprint(self) -> str:
        names = [self.classes[label] for label in self.labels]
        return digest(f"{k}\t{name}\t{stamp}" for k, name, stamp in zip(self.keys, names, self.stamps, strict=True))

    def load(self, indices: Sequence[int]) -> Batch:
        batch = Batch(
            np.asarray(indices, np.int64), np.zeros((len(indices), self.image_size, self.image_size, 3), np.uint8)
        )
        for row, index in enumerate(indices):
            try:
                batch.pixels[row] = decode_image(self._container.read(int(index)), self.image_size, self.matte)
            except DECODER_ERRORS as error:
                batch.failures[int(index)] = f"{type(error).__name__}: {error}"
        return batch


def open_container(url: str) -> Container:
    """The images at a path or URL, in the container that is found there."""
    # A secret key may hold slashes before its @, so a colon says enough; but a port is a number.
    if any(re.search(r"://[^/]*(@|:(?!\d*(/|$)))", part) for part in url.split("::")):
        raise ValueError("data.source: a URL with credentials would end up in logs: give these by the environment")
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"data.source: {url}: {error}") from error
    top = root
    if fs.isdir(root):
        files = _archives_in(fs, root)
        if not files:
            return Folder(fs, root)
    else:
        top = root.split("*")[0].rpartition("/")[0]
        files = sorted(fs.glob(root)) if "*" in root else [root]
        if not files or not fs.exists(files[0]):
            raise NoImagesError(f"data.source: no such folder or file: {url}")
    suffixes = {os.path.splitext(file)[1] for file in files}
    infos = {file.removeprefix(top).lstrip("/"): fs.info(file) for file in files}
    if suffixes == {".zip"} and len(files) == 1:
        try:
            return Folder(fsspec.filesystem("zip", fo=OpenFile(fs, files[0])), "")
        except zipfile.BadZipFile as error:
            raise ValueError(f"data.source: {url}: {error}") from error
    if suffixes == {".tar"}:
        return TarShards(fs, infos, _read_classes(fs, files[0].rpartition("/")[0]))
    if suffixes == {".parquet"}:
        return ParquetFiles(fs, infos)
    raise ValueError(f"data.source: {url}: give a folder, one .zip, or .tar or .parquet files")


class Folder:
    """Images in one folder per class, nested folders included, or as a list beside them says.

    Lists are Hugging Face's metadata.csv or metadata.jsonl, and EDM's dataset.json. Without one, classes are the top
    folders' names, in sorted order or in that of classes.txt.
    """

    def __init__(self, fs: AbstractFileSystem, root: str) -> None:
        """`fs` may be an open zip file."""
        self._fs, self._root, self._local = PerProcess(fs), root.rstrip("/"), isinstance(fs, LocalFileSystem)
        found = dict(sorted(_local_files(root) if self._local else _remote_files(fs, root)))
        self.classes = _read_classes(fs, self._root)
        lists = [name for name in _LISTS if name in found]
        listed = _read_list(fs.cat_file(self._path(lists[0])), lists[0]) if lists else None
        if listed is None:
            listed = {key: key.split("/")[0] for key in found if "/" in key and is_image(key)}
        self.keys = list(listed)
        self.labels: list[str | int] = [
            key.split("/")[0] if label is None and "/" in key else label for key, label in listed.items()
        ]
        infos = [found.get(key, (0, "missing")) for key in self.keys]
        self._sizes = [size for size, _ in infos]
        self.stamps = [stamp for _, stamp in infos]
        self.size = sum(self._sizes)

    def read(self, index: int) -> bytes:
        if self._sizes[index] > MAX_FILE_BYTES:
            raise ValueError(f"{self._sizes[index]} bytes, over the limit of {MAX_FILE_BYTES}")
        path = self._path(self.keys[index])
        if self._local:
            with open(path, "rb") as file:
                return file.read()
        try:
            return self._fs.here().cat_file(path)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"damaged in the zip file: {error}") from error

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if self._root else key


def _archives_in(fs: AbstractFileSystem, root: str) -> list[str]:
    """Tar or Parquet files in a folder, or in its folder `data`, as data sets on the hub have it."""
    top = root.rstrip("/")
    for folder, suffix in ((top, ".tar"), (top, ".parquet"), (f"{top}/data", ".parquet")):
        listed = fs.ls(folder, detail=False) if fs.isdir(folder) else []
        files = sorted(
            file for file in listed if file.endswith(suffix) and not posixpath.basename(file).startswith(".")
        )
        if files:
            return files
    return []


def _local_files(root: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """Relative path, size and stamp of every file that is not hidden. Links to folders inside a class are not followed:
    they may form a loop.
    """
    tops = [entry.path for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    for top in [root, *tops]:
        for parent, inner, files in os.walk(top, onerror=_refuse):
            inner[:] = [] if top == root else [name for name in inner if not name.startswith(".")]
            folder = "" if parent == root else os.path.relpath(parent, root).replace(os.sep, "/") + "/"
            for name in files:
                if not name.startswith("."):
                    yield folder + name, _local_info(os.path.join(parent, name))


def _refuse(error: OSError) -> None:
    raise ValueError(f"data.source: {error.filename}: {error.strerror}") from error


def _local_info(path: str) -> tuple[int, str]:
    try:
        info = os.stat(path)
    except OSError:  # a dangling link, or gone since it was listed: reading it will say so
        return 0, "unreadable"
    return info.st_size, f"{info.st_size}-{info.st_mtime_ns}"


def _remote_files(fs: AbstractFileSystem, root: str) -> Iterator[tuple[str, tuple[int, str]]]:
    prefix = root.strip("/")
    for path, info in fs.find(root, detail=True).items():
        key = path.strip("/").removeprefix(prefix).lstrip("/")
        if not any(part.startswith((".", "__MACOSX")) for part in key.split("/")):
            yield key, (int(info["size"] or 0), stamp(info))


def _read_classes(fs: AbstractFileSystem, folder: str) -> tuple[str, ...] | None:
    """Names of classes in the order of their numbers, one a line; what follows a tab is not part of the name."""
    path = f"{folder}/{CLASSES}" if folder else CLASSES
    if not fs.exists(path):
        return None
    text = fs.cat_file(path).decode("utf-8-sig", "surrogateescape")  # folders' names need not be UTF-8 either
    return tuple(line.split("\t")[0] for line in text.splitlines() if line.strip())


def _read_list(payload: bytes, name: str) -> dict[str, Any] | None:
    """Key -> label, None where the list has no label for it; None where it has no labels at all."""
    try:
        text = payload.decode("utf-8-sig")
        if name == "dataset.json":
            labels = json.loads(text)["labels"]
            return None if labels is None else {_key(file): label for file, label in labels}
        lines: Any = csv.DictReader(io.StringIO(text))
        if name == "metadata.jsonl":
            lines = (json.loads(line) for line in text.split("\n") if line.strip())
        listed = {}
        for line in lines:
            key, label = _key(line["file_name"]), line.get("label")
            listed[key] = int(str(label)) if str(label).isdecimal() else label or None
        return listed
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"data.source: {name}: {type(error).__name__}: {error}: see docs/data.md") from error


def _key(file_name: str) -> str:
    """The key of a file that a list names, which is below the list."""
    key = posixpath.normpath(file_name)
    if key.startswith(("../", "/")):
        raise ValueError(f"{file_name} leads out of the folder")
    return key


def _number_classes(container: Container, url: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of the classes and the number of every image's class."""
    labels, names = container.labels, container.classes
    kinds = {type(label) for label in labels}
    if kinds not in ({int}, {str}):
        raise ValueError(f"data.source: {url}: labels are all numbers or all names; some are missing or differ in kind")
    if kinds == {int}:
        limit = len(names) if names else MAX_CLASSES
        for key, label in zip(container.keys, labels, strict=True):
            if not 0 <= int(label) < limit:
                raise ValueError(
                    f"data.source: {url}: {key}: its label {label} is none of the {limit:,} classes from 0 on"
                )
        numbers = np.array(labels, np.int64)
        return names or tuple(map(str, range(int(numbers.max()) + 1))), numbers
    names = names or tuple(sorted(set(map(str, labels))))
    number = {name: i for i, name in enumerate(names)}
    for key, label in zip(container.keys, labels, strict=True):
        if label not in number:
            raise ValueError(f"data.source: {url}: {key}: its class {label} is not in {CLASSES}")
    return tuple(map(printable, names)), np.array([number[str(label)] for label in labels], np.int64)
