"""Reads image files in Parquet files, as written by data sets on the Hugging Face hub, pandas or polars."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from fsspec import AbstractFileSystem

from data.sources.base import PerProcessFileSystem, stamp
from data.sources.labels import LABEL_COLUMNS, Label
from data.storage import parse_json
from data.text import printable

MAX_GROUP_BYTES = 2**31  # per row group of images, which is held in memory, or per file of labels
_ROWS_AT_A_TIME = 64


class ParquetFiles:
    """Reads Parquet files with a column of image files, `{bytes, path}` or plain binary, and one of labels."""

    def __init__(
        self,
        fs: AbstractFileSystem,
        infos: dict[str, dict[str, Any]],
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        """List the images. `infos` maps the name that begins the keys of a file to what `fs` reports of the file."""
        self.fs = PerProcessFileSystem(fs)
        self.keys: list[str] = []
        self.labels: list[Label] = []
        self.stamps: list[str] = []
        self.size = 0
        self._places: list[tuple[str, int, int]] = []  # file, row group, row in it
        first: tuple[str, tuple[str, str | None, tuple[str, ...] | None]] | None = None
        for name, info in infos.items():
            file = _parquet(self, info["name"], os.getpid())
            with _naming_damaged_file(info["name"]):
                columns = _columns(file, info["name"], image_column, label_column)
            first = first or (name, columns)
            if columns != first[1]:
                raise ValueError(
                    f"data.source: {first[0]}, {name}: they differ in the names of their columns or classes:"
                    f" {_brief(first[1])} and {_brief(columns)}"
                )
            self.image, label, self.classes = columns
            count = file.metadata.num_rows
            with _naming_damaged_file(info["name"]):
                self.labels += [None] * count if label is None else _labels(file, label, name)
            self.keys += [f"{name}/{row:06d}" for row in range(count)]
            self.stamps += [stamp({**info, "row": row}) for row in range(count)]
            for group in range(file.metadata.num_row_groups):
                metadata = file.metadata.row_group(group)
                self._places += [(info["name"], group, row) for row in range(metadata.num_rows)]
                chunks = [metadata.column(i) for i in range(metadata.num_columns)]
                own = (self.image, f"{self.image}.bytes")
                self.size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in own)
        assert first
        self.notes = [f"images are read from column {self.image}, classes from {first[1][1] or 'no column'}"]

    def read(self, index: int) -> bytes:
        path, group, row = self._places[index]
        image = _row_group(self, path, group, os.getpid())[row].as_py()
        payload = image["bytes"] if isinstance(image, dict) else image
        if payload is None:
            raise ValueError("the row has no image bytes")
        return payload


@functools.lru_cache(maxsize=16)
def _parquet(files: ParquetFiles, path: str, pid: int) -> Any:
    """Open a Parquet file in this process: one that was opened before a fork is not shared."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("data.source: Parquet files need pyarrow: run make setup, or pip install pyarrow") from None
    with _naming_damaged_file(path):
        return pyarrow.parquet.ParquetFile(files.fs.get().open(path))


@contextlib.contextmanager
def _naming_damaged_file(path: str) -> Iterator[None]:
    """Turn pyarrow's errors about a damaged file into a ValueError that names it; a disk's OSError has a number."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names may not be UTF-8
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"data.source: {path}: damaged: {' '.join(str(error).split())}") from error


@functools.lru_cache(maxsize=2)
def _row_group(files: ParquetFiles, path: str, group: int, pid: int) -> Any:
    """Read the whole image column of a row group: its other rows are usually requested next."""
    with _naming_damaged_file(path):
        return _column(_parquet(files, path, pid), files.image, MAX_GROUP_BYTES, row_groups=[group])


def _column(file: Any, column: str, limit: int, **options: Any) -> Any:
    """Read a column in small parts; ValueError if it is larger than `limit` bytes: a file may store a value once that
    many rows refer to."""
    import pyarrow

    parts, size = [], 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=[column], use_threads=False, **options):
        parts.append(batch.column(0))
        size += parts[-1].nbytes
        if size > limit:
            raise ValueError(f"column {column}: over the limit of {limit:,} bytes")
    return pyarrow.chunked_array(parts)


def _columns(
    file: Any, path: str, image_column: str | None, label_column: str | None
) -> tuple[str, str | None, tuple[str, ...] | None]:
    """Return the names of the columns of images and labels, and the classes' names if the schema has them.

    A table of images alone has no column of labels. ValueError if several columns are possible, or none.
    """
    schema = file.schema_arrow
    images = [field.name for field in schema if _holds_files(field.type) and field.name not in LABEL_COLUMNS]
    named = [name for name in LABEL_COLUMNS if name in schema.names]
    labels = [name for name in schema.names if name not in images]
    image = _choose_column(images, images, image_column, "image", path, schema.names)
    label = _choose_column(named, labels, label_column, "label", path, schema.names) if labels else None
    assert image
    names = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    for key in ("info", "features", label, "names"):
        names = names.get(key) if isinstance(names, dict) else None
    return image, label, tuple(map(str, names)) if isinstance(names, list) and names else None


def _choose_column(
    found: list[str], possible: list[str], requested: str | None, kind: str, path: str, columns: list[str]
) -> str | None:
    """Return the requested column, or the only one found; of several, the one named `kind` or the first of labels."""
    if requested is not None:
        if requested in possible:
            return requested
        why = f"data.{kind}_column = {requested}: no column of {kind}s"
    elif len(found) == 1 or kind in found or (found and kind == "label"):
        return kind if kind in found else found[0]
    elif found:
        why = f"{len(found)} columns hold images, {', '.join(found)}: give data.image_column={found[0]}, for example"
    elif kind == "image":
        why = "needs a column of images, {bytes, path} or binary"
    else:
        why = f"needs a column of classes, one named label, or data.label_column={possible[0]}, for example"
    raise ValueError(f"data.source: {path}: {why}; it has {', '.join(columns)}")


def _holds_files(kind: Any) -> bool:
    """Return whether a column of an Arrow type can hold image files: binary, or a struct with such a field `bytes`."""
    import pyarrow.types as types

    if types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_files(kind.field(at).type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _labels(file: Any, column: str, name: str) -> list[Label]:
    """Read a column as labels: whole numbers, texts, or None; ValueError names column, row and value."""
    values = _column(file, column, MAX_GROUP_BYTES).to_pylist() if file.metadata.num_rows else []
    if all(type(value) in (int, str) for value in values):
        return values
    labels: list[Label] = []
    for row, value in enumerate(values):
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int | str | None):
            raise ValueError(
                f"data.source: {printable(name)}: column {column}, row {row}: {str(value)[:60]}: an image has one"
                " class, a name or a whole number from 0"
            )
        labels.append(value)
    return labels


def _brief(columns: tuple[str, str | None, tuple[str, ...] | None]) -> str:
    image, label, names = columns
    return f"{image} and {label}{f' of {len(names)} classes, {names[0]} first' if names else ''}"
