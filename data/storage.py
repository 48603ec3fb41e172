"""Every write, flush, rename and delete of the project: nothing is readable under its final name before it is
complete.

A crash or a full disk at any operation leaves what was there before; what was left staged is overwritten by the next
run, or swept away.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

_STAGED = ".staged-"  # prefix of unfinished files and folders; no reader looks at them
_CHECKSUM = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')
Result = TypeVar("Result")
_lasting: set[Path] = set()  # folders whose names this process knows to be on the disk


def publish(path: Path, payload: bytes) -> None:
    """Write `payload` under `path`: all of it or, after a crash at any point, what was there before.

    ValueError when another process is writing it. OSError, with the path, when the disk is full or refuses.
    """
    with staged_file(path) as file:
        file.write(payload)


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends well, and is gone when it does not.

    ValueError when another process is writing it. OSError, with the path, when the disk is full or refuses; one that
    the block meets with another file passes as it is.
    """
    staged = path.with_name(_STAGED + path.name)
    with telling(path, "writing"):
        make_folder(path.parent)
    try:
        with _create(staged) as file, contextlib.ExitStack() as unfinished:
            unfinished.callback(_unlink, staged)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(staged, path)
            unfinished.pop_all()
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and str(error.filename) not in (str(staged), str(path.parent)):
            raise
        with telling(path, "writing"):
            raise


def _create(staged: Path) -> BinaryIO:
    """A new file of that name, locked; what a killed process left there is deleted.

    ValueError when a process that is alive is writing it, on this machine or on another one with the same disk.
    """
    while True:
        try:
            file = open(staged, "xb")  # noqa: SIM115 - who asked for it closes it
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError), open(staged, "r+b") as left:  # else it was finished just now
                if not try_lock(left.fileno(), wait=False):
                    name = staged.with_name(staged.name.removeprefix(_STAGED))
                    raise ValueError(f"{name}: another process is writing it: wait for it") from None
                if _is_at(staged, left):  # and not a later one of this name
                    os.unlink(staged)
            continue
        if try_lock(file.fileno(), wait=False) and _is_at(staged, file):
            return file
        file.close()  # somebody took it for what a killed process left, before it was locked


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _unlink(staged: Path) -> None:
    with contextlib.suppress(OSError):  # the first error is the one to tell; a full disk wants its room back
        os.unlink(staged)


def publish_json(path: Path, value: Any) -> None:
    """`publish` a value as indented JSON."""
    publish(path, (json.dumps(value, indent=2, ensure_ascii=True) + "\n").encode())


def parse_json(text: str | bytes) -> Any:
    """What a JSON text of anybody says; ValueError where it is none, or nested more deeply than can be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def publish_checked(path: Path, value: Mapping[str, Any]) -> None:
    """`publish` an object as indented JSON whose last field, `sha256`, is the SHA-256 of all bytes before it."""
    publish(path, _unclosed(value) + f',\n  "sha256": "{checksum(value)}"\n}}\n'.encode())


def checksum(value: Mapping[str, Any]) -> str:
    """The last field of what `publish_checked` writes of an object."""
    return hashlib.sha256(_unclosed(value)).hexdigest()


def _unclosed(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode().removesuffix(b"\n}")


def checked(payload: bytes) -> bytes | None:
    """The object that `publish_checked` wrote as `payload`, without its checksum; None where a byte has changed."""
    found = _CHECKSUM.search(payload)
    text = payload[: found.start()] if found else b""
    same = found and hashlib.sha256(text).hexdigest().encode() == found.group(1)
    return text + b"\n}" if same else None


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and is gone when it does not.

    `path` must not exist, or hold an older version, which is replaced. Files get the mode that the umask gives, whoever
    wrote them: safetensors would keep them from everybody else.
    """
    staged = path.with_name(_STAGED + path.name)
    remove(staged)
    make_folder(staged)
    try:
        yield staged
        mode = staged.stat().st_mode & 0o666
        for file in (f for f in staged.rglob("*") if f.is_file()):
            if mode & ~(now := file.stat().st_mode):
                os.chmod(file, now | mode)
            _sync(file)
        for folder in (*(f for f in staged.rglob("*") if f.is_dir()), staged):
            _sync_folder(folder)
        remove(path)
        os.replace(staged, path)
    finally:
        remove(staged)  # gone already, unless the block or the disk failed
    _sync_folder(path.parent)


