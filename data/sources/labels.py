"""Reads lists beside image files, which give the class of each file, and numbers the classes."""

from __future__ import annotations

import csv
import io
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from data.sources.base import NO_CLASS, read_file
from data.storage import parse_json
from data.text import printable

CLASSES = "classes.txt"
MAX_CLASSES_BYTES, MAX_LIST_BYTES = 2**24, 2**30
LISTS = ("metadata.csv", "metadata.jsonl", "dataset.json")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
ONE_CLASS = "images"  # the name of the class of a data set without classes
Label = str | int | None  # as written, or a number from a typed column; None if an image has none


def read_limited(fs: AbstractFileSystem, path: str, limit: int) -> bytes:
    """Read a small file; ValueError if it is larger than `limit`: a few bytes in a zip can unpack to any size."""
    size = int(fs.info(path)["size"] or 0)
    if size > limit:
        raise ValueError(f"data.source: {printable(path)}: {size:,} bytes, over the limit of {limit:,}")
    try:
        return read_file(fs, path)
    except ValueError as error:
        raise ValueError(f"data.source: {printable(path)}: {error}") from error


def read_list(payload: bytes, name: str, label_column: str | None) -> dict[str, Label] | None:
    """Read file name -> label from the list `name`; None if it has no labels, as a list of captions.

    ValueError, naming the list, if it is damaged, gives a file two labels, or names a file outside its folder.
    """
    try:
        text = payload.decode("utf-8-sig")
        if posixpath.basename(name) == "dataset.json":
            pairs = parse_json(text)["labels"]
            if pairs is None:
                return None
            entries = [(file, label) for file, label in (pairs.items() if isinstance(pairs, dict) else pairs)]
        else:
            lines = list(_lines_of_csv(text) if name.endswith(".csv") else _lines_of_json(text))
            column = label_column or _label_column({key for line in lines for key in line})
            if column is None:
                return None
            entries = [(line["file_name"], line.get(column)) for line in lines]
        return _one_label_each((_key(file), _plain_label(label, _key(file))) for file, label in entries)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"data.source: {name}: {type(error).__name__}: {error}: see docs/data.md") from error


def read_classes(payload: bytes) -> tuple[str, ...]:
    """Read names of classes in the order of their numbers, one per line; text after a tab is not part of the name."""
    text = payload.decode("utf-8-sig", "surrogateescape")  # folders' names need not be UTF-8 either
    names = [line.split("\t")[0].strip() for line in text.splitlines() if line.strip()]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(
                f"data.source: {CLASSES}: {printable(name)} is class {names.index(name)} and class {number}: list it"
                " once"
            )
    return tuple(names)


def number_classes(
    labels: Sequence[Label], names: Sequence[str] | None, keys: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.int64], list[str]]:
    """Return the names of the classes, the class number of every image, and notes for the user.

    A label that is a known name is that class, any other number an index into `names`. Without `names`, every label is
    a class: numbers in their order, others sorted. If no image has a label, all are one class; if some have none, their
    number is `NO_CLASS`. ValueError names the image whose label is no class.
    """
    labels = [_composed(label) for label in labels]
    distinct = {label for label in labels if label is not None}
    notes = []
    if not distinct:
        notes.append(f"no image has a class: all get one class, {ONE_CLASS}, for an unconditional model")
        return (ONE_CLASS,), np.zeros(len(labels), np.int64), notes
    texts = [key for key, label in zip(keys, labels, strict=True) if isinstance(label, str) and not label.isdecimal()]
    numbered = [key for key, label in zip(keys, labels, strict=True) if isinstance(label, int)]
    if names is None and texts and numbered:
        notes.append(
            f"labels are numbers (such as that of {printable(numbered[0])}) and names (such as that of"
            f" {printable(texts[0])}): all are read as names"
        )
    if names is None:
        classes = tuple(sorted({str(label) for label in distinct}, key=_natural))
        number: dict[Any, int] = {label: classes.index(str(label)) for label in distinct}
    else:
        classes, number = _known_classes([str(_composed(name)) for name in names], distinct)
    for key, label in zip(keys, labels, strict=True):
        if label is not None and (label not in number or (isinstance(label, int) and label < 0)):
            raise ValueError(f"data.source: {printable(key)}: its {_unknown(label, classes)}")
    numbers = np.array([NO_CLASS if label is None else number[label] for label in labels], np.int64)
    if (without := np.flatnonzero(numbers == NO_CLASS)).size:
        notes.append(
            f"{len(without):,} {'images have' if len(without) > 1 else 'image has'} no class (such as"
            f" {printable(keys[without[0]])}): they train as unlabelled images"
        )
    counts = np.bincount(numbers[numbers >= 0], minlength=len(classes))
    if (empty := np.flatnonzero(counts == 0)).size:
        notes.append(
            f"{len(empty):,} of {len(classes):,} classes have no image (such as {printable(classes[empty[0]])})"
        )
    return tuple(map(printable, classes)), numbers, notes


