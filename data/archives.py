"""Image files in tar shards as webdataset has them, and in Parquet files as data sets on the Hugging Face hub do."""

from __future__ import annotations

import copy
import functools
import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any

from fsspec import AbstractFileSystem

from data.images import SUFFIXES
from data.source import stamp

MAX_LABEL_BYTES = 2**20  # of a member that only says which class an image has


class PerProcess:
    """A file system that every process opens for itself: open files and connections do not survive a fork."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs, self._pid = fs, os.getpid()

    def here(self) -> AbstractFileSystem:
        if self._pid != os.getpid():
            self._fs, self._pid = copy.deepcopy(self._fs), os.getpid()  # fsspec copies by opening anew
        return self._fs


class TarShards:
    """Tar files of images, each beside a member of the same name with its class: `.cls`, or `.json` with `label`.

    Nothing is extracted. Only plain members with these suffixes are looked at; links and all else are passed over.
    """

    def __init__(
        self, fs: AbstractFileSystem, infos: dict[str, dict[str, Any]], classes: tuple[str, ...] | None
    ) -> None:
        """`infos` has what `fs` says of each tar by the name that begins its keys."""
        self._fs, self.classes = PerProcess(fs), classes
        self.keys: list[str] = []
        self.labels: list[str | int] = []
        self.stamps: list[str] = []
        self._places: list[tuple[str, int, int]] = []  # file, first byte, byte after the last
        for name, info in infos.items():
            path = info["name"]
            with fs.open(path) as file:
                for key, member, label in _samples(file, path):
                    self.keys.append(f"{name}/{key}")
                    self.labels.append(label)
                    self.stamps.append(stamp({**info, "offset": member.offset_data}))
                    self._places.append((path, member.offset_data, member.offset_data + member.size))
        self.size = sum(end - start for _, start, end in self._places)

    def read(self, index: int) -> bytes:
        path, start, end = self._places[index]
        return self._fs.here().cat_file(path, start=start, end=end)


def _samples(file: Any, path: str) -> Iterator[tuple[str, tarfile.TarInfo, str | int]]:
    """Key, image member and label of every sample of one tar; a key ends at the first dot of a member's name."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str | int] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or ".." in member.name.split("/"):
                    continue
                folder, _, name = member.name.rpartition("/")
                base, _, suffix = name.partition(".")
                key = f"{folder}/{base}" if folder else base
                if f".{suffix.lower()}" in SUFFIXES:
                    images[key] = member
                elif suffix in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
                    content = tar.extractfile(member)
                    assert content is not None
                    label = _label(content.read(), suffix)
                    if label is not None:
                        labels[key] = label
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            file.seek(tar.offset)  # tarfile takes all but the first damaged header for the end, which is a zero block
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"truncated or damaged at byte {tar.offset}")
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"data.source: {path}: {type(error).__name__}: {error}") from error
    for key, member in images.items():
        if key not in labels:
            raise ValueError(f"data.source: {path}: {key}: no {key}.cls and no label in a {key}.json beside it")
        yield key, member, labels[key]


def _label(content: bytes, suffix: str) -> str | int | None:
    """The class that a member names; a JSON may be about other things."""
    label: Any = content.decode().strip()
    if suffix == "json":
        value = json.loads(label)
        label = value.get("label") if isinstance(value, dict) else None
    return int(label) if str(label).isdecimal() else label or None


class ParquetFiles:
    """Parquet files with a column of images, `{bytes, path}`, and one of labels, as `datasets` writes them."""

    def __init__(self, fs: AbstractFileSystem, infos: dict[str, dict[str, Any]]) -> None:
        """`infos` has what `fs` says of each file by the name that begins its keys."""
        self.fs = PerProcess(fs)
        self.keys: list[str] = []
        self.labels: list[str | int] = []
        self.stamps: list[str] = []
        self.size = 0
        self._places: list[tuple[str, int, int]] = []  # file, row group, row in it
        columns = set()
        for name, info in infos.items():
            file = _parquet(self, info["name"], os.getpid())
            self.image, label, self.classes = _columns(file, info["name"])
            columns.add((self.image, label, self.classes))
            labels = file.read([label]).column(0).to_pylist()
            self.labels += labels
            self.keys += [f"{name}/{row:06d}" for row in range(len(labels))]
            self.stamps += [stamp({**info, "row": row}) for row in range(len(labels))]
            for group in range(file.metadata.num_row_groups):
                metadata = file.metadata.row_group(group)
                self._places += [(info["name"], group, row) for row in range(metadata.num_rows)]
                chunks = [metadata.column(i) for i in range(metadata.num_columns)]
                self.size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == f"{self.image}.bytes")
        if len(columns) > 1:
            raise ValueError(f"data.source: {', '.join(infos)}: they differ in the names of their columns or classes")

    def read(self, index: int) -> bytes:
        path, group, row = self._places[index]
        image = _row_group(self, path, group, os.getpid())[row].as_py()
        if image is None or image["bytes"] is None:
            raise ValueError("the row has no image bytes")
        return image["bytes"]


@functools.lru_cache(maxsize=16)
def _parquet(files: ParquetFiles, path: str, pid: int) -> Any:
    """An open Parquet file of this process: one that was opened before a fork is not shared."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("data.source: Parquet files need pyarrow: pip install 'latentmill[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(files.fs.here().open(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"data.source: {path}: {error}") from error


@functools.lru_cache(maxsize=2)
def _row_group(files: ParquetFiles, path: str, group: int, pid: int) -> Any:
    """The column of images of a row group, which is read whole: neighbours are asked for next."""
    return _parquet(files, path, pid).read_row_group(group, columns=[files.image]).column(0)


def _columns(file: Any, path: str) -> tuple[str, str, tuple[str, ...] | None]:
    """The names of the columns of images and of labels, and the classes' names where the schema has them."""
    schema = file.schema_arrow
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    images = [field.name for field in schema if str(field.type).startswith("struct<bytes: binary")]
    labels = [name for name in ("label", "labels", "fine_label", "class") if name in schema.names]
    if not images or not labels:
        raise ValueError(
            f"data.source: {path}: needs a column of images {{bytes, path}} and one named label; it has"
            f" {', '.join(schema.names)}"
        )
    names = features.get(labels[0], {}).get("names")
    return images[0], labels[0], tuple(names) if names else None
