"""Lists image files in a folder, on a local disk, in a zip file or at an fsspec URL, and their classes."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterator

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from data.sources.base import PerProcessFileSystem, Skipped, read_file, stamp
from data.sources.decode import SIGNATURE_BYTES, SUFFIXES, has_image_signature
from data.sources.labels import (
    CLASSES,
    LISTS,
    MAX_CLASSES_BYTES,
    MAX_LIST_BYTES,
    Label,
    composed,
    read_classes,
    read_limited,
    read_list,
)
from data.text import printable

MAX_FILE_BYTES = 2**30  # per image file; the size that a zip states is checked before unpacking
# suffixes of other formats: such files are not opened to check whether they are images
# fmt: off
_NOT_IMAGES = {
    ".7z", ".bin", ".cls", ".csv", ".db", ".doc", ".docx", ".gz", ".htm", ".html", ".ini", ".ipynb", ".json",
    ".jsonl", ".lock", ".log", ".m", ".mat", ".md", ".mov", ".mp3", ".mp4", ".npy", ".npz", ".parquet", ".pb", ".pdf",
    ".pickle", ".pkl", ".pt", ".pth", ".py", ".rar", ".safetensors", ".sh", ".sqlite", ".tar", ".tfrecord", ".tgz",
    ".tsv", ".txt", ".wav", ".webm", ".xls", ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst",
}
# fmt: on
_SYSTEM = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"}
_SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|eval)([-_ ]?(set|split|images|imgs|data|\d+))?", re.I
)
File = tuple[int, str]  # size and stamp


class Folder:
    """Reads images in one folder per class, nested folders included, or with labels from a list beside them.

    Lists are Hugging Face's metadata.csv or metadata.jsonl, in any folder, and EDM's dataset.json. Without one, classes
    are the top folders' names, in sorted order or in that of classes.txt. If one folder of folders holds all images, it
    is used instead.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, url: str, label_column: str | None = None) -> None:
        """List the images. `fs` may be an open zip file; `url` is the folder's name for messages.

        ValueError if the folders are splits of a data set, such as train and val, or if lists are damaged.
        """
        self._fs, self._root, self._local = PerProcessFileSystem(fs), root.rstrip("/"), isinstance(fs, LocalFileSystem)
        self.skipped = Skipped()
        notes: list[str] = []
        images, others = self._list_files()
        top = _only_folder(images, others)
        while top:
            notes.append(f"all images are in {printable(top)}: its folders are the classes")
            self._root, url = self._path(top), f"{url.rstrip('/')}/{top}"
            images, others = _within(images, top, self.skipped), _within(others, top, self.skipped)
            top = _only_folder(images, others)
        self.classes = None
        if CLASSES in others:
            self.classes = read_classes(read_limited(fs, self._path(CLASSES), MAX_CLASSES_BYTES))
        if self.classes is None:
            _reject_splits(images, url)
        labels = self._labels(images, others, label_column)
        self._count_skipped(others, {key.split("/")[0] for key in images})
        self.keys = list(labels)
        self.labels = list(labels.values())
        infos = [images.get(key) or others.get(key) or (0, "0-missing") for key in self.keys]
        self._sizes = [size for size, _ in infos]
        self.stamps = [stamp for _, stamp in infos]
        self.size = sum(self._sizes)
        self.notes = notes + self.skipped.lines()

    def read(self, index: int) -> bytes:
        if self._sizes[index] > MAX_FILE_BYTES:
            raise ValueError(f"{self._sizes[index]} bytes, over the limit of {MAX_FILE_BYTES}")
        path = self._path(self.keys[index])
        if self._local:
            with open(path, "rb") as file:
                return file.read()
        return read_file(self._fs.get(), path)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if self._root else key

    def _list_files(self) -> tuple[dict[str, File], dict[str, File]]:
        """Return images and other files by relative path, sorted; hidden or special files are counted as skipped."""
        fs = self._fs.get()
        found = _local_files(self._root, self.skipped) if self._local else _remote_files(fs, self._root, self.skipped)
        images: dict[str, File] = {}
        others: dict[str, File] = {}
        for key, info in sorted(found):
            suffix = os.path.splitext(key)[1].lower()
            known = suffix in SUFFIXES or (suffix not in _NOT_IMAGES and self._has_image_signature(key, info))
            (images if known else others)[key] = info
        return images, others

    def _has_image_signature(self, key: str, info: File) -> bool:
        if not info[0]:
            return False
        try:
            if not self._local:
                return has_image_signature(read_file(self._fs.get(), self._path(key), end=SIGNATURE_BYTES))
            with open(self._path(key), "rb") as file:
                return has_image_signature(file.read(SIGNATURE_BYTES))
        except (PermissionError, ValueError):  # counted as another kind of file
            return False

    def _labels(self, images: dict[str, File], others: dict[str, File], label_column: str | None) -> dict[str, Label]:
        """Return the label of every image: from the lists, if they have any, or the top folder; None at the top."""
        listed: dict[str, Label] = {}
        if not images:
            return listed
        lists = [key for key in others if posixpath.basename(key) in LISTS]
        on_disk = {composed(key): key for key in [*images, *others]}
        for name in lists:
            payload = read_limited(self._fs.get(), self._path(name), MAX_LIST_BYTES)
            for file, label in (read_list(payload, name, label_column) or {}).items():
                key = posixpath.join(posixpath.dirname(name), file)
                key = on_disk.get(composed(key)) or on_disk.get(composed(key.replace("\\", "/"))) or key
                if listed.setdefault(key, label) != label:
                    raise ValueError(
                        f"data.source: {name}: {printable(key)} is {label}, but {listed[key]} in another list beside it"
                    )
        if not listed:
            return {key: key.split("/")[0] if "/" in key else None for key in images}
        for key in images:
            if key not in listed:
                self.skipped.add(f"not listed in {lists[0]}", key)
        return listed

    def _count_skipped(self, others: dict[str, File], tops: set[str]) -> None:
        """Count files that are neither images nor lists, and folders without images, which are not classes."""
        folders: dict[str, str] = {}
        for key in others:
            name = posixpath.basename(key)
            if key == CLASSES or name in LISTS:
                continue
            self.skipped.add(os.path.splitext(name)[1].lower() or "without suffix", key)
            if "/" in key and key.split("/")[0] not in tops:
                folders.setdefault(key.split("/")[0], key)
        for folder in folders:
            self.skipped.add("without images (folders)", folder)


