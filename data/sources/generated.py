"""Reads generated images as a data set, from a folder, archives or an `.npz`, and writes such an `.npz`.

The `.npz` has the format of ADM's evaluator (github.com/openai/guided-diffusion, evaluations): `arr_0`, uint8
`N S S 3`, and, if there are classes, `arr_1`, the number of each image's class. No pixel is ever changed here: resizing
samples would change the figures that are measured on them.
"""

from __future__ import annotations

import lzma
import math
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from data.sources.base import NO_CLASS, Batch, Source
from data.sources.decode import decode_rgb
from data.sources.files import ImageFiles
from data.sources.labels import composed
from data.storage import parse_json, read, sha256_file, staged_file
from data.text import counted, printable

SAMPLES = "samples.json"  # record of `latentmill sample` beside the folder of its images
_PIECE = 2**20  # bytes read at a time to move forward
_UNUSED = "the classes of the images are ignored: the data set has none"
_DAMAGE = (  # what zipfile, its decoders and numpy raise for damaged bytes
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    EOFError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
)


def open_generated(path: str, *, image_size: int, classes: Sequence[str], matte: str = "white") -> Source:
    """Open the images that `--images` names: an `.npz`, or anything that `data.source` may be.

    All must be `image_size` pixels wide and high. `classes` are those of the training images; labels are indices into
    them, or NO_CLASS. `load` raises a ValueError for an image that cannot be read, since figures of only some of the
    images would be wrong. ValueError, in one line, if the images cannot be measured.
    """
    if path.lower().endswith(".npz"):
        return GeneratedArray(Path(path), image_size=image_size, classes=classes)
    return GeneratedFiles(path, image_size=image_size, classes=classes, matte=matte)


class GeneratedFiles(ImageFiles):
    """Reads generated images from files; classes are the names of folders, or what `latentmill sample` recorded."""

    def __init__(self, url: str, *, image_size: int, classes: Sequence[str], matte: str = "white") -> None:
        if os.path.isfile(os.path.join(url, SAMPLES)) and os.path.isdir(os.path.join(url, "images")):
            url = os.path.join(url, "images")  # beside that folder is a contact sheet
        try:
            super().__init__(url, image_size=image_size, matte=matte)
        except ValueError as error:  # the same message, with the option's name
            raise ValueError(str(error).replace("data.source", "--images")) from error
        self.preprocessing = f"EXIF rotation, RGB over {matte}; never resized"
        names = [self.classes[label] if label != NO_CLASS else None for label in self.labels]
        notes = self._container.notes
        if all(label is None for label in self._container.labels):
            names = _recorded_classes(Path(url), self.keys) or [None] * len(names)
        elif all(name is not None and re.fullmatch(r"\d{6}", name) for name in names) and not set(names) & set(classes):
            notes = [
                *notes,
                f"folders such as {names[0]} are read as a thousand seeds each, as EDM writes them, not as classes",
            ]
            names = [None] * len(names)
        self.classes = tuple(classes)
        self.labels, more = _numbers_by_name(names, self.keys, self.classes, self.name)
        self.notes = [*notes, *more]
        _check_count(len(self.keys), self.name)
        self.load([0])  # most likely all have one size: fail before long work

    def load(self, indices: Sequence[int]) -> Batch:
        batch = super().load(indices)
        for index, reason in batch.failures.items():
            reason = reason.removeprefix("ValueError: ")
            raise ValueError(f"--images: {self.name}: {printable(self.keys[index])}: {reason}")
        return batch

    def _pixels(self, payload: bytes) -> NDArray[np.uint8]:
        image = decode_rgb(payload, self.matte)
        if image.size != (self.image_size, self.image_size):
            raise ValueError(_other_size(*image.size, self.image_size))
        return np.asarray(image, dtype=np.uint8)