def composed(text: str) -> str:
    """Normalise a text to Unicode NFC, in which names are compared: macOS writes é as two characters."""
    return unicodedata.normalize("NFC", text)


def _composed(label: Label) -> Label:
    return composed(label) if isinstance(label, str) else label


def _natural(name: str) -> tuple[bool, int, str]:
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _known_classes(names: list[str], labels: Iterable[str | int]) -> tuple[tuple[str, ...], dict[str | int, int]]:
    """Return the classes that a list names, where a remark may follow a name, and the number of each label that is one
    of them."""
    texts = {label for label in labels if isinstance(label, str)}
    short = [name if name in texts or name.split(" ")[0] not in texts else name.split(" ")[0] for name in names]
    index = {name: number for number, name in enumerate(short)}
    number: dict[str | int, int] = {}
    for label in labels:
        if label in index:
            number[label] = index[str(label)]
        elif (isinstance(label, int) or label.isdecimal()) and 0 <= int(label) < len(short):
            number[label] = int(label)
    return tuple(short), number


def _unknown(label: str | int, classes: tuple[str, ...]) -> str:
    if isinstance(label, int) or label.isdecimal():
        first = " (the first class is 0, not 1)" if int(label) == len(classes) else ""
        return f"label {label} is not one of the {len(classes):,} classes, numbered from 0{first}"
    return f"class {printable(label)} is not in {CLASSES}, which lists {len(classes):,} classes"


def _lines_of_csv(text: str) -> Iterable[Mapping[str, Any]]:
    """Yield the rows of a table; its delimiter is the one beside `file_name` in the first line."""
    header = text.split("\n", 1)[0]
    delimiter = next(
        (mark for mark in ",;\t|" if "file_name" in [name.strip().strip('"') for name in header.split(mark)]), ","
    )
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    if rows.fieldnames:
        rows.fieldnames = [name.strip() for name in rows.fieldnames]
    for row in rows:
        if None in row:
            raise ValueError(f"line {rows.line_num} has more columns than the first line")
        yield row


def _lines_of_json(text: str) -> Iterable[Mapping[str, Any]]:
    """Yield the objects of JSON lines or of one JSON array."""
    if text.lstrip().startswith("["):
        lines = parse_json(text)
    else:
        lines = [parse_json(line) for line in text.split("\n") if line.strip()]
    for line in lines:
        if not isinstance(line, dict):
            raise TypeError(f"{str(line)[:60]} is not an object with file_name")
        yield line


def _label_column(columns: set[str]) -> str | None:
    if "file_name" not in columns:
        raise KeyError(f"file_name: the columns are {', '.join(sorted(map(str, columns)))}")
    return next((name for name in LABEL_COLUMNS if name in columns), None)


def _plain_label(label: Any, key: str) -> Label:
    """Return a label as text, as written, or number; None if it is empty."""
    if label is None or (isinstance(label, str) and not label.strip()):
        return None
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if not isinstance(label, str | int):
        raise TypeError(f"{key}: label {label}: an image has one class, a name or a number from 0")
    if isinstance(label, int) and label < 0:
        raise ValueError(f"{key}: label {label}: classes are numbered from 0; leave it empty for no class")
    return label.strip() if isinstance(label, str) else label


def _one_label_each(entries: Iterable[tuple[str, Label]]) -> dict[str, Label]:
    listed: dict[str, Label] = {}
    for key, label in entries:
        if listed.setdefault(key, label) != label:
            raise ValueError(f"{key} is listed as {listed[key]} and as {label}: an image has one class")
    return listed


def _key(file_name: str) -> str:
    """Return the key of a file that a list names, relative to the list; ValueError if it is outside its folder."""
    key = posixpath.normpath(file_name)
    if key.startswith(("../", "/")):
        raise ValueError(f"{file_name} is outside the folder")
    return key