def split_prefix(name: str) -> str | None:
    """Return the split of a data set, such as train, that a file's name begins with, or None."""
    found = re.match(r"(train|training|val|valid|validation|test|testing|dev)(?=[-_.\d])", name, re.I)
    return found.group(1).lower() if found else None


def _only_folder(images: dict[str, File], others: dict[str, File]) -> str | None:
    """Return the one folder whose subfolders hold all images, if there is one and no list of classes beside it."""
    inside = [key for key in images if "/" in key]
    tops = {key.split("/")[0] for key in inside}
    described = any(key == CLASSES or key in LISTS for key in others)
    if len(tops) != 1 or described or any(key.count("/") == 1 for key in inside) or 2 * len(inside) < len(images):
        return None
    return tops.pop()


def _within(files: dict[str, File], top: str, skipped: Skipped) -> dict[str, File]:
    """Return the files below `top` by path relative to it; others are counted as skipped."""
    for key in files:
        if not key.startswith(f"{top}/"):
            skipped.add("outside the only folder", key)
    return {key.removeprefix(f"{top}/"): info for key, info in files.items() if key.startswith(f"{top}/")}


def _reject_splits(images: dict[str, File], url: str) -> None:
    """Raise ValueError if the top folders are splits of a data set, and not classes."""
    tops = {key.split("/")[0] for key in images if "/" in key}
    splits = sorted(top for top in tops if _SPLIT.fullmatch(top))
    nested = all(key.count("/") > 1 for key in images if key.split("/")[0] in splits)
    if len(splits) > 1 and (nested or len(splits) == len(tops)):
        first = next((split for split in splits if split.lower().startswith("train")), splits[0])
        inside = f"zip://{first}::{url}" if url.lower().endswith(".zip") else f"{url.rstrip('/')}/{first}"
        raise ValueError(
            f"data.source: {url}: {', '.join(splits)} look like splits of a data set, not like classes: give one of"
            f" them, data.source={inside}; if they are classes, name them in a {CLASSES} beside them"
        )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _local_files(root: str, skipped: Skipped) -> Iterator[tuple[str, File]]:
    """Yield relative path, size and stamp of every regular file. Links to folders inside a class are not followed: they
    may form a loop."""
    tops = [entry.path for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name)]
    for top in [root, *tops]:
        for parent, inner, files in os.walk(top, onerror=_refuse):
            folder = "" if parent == root else os.path.relpath(parent, root).replace(os.sep, "/") + "/"
            for name in inner:
                if _is_hidden(name):
                    skipped.add("hidden", folder + name)
                elif parent != root and os.path.islink(os.path.join(parent, name)):
                    skipped.add("linked (folders, not followed)", folder + name)
            inner[:] = [] if top == root else [name for name in inner if not _is_hidden(name)]
            for name in files:
                info = _local_info(os.path.join(parent, name))
                if _is_hidden(name):
                    skipped.add("hidden", folder + name)
                elif info is None:
                    skipped.add("not a regular file", folder + name)
                else:
                    yield folder + name, info


def _refuse(error: OSError) -> None:
    raise ValueError(f"data.source: {error.filename}: {error.strerror}") from error


def _local_info(path: str) -> File | None:
    """Return size and stamp of a file; None for pipes and devices, which might never end."""
    try:
        info = os.stat(path)
    except OSError:  # a dangling link, or deleted since it was listed: reading it will fail
        return 0, "0-unreadable"
    return (info.st_size, f"{info.st_size}-{info.st_mtime_ns}") if stat.S_ISREG(info.st_mode) else None


def _remote_files(fs: AbstractFileSystem, root: str, skipped: Skipped) -> Iterator[tuple[str, File]]:
    prefix = root.strip("/")
    for path, info in fs.find(root, detail=True).items():
        key = path.strip("/").removeprefix(prefix).lstrip("/")
        if any(_is_hidden(part) for part in key.split("/")):
            skipped.add("hidden", key)
        else:
            yield key, (int(info["size"] or 0), stamp(info))