def write_staged(file: Path, parts: Iterable[bytes | bytearray | memoryview]) -> str:
    """Write a file of a folder that is staged, a part after the other; the SHA-256 of what was meant to be written.

    OSError, with the file, when the disk is full or refuses.
    """
    sha = hashlib.sha256()
    with writing(file) as handle:
        for part in parts:
            sha.update(part)
            handle.write(part)
    return sha.hexdigest()


@contextmanager
def writing(file: Path) -> Iterator[BinaryIO]:
    """A file of a folder that is staged, open for writing in any order; an OSError names it."""
    with telling(file, "writing"):
        file.parent.mkdir(exist_ok=True)
        with open(file, "wb") as handle:
            yield handle


def sweep(folder: Path) -> None:
    """Delete what crashes have left staged in `folder`, to which nobody may be writing."""
    for left in folder.glob(f"{_STAGED}*"):
        remove(left)


def set_aside(path: Path) -> Path:
    """Rename a file or folder to the first of `<name>.1`, `<name>.2`, ... that is free; the new path."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    with telling(path, "renaming"):
        os.replace(path, free)
        _sync_folder(path.parent)
    return free


def append_line(path: Path, line: str) -> None:
    """Add one line to a log, and have it on the disk."""
    with telling(path, "writing"):
        new = not path.exists()
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            _sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where they are missing, and have the names of all of them on the disk.

    A folder that is there already may be of a process that was killed before it had done so.
    """
    path = Path(os.path.abspath(path))
    if path in _lasting and path.is_dir():
        return
    if path != path.parent:
        make_folder(path.parent)
        try:
            os.mkdir(path)
        except OSError:  # of folders above ours it may also say that they cannot be written
            if not path.is_dir():
                raise
        with contextlib.suppress(PermissionError):  # nor read
            _sync_folder(path.parent)
    _lasting.add(path)


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds, for good; one that is not there is fine."""
    with telling(path, "deleting"):
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
        _sync_folder(path.parent)


def probe(folder: Path, field: str) -> None:
    """ValueError, naming the config's `field`, when nothing can be written to `folder`: asked before long work."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):  # of no name that another process may take or delete
            pass
    except OSError as error:
        raise ValueError(f"{field}: cannot write to {folder}: {error.strerror}") from error


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written to `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def read(path: Path) -> bytes:
    """The bytes of a file; an OSError names it."""
    return _reading(path, lambda file: file.read())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; an OSError names the file."""
    return _reading(path, lambda file: hashlib.file_digest(file, "sha256").hexdigest())


def _reading(path: Path, use: Callable[[io.BufferedReader], Result]) -> Result:
    """What `use` makes of a file that is open for reading, from its beginning."""
    with telling(path, "reading"):
        try:
            with open(path, "rb") as file:
                return use(file)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        with open(path, "rb") as file:  # which another machine has replaced on a network disk, perhaps
            return use(file)


@contextmanager
def telling(path: Path, doing: str) -> Iterator[None]:
    """An OSError from here names `path`, as the kernel does not always, and says what to do."""
    try:
        yield
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = "is it another user's?" if denied else "what was finished stays, the same command goes on"
        reason = f"{error.strerror or error} (while {doing}; {hint})"
        raise OSError(error.errno, reason, str(path)) from error


def try_lock(handle: int, *, wait: bool) -> bool:
    """Whether the open file `handle` is locked now (flock), by this process; with `wait`, once it is free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


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