class GeneratedArray:
    """Reads generated images from a local `.npz` (see `Source`): only the requested rows."""

    def __init__(self, path: Path, *, image_size: int, classes: Sequence[str]) -> None:
        self.name, self.classes, self.image_size = printable(str(path)), tuple(classes), image_size
        self.preprocessing = "none: never resized"
        names = _array_names(path)
        if "arr_0" not in names:
            raise ValueError(
                f"--images: {self.name}: it has no arr_0, but {_first_names(names) or 'nothing'}: images must be arr_0,"
                f" uint8 N {image_size} {image_size} 3, as numpy.savez('samples.npz', images) writes them"
            )
        self._path, self._images = path, _Array(path, "arr_0")
        _check_images(self._images, self.name, image_size)
        count = self._images.shape[0]
        self.keys: Sequence[str] = [f"{index:06d}" for index in range(count)]
        self.stamps: Sequence[str] = [""] * count
        self.size = path.stat().st_size
        self.labels = np.full(count, NO_CLASS, np.int64)
        self.notes: Sequence[str] = []
        if others := [name for name in names if name not in ("arr_0", "arr_1")]:
            self.notes = [f"skipped: {_first_names(others)}"]
        if "arr_1" in names and len(self.classes) < 2:
            self.notes = [*self.notes, _UNUSED]
        elif "arr_1" in names:
            self.labels = _class_numbers(_Array(path, "arr_1"), count, len(self.classes), self.name)
            self.notes = [*self.notes, f"arr_1 is read as indices into the classes: 0 is {self.classes[0]}"]

    def fingerprint(self) -> str:
        return sha256_file(self._path)

    def load(self, indices: Sequence[int]) -> Batch:
        wanted = np.asarray(indices, np.int64)
        rows, place = np.unique(wanted, return_inverse=True)
        pixels = np.empty((len(rows), *self._images.shape[1:]), np.uint8)
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) > 1) + 1):
            if run.size:
                start, stop = run[0], run[-1] + 1
                pixels[start:stop] = self._images.read(int(rows[start]), int(rows[stop - 1]) + 1)
        return Batch(wanted, pixels[place])

    def digest(self, index: int) -> str:
        return ""  # no image has a file of its own


class _Array:
    """Reads rows of an array in an `.npz`; a range after the last one is read forward, without opening the file again.

    Every process opens it again: the position in an open file does not survive a fork. No pickle is ever loaded.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Read the header; ValueError if it is damaged, or not of rows of plain numbers."""
        self.name, self._path = name, path
        self._file: IO[bytes] | None = None
        self._pid = os.getpid()
        with _naming_damaged_file(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = npy.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"{name} has npy version {version[0]}.{version[1]}, but plain numbers have 1.0")
            self.shape, by_columns, self.dtype = npy.read_array_header_1_0(file)
            self._begin = file.tell()
            size = archive.getinfo(f"{name}.npy").file_size - self._begin
        if self.dtype.hasobject:
            raise ValueError(
                f"--images: {path}: {name} holds Python objects, which are never loaded: write plain numbers, with"
                " the same shape for all images"
            )
        if by_columns:
            raise ValueError(f"--images: {path}: {name} is in Fortran order: save numpy.ascontiguousarray of it")
        if not self.shape or min(self.shape) < 0 or math.prod(self.shape) * self.dtype.itemsize != size:
            raise ValueError(
                f"--images: {path}: the header of {name} says {self.description}, but it has {size:,} bytes: write it"
                " again"
            )
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def description(self) -> str:
        return f"{self.dtype} {' '.join(map(str, self.shape))}"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows `start` to `stop`. Reading the last row also checks the CRC of all bytes before it."""
        with _naming_damaged_file(self._path):
            payload = self._at(self._begin + start * self._row_bytes).read((stop - start) * self._row_bytes)
            return np.frombuffer(payload, self.dtype).reshape(stop - start, *self.shape[1:])

    def _at(self, place: int) -> IO[bytes]:
        """Return the file at byte `place`, reading all before it: seeking would disable zipfile's CRC check."""
        if self._file is None or self._pid != os.getpid() or self._file.tell() > place:
            if self._file is not None:
                self._file.close()
            with zipfile.ZipFile(self._path) as archive:  # an open member stays open
                self._file, self._pid = archive.open(f"{self.name}.npy"), os.getpid()
        while (left := place - self._file.tell()) > 0 and self._file.read(min(left, _PIECE)):
            pass
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


