"""Reads image files in tar shards, as webdataset writes them."""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem

from data.sources.base import PerProcessFileSystem, Skipped, stamp
from data.sources.decode import is_image
from data.sources.labels import Label
from data.storage import parse_json
from data.text import printable

MAX_LABEL_BYTES = 2**20  # per member that holds the class of an image
_MAX_LINKS = 16  # followed one after another


class TarShards:
    """Reads tar files of images, each beside a member of the same name with its class: `.cls`, or `.json` with `label`.

    Nothing is extracted. A sample is the members whose names are equal up to the first dot, as in webdataset. Links are
    followed inside their tar. If no image has a label, the classes are the top folders inside the tars.
    """

    def __init__(
        self,
        fs: AbstractFileSystem,
        infos: dict[str, dict[str, Any]],
        classes: tuple[str, ...] | None,
        image_column: str | None = None,
    ) -> None:
        """List the samples. `infos` maps the name that begins the keys of a tar to what `fs` reports of the tar;
        `image_column` is the suffix of images, if samples have several."""
        self._fs, self.classes = PerProcessFileSystem(fs), classes
        self.keys: list[str] = []
        self.labels: list[Label] = []
        self.stamps: list[str] = []
        self._places: list[tuple[str, int, int]] = []  # file, first byte, byte after the last
        skipped = Skipped()
        for name, info in infos.items():
            path = info["name"]
            with fs.open(path) as file:
                for key, place, label in _samples(file, path, skipped, image_column):
                    self.keys.append(f"{name}/{key}")
                    self.labels.append(label)
                    self.stamps.append(stamp({**info, "size": place.size, "offset": place.offset}))
                    self._places.append((path, place.offset, place.offset + place.size))
        self.size = sum(end - start for _, start, end in self._places)
        self.notes: list[str] = []
        if self.keys and not any(label is not None for label in self.labels):
            self._label_by_folder(list(infos))
        self.notes += skipped.lines()

    def read(self, index: int) -> bytes:
        path, start, end = self._places[index]
        return self._fs.get().cat_file(path, start=start, end=end)

    def _label_by_folder(self, names: list[str]) -> None:
        """Label samples, none of which has a label, by their folders, or not at all if the tars are numbered shards."""
        inside = [
            key.removeprefix(next(f"{name}/" for name in names if key.startswith(f"{name}/"))) for key in self.keys
        ]
        if all("/" in key for key in inside):
            self.labels = [key.split("/")[0] for key in inside]
            self.notes.append("no label beside any image: the folders inside the tars are the classes")
        elif len(names) > 1 and not all(
            re.fullmatch(r"(.*[-_.])?\d+(-of-\d+)?\.tar", posixpath.basename(name), re.I) for name in names
        ):
            raise ValueError(
                f"data.source: {printable(names[0])}: no image has a label beside it, such as"
                f" {printable(inside[0])}.cls; if each tar is one class, unpack each into a folder of its name"
            )


class _Place(NamedTuple):
    """Locates a member's contents in its tar."""

    name: str
    offset: int
    size: int


def _samples(file: Any, path: str, skipped: Skipped, image_column: str | None) -> Iterator[tuple[str, _Place, Label]]:
    """Yield key, image and label of every sample of one tar that has an image."""
    images: dict[str, _Place] = {}
    labels: dict[str, tuple[_Place, Label]] = {}
    wanted = image_column and image_column.lower().lstrip(".")
    try:
        for place in _members(file, path, skipped):
            key, suffix = _split(place.name)
            kind = suffix.rpartition(".")[2]
            if is_image(f"x.{suffix}") and wanted in (None, suffix):
                if key in images:
                    raise ValueError(_two_images(images[key].name, place.name, key))
                images[key] = place
            elif kind in ("cls", "json") and place.size <= MAX_LABEL_BYTES:
                label = _label(_read(file, place), kind)
                if label is None and kind == "json":  # it may hold other data
                    continue
                first, known = labels.setdefault(key, (place, label))
                if str(known) != str(label):
                    raise ValueError(f"{first.name} says {known}, {place.name} says {label}: an image has one class")
            else:
                skipped.add(f".{kind}" if suffix else "without suffix", f"{path}/{place.name}")
    except (tarfile.TarError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"data.source: {printable(path)}: {type(error).__name__}: {error}") from error
    _check_pairs(images, labels, path, skipped)
    for key, place in images.items():
        yield key, place, labels[key][1] if key in labels else None


