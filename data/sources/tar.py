"""Image files in tar shards, as webdataset has them."""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem

from data.sources.base import PassedOver, PerProcess, stamp
from data.sources.decode import is_image
from data.sources.labels import Label
from data.storage import parse_json
from data.text import printable

MAX_LABEL_BYTES = 2**20  # of a member that only says which class an image has
_MAX_LINKS = 16  # that lead to one another


class TarShards:
    """Tar files of images, each beside a member of the same name with its class: `.cls`, or `.json` with `label`.

    Nothing is extracted. A sample is the members whose names are equal up to the first dot, as webdataset has it. Links
    are followed inside their tar. Where no image has a label, the classes are the top folders inside the tars.
    """

    def __init__(
        self,
        fs: AbstractFileSystem,
        infos: dict[str, dict[str, Any]],
        classes: tuple[str, ...] | None,
        image_column: str | None = None,
    ) -> None:
        """`infos` has what `fs` says of each tar by the name that begins its keys; `image_column` is the suffix of the
        images of samples that have several."""
        self._fs, self.classes = PerProcess(fs), classes
        self.keys: list[str] = []
        self.labels: list[Label] = []
        self.stamps: list[str] = []
        self._places: list[tuple[str, int, int]] = []  # file, first byte, byte after the last
        passed = PassedOver()
        for name, info in infos.items():
            path = info["name"]
            with fs.open(path) as file:
                for key, place, label in _samples(file, path, passed, image_column):
                    self.keys.append(f"{name}/{key}")
                    self.labels.append(label)
                    self.stamps.append(stamp({**info, "size": place.size, "offset": place.offset}))
                    self._places.append((path, place.offset, place.offset + place.size))
        self.size = sum(end - start for _, start, end in self._places)
        self.notes: list[str] = []
        if self.keys and not any(label is not None for label in self.labels):
            self._label_by_folder(list(infos))
        self.notes += passed.lines()

    def read(self, index: int) -> bytes:
        path, start, end = self._places[index]
        return self._fs.here().cat_file(path, start=start, end=end)

    def _label_by_folder(self, names: list[str]) -> None:
        """Classes of samples none of which has a label: their folders; none, if the tars are shards by their names."""
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
    """Where a member's contents lie in its tar."""

    name: str
    offset: int
    size: int


def _samples(file: Any, path: str, passed: PassedOver, image_column: str | None) -> Iterator[tuple[str, _Place, Label]]:
    """Key, image and label of every sample of one tar that has an image."""
    images: dict[str, _Place] = {}
    labels: dict[str, tuple[_Place, Label]] = {}
    wanted = image_column and image_column.lower().lstrip(".")
    try:
        for place in _members(file, path, passed):
            key, suffix = _split(place.name)
            kind = suffix.rpartition(".")[2]
            if is_image(f"x.{suffix}") and wanted in (None, suffix):
                if key in images:
                    raise ValueError(_two_images(images[key].name, place.name, key))
                images[key] = place
            elif kind in ("cls", "json") and place.size <= MAX_LABEL_BYTES:
                label = _label(_read(file, place), kind)
                if label is None and kind == "json":  # it may be about other things
                    continue
                first, said = labels.setdefault(key, (place, label))
                if str(said) != str(label):
                    raise ValueError(f"{first.name} says {said}, {place.name} says {label}: an image has one class")
            else:
                passed.add(f".{kind}" if suffix else "without suffix", f"{path}/{place.name}")
    except (tarfile.TarError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"data.source: {printable(path)}: {type(error).__name__}: {error}") from error
    _check_pairs(images, labels, path, passed)
    for key, place in images.items():
        yield key, place, labels[key][1] if key in labels else None


class _Headers:
    """A tar as tarfile reads it, which is all but the members' contents: a long name may be said to have any length."""

    def __init__(self, file: Any) -> None:
        self._file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, size: int) -> bytes:
        if size > MAX_LABEL_BYTES:
            raise ValueError(f"a header of {size:,} bytes, over the limit of {MAX_LABEL_BYTES:,}")
        return self._file.read(size)


def _members(file: Any, path: str, passed: PassedOver) -> Iterator[_Place]:
    """Every plain member of a tar, and what links inside it lead to, under the link's name; others are counted.

    ValueError names a member that is there twice, and where a tar is cut off or damaged.
    """
    places: dict[str, _Place] = {}
    links: dict[str, str] = {}
    written: dict[str, str] = {}  # names as they are in the tar, and where
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            name = posixpath.normpath(member.name).lstrip("/")
            if ".." in member.name.split("/") or posixpath.basename(name).startswith("."):
                if not member.isdir():
                    passed.add("hidden or leading out of the tar", f"{path}/{member.name}")
            elif name in places or name in links:
                raise ValueError(
                    f"two members are called {name}, {written[name]} and {member.name} at byte {member.offset}: give"
                    " every sample a name of its own, such as cat/000.png, or leave one of them out"
                )
            elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                places[name] = _Place(name, member.offset_data, member.size)
            elif member.islnk():
                links[name] = posixpath.normpath(member.linkname)
            elif member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif not member.isdir():
                passed.add("no plain file", f"{path}/{member.name}")
            written[name] = f"{member.name} at byte {member.offset}"
            tar.members.clear()
        file.seek(tar.offset)  # tarfile takes all but the first damaged header for the end, which is a zero block
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"truncated or damaged at byte {tar.offset}")
    for name, target in links.items():
        for _ in range(_MAX_LINKS):
            target = links.get(target, target)
        if target in places:
            places[name] = places[target]._replace(name=name)
        else:
            passed.add("linked (to nothing in the tar)", f"{path}/{name}")
    yield from places.values()


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member's name: the key ends at the first dot of the last part, as webdataset has it."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _two_images(first: str, second: str, key: str) -> str:
    if any(_split(name)[1].count(".") for name in (first, second)):
        return (
            f"{first} and {second} are one sample, {key}, for a key ends at the first dot: name them without further"
            " dots, or give data.image_column, the suffix that images have"
        )
    return f"{first} and {second} are two images of one sample: give data.image_column={_split(first)[1]}, say"


def _check_pairs(
    images: dict[str, _Place], labels: dict[str, tuple[_Place, Label]], path: str, passed: PassedOver
) -> None:
    """ValueError where an image has no label and a label no image: one of their names is not what it should be."""
    alone = [key for key in images if key not in labels]
    left = [key for key in labels if key not in images]
    if alone and left:
        wanted = {key.casefold(): key for key in left}
        pair = next(((key, wanted[key.casefold()]) for key in alone if key.casefold() in wanted), (alone[0], left[0]))
        raise ValueError(
            f"data.source: {printable(path)}: {printable(images[pair[0]].name)} has no label, and"
            f" {printable(labels[pair[1]][0].name)} no"
            " image: the two of a sample have one name up to the first dot, letter for letter"
        )
    for key in left:
        passed.add("without an image (labels)", f"{path}/{labels[key][0].name}")


def _read(file: Any, place: _Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)


def _label(content: bytes, kind: str) -> Label:
    """The class that a member names; a JSON may be about other things."""
    if kind == "cls":
        return content.decode().strip() or None
    value = parse_json(content)
    label = value.get("label") if isinstance(value, dict) else None
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise TypeError(f"label {label}: an image has one class, a name or a number from 0 on")
    return label.strip() or None if isinstance(label, str) else label
