"""Does every write, flush, rename and delete of the project: no file has its final name before it is complete.

A crash or a full disk at any operation keeps the previous version; staged leftovers are overwritten by the next run or
deleted by `sweep`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

_FLUSHES = 32  # at a time
_MANY_FILES = 500  # from here on, a flush of the whole disk is sooner done than one of each
_STAGED = ".staged-"  # prefix of unfinished files and folders; no reader looks at them
_CHECKSUM = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')
Result = TypeVar("Result")
_flushed_folders: set[Path] = set()  # whose names this process has flushed to disk


def publish(path: Path, payload: bytes) -> None:
    """Write `payload` to `path` atomically: after a crash at any point, `path` has the new or the previous bytes.

    ValueError if another process is writing it. OSError, with the path, if the disk is full or refuses.
    """
    with staged_file(path) as file:
        file.write(payload)


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` if the block succeeds and is deleted if it fails.

    ValueError if another process is writing it. OSError, with the path, if the disk is full or refuses; an OSError of
    the block about another file is not changed.
    """
    staged = staged_path(path)
    with naming_the_file(path, "writing"):
        make_folder(path.parent)
    try:
        with _create(staged) as file, contextlib.ExitStack() as unfinished:
            unfinished.callback(_unlink, staged)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(staged, path)
            unfinished.pop_all()
        _sync(path.parent)
    except OSError as error:
        if error.filename is not None and str(error.filename) not in (str(staged), str(path.parent)):
            raise
        with naming_the_file(path, "writing"):
            raise


def _create(staged: Path) -> BinaryIO:
    """Create and lock a new file of that name; one that a killed process left is deleted.

    ValueError if a running process is writing it, on this machine or on another one with the same disk.
    """
    while True:
        try:
            file = open(staged, "xb")  # noqa: SIM115 - the caller closes it
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError), open(staged, "r+b") as left:  # unless it was just finished
                if not try_lock(left.fileno(), wait=False):
                    name = staged.with_name(staged.name.removeprefix(_STAGED))
                    raise ValueError(f"{name}: another process is writing it: wait for it") from None
                if _is_at(staged, left):  # and not a newer file of this name
                    os.unlink(staged)
            continue
        if try_lock(file.fileno(), wait=False) and _is_at(staged, file):
            return file
        file.close()  # another process deleted it as stale before it was locked


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Return whether an open file still has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _unlink(staged: Path) -> None:
    with contextlib.suppress(OSError):  # report the first error; deleting frees space on a full disk
        os.unlink(staged)


def publish_json(path: Path, value: Any) -> None:
    """Publish a value as indented JSON."""
    publish(path, (json.dumps(value, indent=2, ensure_ascii=True) + "\n").encode())


def parse_json(text: str | bytes) -> Any:
    """Parse untrusted JSON; ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def publish_checked(path: Path, value: Mapping[str, Any]) -> None:
    """Publish an object as indented JSON whose last field, `sha256`, is the SHA-256 of all bytes before it."""
    publish(path, _unclosed(value) + f',\n  "sha256": "{checksum(value)}"\n}}\n'.encode())


def checksum(value: Mapping[str, Any]) -> str:
    """Return the last field of what `publish_checked` writes for an object."""
    return hashlib.sha256(_unclosed(value)).hexdigest()


def _unclosed(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode().removesuffix(b"\n}")


def strip_checksum(payload: bytes) -> bytes | None:
    """Return the object that `publish_checked` wrote as `payload`, without its checksum; None if a byte has changed."""
    found = _CHECKSUM.search(payload)
    text = payload[: found.start()] if found else b""
    same = found and hashlib.sha256(text).hexdigest().encode() == found.group(1)
    return text + b"\n}" if same else None


def staged_path(path: Path) -> Path:
    """Return where a file or folder is while it is written, which no reader looks at."""
    return path.with_name(_STAGED + path.name)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Create a folder to fill that becomes `path` if the block succeeds and is deleted if it fails.

    `path` must not exist, or hold an older version, which is replaced. Files get the mode that the umask gives:
    safetensors would make them readable by their owner alone.
    """
    staged = staged_path(path)
    remove(staged)
    make_folder(staged)
    try:
        yield staged
        mode = staged.stat().st_mode & 0o666
        folders = list(os.walk(staged, topdown=False))
        files = [os.path.join(folder, name) for folder, _, names in folders for name in names]
        for file in files:
            if mode & ~(now := os.stat(file).st_mode):
                os.chmod(file, now | mode)
        _sync_all(files, staged)
        for folder, _, _ in folders:
            _sync(folder)
        remove(path)
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(OSError):  # another process may still be writing there
            remove(staged)
        raise
    _sync(path.parent)