class _Headers:
    """Limits what tarfile reads at once of a tar: a header may state any length for a long name."""

    def __init__(self, file: Any) -> None:
        self._file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, size: int) -> bytes:
        if size > MAX_LABEL_BYTES:
            raise ValueError(f"a header of {size:,} bytes, over the limit of {MAX_LABEL_BYTES:,}")
        return self._file.read(size)


def _members(file: Any, path: str, skipped: Skipped) -> Iterator[_Place]:
    """Yield every regular member of a tar, and targets of links inside it under the link's name; count all others.

    ValueError names a member that occurs twice, and where a tar is truncated or damaged.
    """
    places: dict[str, _Place] = {}
    links: dict[str, str] = {}
    written: dict[str, str] = {}  # names as written in the tar, and their offsets
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            name = posixpath.normpath(member.name).lstrip("/")
            if ".." in member.name.split("/") or posixpath.basename(name).startswith("."):
                if not member.isdir():
                    skipped.add("hidden or outside the tar", f"{path}/{member.name}")
            elif name in places or name in links:
                raise ValueError(
                    f"two members are called {name}, {written[name]} and {member.name} at byte {member.offset}: give"
                    " every sample its own name, such as cat/000.png, or remove one of them"
                )
            elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                places[name] = _Place(name, member.offset_data, member.size)
            elif member.islnk():
                links[name] = posixpath.normpath(member.linkname)
            elif member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif not member.isdir():
                skipped.add("not a regular file", f"{path}/{member.name}")
            written[name] = f"{member.name} at byte {member.offset}"
            tar.members.clear()
        file.seek(tar.offset)  # tarfile reads a damaged header, except the first, as the end, which is a zero block
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"truncated or damaged at byte {tar.offset}")
    for name, target in links.items():
        for _ in range(_MAX_LINKS):
            target = links.get(target, target)
        if target in places:
            places[name] = places[target]._replace(name=name)
        else:
            skipped.add("linked (to nothing in the tar)", f"{path}/{name}")
    yield from places.values()


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix: the key ends at the first dot of the last part, as in webdataset."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _two_images(first: str, second: str, key: str) -> str:
    if any(_split(name)[1].count(".") for name in (first, second)):
        return (
            f"{first} and {second} are one sample, {key}, because a key ends at the first dot: use names without"
            " further dots, or give data.image_column, the suffix of the images"
        )
    return f"{first} and {second} are two images of one sample: give data.image_column={_split(first)[1]}, for example"


def _check_pairs(
    images: dict[str, _Place], labels: dict[str, tuple[_Place, Label]], path: str, skipped: Skipped
) -> None:
    """Raise ValueError if there are both an image without a label and a label without an image: a name is wrong."""
    alone = [key for key in images if key not in labels]
    left = [key for key in labels if key not in images]
    if alone and left:
        wanted = {key.casefold(): key for key in left}
        pair = next(((key, wanted[key.casefold()]) for key in alone if key.casefold() in wanted), (alone[0], left[0]))
        raise ValueError(
            f"data.source: {printable(path)}: {printable(images[pair[0]].name)} has no label, and"
            f" {printable(labels[pair[1]][0].name)} no image: both need the same name up to the first dot, with"
            " the same case"
        )
    for key in left:
        skipped.add("without an image (labels)", f"{path}/{labels[key][0].name}")


def _read(file: Any, place: _Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)


def _label(content: bytes, kind: str) -> Label:
    """Return the class that a member names; a JSON may hold other data."""
    if kind == "cls":
        return content.decode().strip() or None
    value = parse_json(content)
    label = value.get("label") if isinstance(value, dict) else None
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise TypeError(f"label {label}: an image has one class, a name or a number from 0")
    return label.strip() or None if isinstance(label, str) else label
