"""Opens image files as a data set: in a folder, in zip, tar or Parquet files, local or at an fsspec URL."""

from __future__ import annotations

import os
import posixpath
import zipfile
from collections.abc import Sequence
from typing import Protocol

import fsspec
import numpy as np
from fsspec import AbstractFileSystem
from fsspec.core import OpenFile
from numpy.typing import NDArray

from data.sources.base import NO_CLASS, Batch, NoImagesError, Source, content_digest
from data.sources.decode import DECODER_ERRORS, PREPROCESSING, SUFFIXES, decode_image
from data.sources.folder import Folder, split_prefix
from data.sources.labels import CLASSES, MAX_CLASSES_BYTES, Label, number_classes, read_classes, read_limited
from data.sources.parquet import ParquetFiles
from data.sources.solids import Solids
from data.sources.tar import TarShards
from data.sources.urls import check_url
from data.text import digest, printable


class Container(Protocol):
    """Is the interface of image files in one place; `labels` are names of classes, or their numbers, or None."""

    keys: list[str]
    labels: list[Label]
    stamps: list[str]
    classes: tuple[str, ...] | None  # if the container names them
    size: int
    notes: list[str]  # what was skipped or assumed

    def read(self, index: int) -> bytes:
        """Read the bytes of file `index`; OSError or ValueError with the reason. May be called in any process."""
        ...


