"""Every write, rename and delete of the project: nothing is readable under its final name before it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STAGED = ".staged-"  # prefix of unfinished files and folders; no reader looks at them


def publish(path: Path, payload: bytes) -> None:
    """Write `payload` under `path`: all of it or, after a crash at any point, what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(_STAGED + path.name)
    with open(staged, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    _sync_folder(path.parent)


def publish_json(path: Path, value: Any) -> None:
    """`publish` a value as indented JSON."""
    publish(path, (json.dumps(value, indent=2, ensure_ascii=True) + "\n").encode())


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and is gone when it does not.

    `path` must not exist, or hold an older version, which is replaced.
    """
    staged = path.with_name(_STAGED + path.name)
    remove(staged)
    staged.mkdir(parents=True)
    try:
        yield staged
        for file in (f for f in staged.rglob("*") if f.is_file()):
            _sync(file)
        remove(path)
        os.replace(staged, path)
    finally:
        remove(staged)  # gone already, unless the block or the disk failed
    _sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add one line to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds; one that is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
