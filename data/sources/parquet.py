"""Image files in Parquet files, as data sets on the Hugging Face hub and tables of pandas or polars have them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from fsspec import AbstractFileSystem

from data.sources.base import PerProcess, stamp
from data.sources.labels import LABEL_COLUMNS, Label
from data.storage import parse_json
from data.text import printable

MAX_GROUP_BYTES = 2**31  # of images in a row group, which is held in memory, or of labels in a file
_ROWS_AT_A_TIME = 64


class ParquetFiles:
    """Parquet files with a column of image files, `{bytes, path}` or plain binary, and one of labels."""

    def __init__(
        self,
        fs: AbstractFileSystem,
        infos: dict[str, dict[str, Any]],
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        """`infos` has what `fs` says of each file by the name that begins its keys."""
        self.fs = PerProcess(fs)
        self.keys: list[str] = []
        self.labels: list[Label] = []
        self.stamps: list[str] = []
        self.size = 0
        self._places: list[tuple[str, int, int]] = []  # file, row group, row in it
        first: tuple[str, tuple[str, str | None, tuple[str, ...] | None]] | None = None
        for name, info in infos.items():
            file = _parquet(self, info["name"], os.getpid())
            with _telling(info["name"]):
                columns = _columns(file, info["name"], image_column, label_column)
            first = first or (name, columns)
            if columns != first[1]:
                raise ValueError(
                    f"data.source: {first[0]}, {name}: they differ in the names of their columns or classes:"
                    f" {_brief(first[1])} and {_brief(columns)}"
                )
            self.image, label, self.classes = columns
            count = file.metadata.num_rows
            with _telling(info["name"]):
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
        self.notes = [f"the images are those of the column {self.image}, the classes of {first[1][1] or 'no column'}"]

    def read(self, index: int) -> bytes:
        path, group, row = self._places[index]
        image = _row_group(self, path, group, os.getpid())[row].as_py()
        payload = image["bytes"] if isinstance(image, dict) else image
        if payload is None:
            raise ValueError("the row has no image bytes")
        return payload


@functools.lru_cache(maxsize=16)
def _parquet(files: ParquetFiles, path: str, pid: int) -> Any:
    """An open Parquet file of this process: one that was opened before a fork is not shared."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("data.source: Parquet files need pyarrow: pip install 'latentmill[parquet]'") from None
    with _telling(path):
        return pyarrow.parquet.ParquetFile(files.fs.here().open(path))


@contextlib.contextmanager
def _telling(path: str) -> Iterator[None]:
    """What pyarrow says of a damaged file becomes a ValueError with its name; an OSError of a disk has a number."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # of names, too
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"data.source: {path}: damaged: {' '.join(str(error).split())}") from error


@functools.lru_cache(maxsize=2)
def _row_group(files: ParquetFiles, path: str, group: int, pid: int) -> Any:
    """The column of images of a row group, which is read whole: neighbours are asked for next."""
    with _telling(path):
        return _column(_parquet(files, path, pid), files.image, MAX_GROUP_BYTES, row_groups=[group])


def _column(file: Any, column: str, limit: int, **options: Any) -> Any:
    """A column, read in small parts; ValueError where it is larger than `limit` bytes: a value that many rows refer to
    stands in the file once."""
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
    """The names of the columns of images and of labels, and the classes' names where the schema has them.

    There is no column of labels in a table that has nothing but images. ValueError where several columns could be
    meant, or none.
    """
    schema = file.schema_arrow
    images = [field.name for field in schema if _holds_files(field.type) and field.name not in LABEL_COLUMNS]
    named = [name for name in LABEL_COLUMNS if name in schema.names]
    labels = [name for name in schema.names if name not in images]
    image = _choose(images, images, image_column, "image", path, schema.names)
    label = _choose(named, labels, label_column, "label", path, schema.names) if labels else None
    assert image
    names = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
    for key in ("info", "features", label, "names"):
        names = names.get(key) if isinstance(names, dict) else None
    return image, label, tuple(map(str, names)) if isinstance(names, list) and names else None


def _choose(
    found: list[str], possible: list[str], asked: str | None, kind: str, path: str, columns: list[str]
) -> str | None:
    """The column that was asked for or is the only one found; of several, one that is called by its kind or, of labels,
    the first."""
    if asked is not None:
        if asked in possible:
            return asked
        why = f"data.{kind}_column = {asked}: no column of {kind}s"
    elif len(found) == 1 or kind in found or (found and kind == "label"):
        return kind if kind in found else found[0]
    elif found:
        why = f"{len(found)} columns hold images, {', '.join(found)}: give data.image_column={found[0]}, say"
    elif kind == "image":
        why = "needs a column of images, {bytes, path} or binary"
    else:
        why = f"needs a column of classes, one named label, or data.label_column={possible[0]}, say"
    raise ValueError(f"data.source: {path}: {why}; it has {', '.join(columns)}")


def _holds_files(kind: Any) -> bool:
    """Whether a column of an Arrow type can hold image files: binary, or a struct with a field `bytes` of that type."""
    import pyarrow.types as types

    if types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_files(kind.field(at).type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _labels(file: Any, column: str, name: str) -> list[Label]:
    """A column as labels: whole numbers, texts, or None where there is none; ValueError names column, row and value."""
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
                " class, a name or a whole number from 0 on"
            )
        labels.append(value)
    return labels


def _brief(columns: tuple[str, str | None, tuple[str, ...] | None]) -> str:
    image, label, names = columns
    return f"{image} and {label}{f' of {len(names)} classes, {names[0]} first' if names else ''}"