def write_npz(path: Path, batches: Iterable[NDArray[np.uint8]], labels: NDArray[np.int64], size: int) -> None:
    """Write batches of images, uint8 `n size size 3`, as an `.npz` for ADM's evaluator, with one batch in memory.

    `labels` has one entry per image; they become `arr_1`, unless an image has none (a negative one). `path` appears
    only when it is complete; the same images give the same bytes. OSError with the path.
    """
    with staged_file(path) as staged, zipfile.ZipFile(staged, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _write_header(file, np.dtype(np.uint8), (len(labels), size, size, 3))
            count = 0
            for images in batches:
                assert images.dtype == np.uint8
                assert images.shape[1:] == (size, size, 3)
                file.write(np.ascontiguousarray(images).data)
                count += len(images)
            assert count == len(labels), f"{count} images and {len(labels)} labels"
        if (labels >= 0).all():
            with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                _write_header(file, np.dtype(np.int64), labels.shape)
                file.write(labels.astype(np.int64).tobytes())


def _write_header(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


def _array_names(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--images: no such file on this machine: {path}")
    with _naming_damaged_file(path), zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            archive.open(name).close()  # opening compares it with the name before the contents
        return [name.removesuffix(".npy") for name in archive.namelist()]


@contextmanager
def _naming_damaged_file(path: Path) -> Iterator[None]:
    """Turn an error about damaged bytes of an `.npz` into a ValueError, in one line that names it."""
    try:
        yield
    except _DAMAGE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"--images: {path}: it cannot be read ({reason}): if it is damaged or truncated, copy it or write it again"
        ) from error


def _check_images(images: _Array, name: str, size: int) -> None:
    """Raise ValueError, with a way out, unless these are two or more uint8 RGB images of `size`."""
    shape, wrong = images.shape, f"--images: {name}: arr_0 is {images.description}, not uint8 N {size} {size} 3: "
    if images.dtype != np.uint8:
        raise ValueError(wrong + "scale it to 0..255, round it, and write it as uint8")
    if len(shape) == 4 and shape[1] == 3 != shape[3]:
        raise ValueError(wrong + "channels must come last: numpy.savez(path, x.transpose(0, 2, 3, 1))")
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        raise ValueError(wrong + "repeat the channel of grey images three times: numpy.stack([x, x, x], -1) of N H W")
    if len(shape) != 4 or shape[3] != 3:
        raise ValueError(wrong + "write RGB images")
    if shape[1:3] != (size, size):
        raise ValueError(f"--images: {name}: " + _other_size(shape[2], shape[1], size))
    _check_count(shape[0], name)


def _check_count(count: int, name: str) -> None:
    if count < 2:
        raise ValueError(f"--images: {name}: {counted(count, 'image')}: at least two images are needed")


def _other_size(width: int, height: int, size: int) -> str:
    other = f"measure them with data.image_size={width}, or generate them at {size}x{size}"
    way = other if width == height else "make them square"
    return (
        f"{width}x{height} pixels, but data.image_size is {size}: generated images are never resized, since that would"
        f" change the figures: {way}"
    )


def _class_numbers(array: _Array, count: int, classes: int, name: str) -> NDArray[np.int64]:
    """Read the labels of `arr_1`; ValueError unless they are one class index for each image."""
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise ValueError(
            f"--images: {name}: arr_1 is {array.description}, not {count} integers, one class per image: leave it"
            " out to measure without classes"
        )
    labels = array.read(0, count)
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        label = int(labels[outside[0]])
        raise ValueError(
            f"--images: {name}: image {outside[0]} has class {label} in arr_1, but the {classes:,} classes are numbered"
            f" from 0{' (the first class is 0, not 1)' if label == classes else ''}: leave arr_1 out to measure without"
            " classes"
        )
    return labels.astype(np.int64)


def _numbers_by_name(
    names: Sequence[str | None], keys: Sequence[str], classes: tuple[str, ...], name: str
) -> tuple[NDArray[np.int64], list[str]]:
    """Return the class number of each image from its class name, and notes for the user. A name that is no class may be
    the index of one, also with zeros in front, to the width of the last index; ValueError for other names."""
    if len(classes) < 2:
        used = any(each is not None for each in names)
        return np.full(len(names), NO_CLASS, np.int64), [_UNUSED] if used else []
    width = len(str(len(classes) - 1))
    number = {form: k for k in range(len(classes)) for form in (str(k), f"{k:0{width}d}")}
    number |= {composed(known): k for k, known in enumerate(classes)}
    number_of: dict[str | None, int] = {None: NO_CLASS}
    notes: list[str] = []
    for key, each in zip(keys, names, strict=True):
        if each in number_of:
            continue
        if each is None or composed(each) not in number:
            raise ValueError(
                f"--images: {name}: {printable(key)} has class {each}, which is not one of the"
                f" {len(classes):,} classes, {_first_names(classes)}: rename the class, or put all images into one"
                " folder to measure without classes"
            )
        number_of[each] = number[composed(each)]
        if classes[number_of[each]] != each and not notes:
            notes.append(f"class {each} is read as an index into the classes: {classes[number_of[each]]}")
    return np.array([number_of[each] for each in names], np.int64), notes


def _recorded_classes(folder: Path, keys: Sequence[str]) -> list[str | None] | None:
    """Return the classes that `latentmill sample` recorded for its images, by the index that file names begin with;
    None if there is no record beside `folder`."""
    file = folder.parent / SAMPLES
    if not file.is_file():
        return None
    try:
        classes = {image["index"]: str(image["class"]) for image in parse_json(read(file))["images"]}
        return [classes[int(key.split("-")[0])] for key in keys]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--images: {file} is not the record of the images in {folder} ({type(error).__name__}: {error}): move one"
            " of them away to measure these without classes"
        ) from error


def _first_names(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more