class ImageFiles:
    """Reads a data set of labelled image files from any container (see `data.sources.base.Source`)."""

    def __init__(
        self,
        url: str,
        *,
        image_size: int,
        matte: str = "white",
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        """List the images at `url`; NoImagesError, a ValueError, if there are none."""
        self.name, self.image_size, self.matte = printable(url), image_size, matte
        self.preprocessing = PREPROCESSING.format(matte=matte)
        self._container = open_container(url, image_column, label_column)
        self.keys: Sequence[str] = self._container.keys
        self.stamps: Sequence[str] = self._container.stamps
        self.size = self._container.size
        if not self.keys:
            raise NoImagesError(
                f"data.source: no images under {self.name}: put them in one folder per class, such as"
                f" {self.name}/cat/1.jpg (formats: {' '.join(sorted(SUFFIXES))}); docs/data.md shows all layouts"
                + "".join(f"; {note}" for note in self._container.notes)
            )
        self.classes, self.labels, notes = number_classes(self._container.labels, self._container.classes, self.keys)
        self.notes: Sequence[str] = [*self._container.notes, *notes]

    def fingerprint(self) -> str:
        return listing_fingerprint(self)

    def load(self, indices: Sequence[int]) -> Batch:
        batch = Batch(
            np.asarray(indices, np.int64), np.zeros((len(indices), self.image_size, self.image_size, 3), np.uint8)
        )
        for row, index in enumerate(indices):
            try:
                payload = self._container.read(int(index))
                batch.pixels[row] = self._pixels(payload)
                batch.digests[int(index)] = content_digest(payload)
            except DECODER_ERRORS as error:
                batch.failures[int(index)] = f"{type(error).__name__}: {error}"
        return batch

    def digest(self, index: int) -> str:
        return content_digest(self._container.read(index))

    def _pixels(self, payload: bytes) -> NDArray[np.uint8]:
        return decode_image(payload, self.image_size, self.matte)


def open_source(
    source: str,
    *,
    image_size: int,
    count: int,
    seed: int,
    matte: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Open the data set that `data.source` names: `solids`, or image files in a folder or in archives, local or remote.

    `count` and `seed` are for the solids alone. `matte` is the colour behind transparent images. The columns say which
    ones of a table or list hold images and classes, if several could.
    """
    if source == "solids":
        return Solids(count=count, seed=seed, image_size=image_size)
    return ImageFiles(source, image_size=image_size, matte=matte, image_column=image_column, label_column=label_column)


def listing_fingerprint(source: Source) -> str:
    """Return a digest of the key, the class and the stamp of every image."""
    names = [source.classes[label] if label != NO_CLASS else "" for label in source.labels]
    return digest(f"{k}\t{name}\t{stamp}" for k, name, stamp in zip(source.keys, names, source.stamps, strict=True))


def open_container(url: str, image_column: str | None = None, label_column: str | None = None) -> Container:
    """Open the images at a path or URL with the container that fits the files found there."""
    try:
        fs, root = fsspec.core.url_to_fs(check_url(url))
    except (ImportError, ValueError) as error:
        raise ValueError(f"data.source: {error}") from None
    if fs.isdir(root):
        folder = Folder(fs, root, url, label_column)
        files = _archives_in(fs, root)
        if not files or any("/" in key for key in folder.keys):
            return folder
        suffix = os.path.splitext(files[0])[1]
        if folder.keys:
            raise ValueError(
                f"data.source: {url}: it holds both images (such as {printable(folder.keys[0])}) and archives (such as"
                f" {posixpath.basename(files[0])}): move one of them away, or give {url.rstrip('/')}/*{suffix}"
            )
        _reject_splits(files, url)
        container = _open_archives(fs, root, files, url, image_column, label_column)
        container.notes += folder.skipped.lines(but=suffix.lower())
        return container
    files = sorted(fs.glob(root)) if "*" in root else [root]
    if not files or not fs.exists(files[0]):
        raise NoImagesError(f"data.source: no such folder or file: {url}")
    top = root.split("*")[0].rpartition("/")[0]
    if len(files) == 1 and files[0].lower().endswith(".zip"):
        return Folder(_open_zip(fs, files[0], url), "", url, label_column)
    return _open_archives(fs, top, files, url, image_column, label_column)


def _open_archives(
    fs: AbstractFileSystem,
    top: str,
    files: Sequence[str],
    url: str,
    image_column: str | None,
    label_column: str | None,
) -> Container:
    """Open tar or Parquet files; keys begin with the file's path relative to `top`."""
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    infos = {file.removeprefix(top).lstrip("/"): fs.info(file) for file in files}
    if suffixes == {".tar"}:
        listed = posixpath.join(posixpath.dirname(files[0]), CLASSES)
        classes = read_classes(read_limited(fs, listed, MAX_CLASSES_BYTES)) if fs.exists(listed) else None
        return TarShards(fs, infos, classes, image_column)
    if suffixes == {".parquet"}:
        return ParquetFiles(fs, infos, image_column, label_column)
    raise ValueError(f"data.source: {url}: give a folder, one .zip, or .tar or .parquet files")


def _open_zip(fs: AbstractFileSystem, file: str, url: str) -> AbstractFileSystem:
    try:
        archive = fsspec.filesystem("zip", fo=OpenFile(fs, file))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"data.source: {url}: {error}") from error
    names: set[str] = set()
    for name in archive.zip.namelist():
        if name in names:
            raise ValueError(f"data.source: {url}: two members are called {printable(name)}: remove one of them")
        names.add(name)
    if any("\\" in name for name in names) and not any("/" in name for name in names):
        raise ValueError(f"data.source: {url}: its paths have \\ instead of /: unpack it and zip it again")
    return archive


def _reject_splits(files: Sequence[str], url: str) -> None:
    """Raise ValueError if a folder's files belong to several splits: training and test images must not be mixed."""
    splits = sorted({split for file in files if (split := split_prefix(posixpath.basename(file)))})
    if len(splits) > 1:
        name = next(file for file in files if split_prefix(posixpath.basename(file)) == splits[-1])
        inner = "data/" if posixpath.dirname(name).endswith("/data") and not url.rstrip("/").endswith("data") else ""
        first = next((split for split in splits if split.startswith("train")), splits[0])
        raise ValueError(
            f"data.source: {url}: its files belong to several splits of a data set, {', '.join(splits)}: give one of"
            f" them, data.source={url.rstrip('/')}/{inner}{first}*{os.path.splitext(name)[1]}"
        )


def _archives_in(fs: AbstractFileSystem, root: str) -> list[str]:
    """List tar or Parquet files in a folder, or in its folder `data`, as in data sets on the Hugging Face hub."""
    top = root.rstrip("/")
    for folder, suffix in ((top, ".tar"), (top, ".parquet"), (f"{top}/data", ".parquet")):
        listed = fs.ls(folder, detail=False) if fs.isdir(folder) else []
        files = sorted(
            file for file in listed if file.lower().endswith(suffix) and not posixpath.basename(file).startswith(".")
        )
        if files:
            return files
    return []
