"""Image files in tar shards as webdataset has them, and in Parquet files as data sets on the Hugging Face hub do."""

from __future__ import annotations

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


class TarShards:
    """Tar files of images, each beside a member of the same name with its class: `.cls`, or `.json` with `label`.

    Nothing is extracted. Only plain members with these suffixes are looked at; links and all else are passed over.
    """

    def __init__(self, fs: AbstractFileSystem, infos: list[dict[str, Any]], classes: tuple[str, ...] | None) -> None:
        self._fs, self.classes = fs, classes
        self.keys: list[str] = []
        self.labels: list[str | int] = []
        self.stamps: list[str] = []
        self._places: list[tuple[str, int, int]] = []  # file, first byte, byte after the last
        for info in infos:
            path = info["name"]
            with fs.open(path) as file:
                for key, member, label in _samples(file, path):
                    self.keys.append(f"{path.rsplit('/', 1)[-1]}/{key}")
                    self.labels.append(label)
                    self.stamps.append(stamp({**info, "offset": member.offset_data}))
                    self._places.append((path, member.offset_data, member.offset_data + member.size))
        self.size = sum(end - start for _, start, end in self._places)

    def read(self, index: int) -> bytes:
        path, start, end = self._places[index]
        return self._fs.cat_file(path, start=start, end=end)


def _samples(file: Any, path: str) -> Iterator[tuple[str, tarfile.TarInfo, str | int]]:
    """Key, image member and label of every sample of one tar; a key ends at the first dot of a member's name."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str | int] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                folder, _, name = member.name.rpartition("/")
                base, _, suffix = name.partition(".")
                key = f"{folder}/{base}" if folder else base
                if f".{suffix.lower()}" in SUFFIXES:
                    images[key] = member
                elif suffix in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[key] = _label(content.read(), suffix)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
    except (tarfile.TarError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"data.source: {path}: {type(error).__name__}: {error}") from error
    for key, member in images.items():
        if key not in labels:
            raise ValueError(f"data.source: {path}: {key}: no {key}.cls and no label in a {key}.json beside it")
        yield key, member, labels[key]


def _label(content: bytes, suffix: str) -> str | int:
    text = content.decode().strip()
    label = json.loads(text)["label"] if suffix == "json" else text
    return int(label) if str(label).isdecimal() else str(label)


class ParquetFiles:
    """Parquet files with a column of images, `{bytes, path}`, and one of labels, as `datasets` writes them."""

    def __init__(self, fs: AbstractFileSystem, infos: list[dict[str, Any]]) -> None:
        self._fs = fs
        self.keys: list[str] = []
        self.labels: list[str | int] = []
        self.stamps: list[str] = []
        self.size = 0
        self._places: list[tuple[str, int, int]] = []  # file, row group, row in it
        for info in infos:
            file = _parquet(fs, info["name"], os.getpid())
            image, label, self.classes = _columns(file, info["name"])
            labels = file.read([label]).column(0).to_pylist()
            self.labels += labels
            self.keys += [f"{info['name'].rsplit('/', 1)[-1]}/{row:06d}" for row in range(len(labels))]
            self.stamps += [stamp({**info, "row": row}) for row in range(len(labels))]
            for group in range(file.metadata.num_row_groups):
                metadata = file.metadata.row_group(group)
                self._places += [(info["name"], group, row) for row in range(metadata.num_rows)]
                columns = [metadata.column(i) for i in range(metadata.num_columns)]
                self.size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == f"{image}.bytes")
            self._image = image

    def read(self, index: int) -> bytes:
        path, group, row = self._places[index]
        images = _row_group(self._fs, path, group, self._image, os.getpid())
        payload = images[row].as_py()["bytes"]
        if payload is None:
            raise ValueError("the row has no image bytes, only a path")
        return payload


@functools.lru_cache(maxsize=16)
def _parquet(fs: AbstractFileSystem, path: str, pid: int) -> Any:
    """An open Parquet file of this process: one that was opened before a fork is not shared."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("data.source: Parquet files need pyarrow: pip install 'latentmill[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(fs.open(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"data.source: {path}: {error}") from error


@functools.lru_cache(maxsize=2)
def _row_group(fs: AbstractFileSystem, path: str, group: int, image: str, pid: int) -> Any:
    """The column of images of a row group, which is read whole: neighbours are asked for next."""
    return _parquet(fs, path, pid).read_row_group(group, columns=[image]).column(0)


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