def write_staged(file: Path, parts: Iterable[bytes | bytearray | memoryview]) -> str:
    """Write a file of a staged folder part by part; return the SHA-256 of the bytes that were to be written.

    The file may be in a new folder of the staged one. OSError, with the file, if the disk is full or refuses.
    """
    sha = hashlib.sha256()
    with naming_the_file(file, "writing"):
        file.parent.mkdir(exist_ok=True)
    with writing(file) as handle:
        for part in parts:
            sha.update(part)
            handle.write(part)
    return sha.hexdigest()


@contextmanager
def writing(file: Path) -> Iterator[BinaryIO]:
    """Open a file of a staged folder for writing in any order; an OSError names it."""
    with naming_the_file(file, "writing"), open(file, "wb") as handle:
        yield handle


def sweep(folder: Path) -> None:
    """Delete staged leftovers of crashes in `folder`; nobody may be writing to it."""
    for left in folder.glob(f"{_STAGED}*"):
        remove(left)


def set_aside(path: Path) -> Path:
    """Rename a file or folder to the first free one of `<name>.1`, `<name>.2`, ...; return the new path."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    with naming_the_file(path, "renaming"):
        os.replace(path, free)
        _sync(path.parent)
    return free


def append_line(path: Path, line: str) -> None:
    """Append one line to a log and flush it to disk."""
    with naming_the_file(path, "writing"):
        new = not path.exists()
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            _sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and flush the names of all of them to disk.

    Names of existing folders are flushed, too: the process that made them may have been killed before it did.
    """
    path = Path(os.path.abspath(path))
    if path in _flushed_folders and path.is_dir():
        return
    if path != path.parent:
        make_folder(path.parent)
        try:
            os.mkdir(path)
        except OSError:  # for an existing folder, it may also be a lack of permission
            if not path.is_dir():
                raise
        with contextlib.suppress(PermissionError):  # to read the folder above
            _sync(path.parent)
    _flushed_folders.add(path)


def remove(path: Path) -> None:
    """Delete a file, or a folder with its contents, and flush that to disk; a missing one is fine."""
    with naming_the_file(path, "deleting"):
        if path.is_dir() and not path.is_symlink():
            for folder, folders, files in os.walk(path, topdown=False):
                for name in files:
                    os.unlink(os.path.join(folder, name))
                for name in folders:
                    inner = os.path.join(folder, name)
                    os.unlink(inner) if os.path.islink(inner) else os.rmdir(inner)
            os.rmdir(path)
        else:
            try:
                os.unlink(path)
            except FileNotFoundError:
                return
        _sync(path.parent)


def probe(folder: Path, field: str) -> None:
    """Check before long work that `folder` is writable; ValueError names the config's `field`."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):  # without a name that another process may use or delete
            pass
    except OSError as error:
        raise ValueError(f"{field}: cannot write to {folder}: {error.strerror}") from error


def free_bytes(folder: Path) -> int:
    """Return how many bytes can still be written to `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def read(path: Path) -> bytes:
    """Read the bytes of a file; an OSError names it."""
    return _reading(path, lambda file: file.read())


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; an OSError names the file."""
    return _reading(path, lambda file: hashlib.file_digest(file, "sha256").hexdigest())


def _reading(path: Path, use: Callable[[io.BufferedReader], Result]) -> Result:
    """Open a file for reading and return the result of `use`; try once more if its handle is stale."""
    with naming_the_file(path, "reading"):
        try:
            with open(path, "rb") as file:
                return use(file)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        with open(path, "rb") as file:  # another machine may have replaced it on a network disk
            return use(file)


@contextmanager
def naming_the_file(path: Path, doing: str) -> Iterator[None]:
    """Make an OSError of the block name `path`, which the kernel does not always do, and say what to do."""
    try:
        yield
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = "does another user own it?" if denied else "finished work is kept: run the same command again to resume"
        reason = f"{error.strerror or error} (while {doing}; {hint})"
        raise OSError(error.errno, reason, str(path)) from error


def try_lock(handle: int, *, wait: bool) -> bool:
    """Lock the open file `handle` (flock) and return whether that worked; with `wait`, wait until the lock is free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _sync_all(files: Sequence[str], folder: Path) -> None:
    """Flush the files in a folder to disk: hundreds of them by Linux's syncfs, which flushes the whole disk at once."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs and len(files) >= _MANY_FILES:
        with naming_the_file(folder, "writing"), _opened(folder) as handle:
            if syncfs(handle):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return
    # a disk flushes at once what several threads wait for
    with ThreadPoolExecutor(min(1 + len(files) // 100, _FLUSHES)) as pool:
        deque(pool.map(_sync, files), maxlen=0)  # raises the first error


def _sync(path: Path | str) -> None:
    """Flush a file's bytes, or the names in a folder, to disk."""
    with _opened(path) as handle:
        os.fsync(handle)


@contextmanager
def _opened(path: Path | str) -> Iterator[int]:
    """Open a file or a folder for the calls that take its handle."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
