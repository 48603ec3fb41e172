"""Locks a cache, a run or a file, so that only one process at a time changes it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from data.storage import make_folder, naming_the_file, try_lock

_held: set[TextIO] = set()  # by this process


@contextmanager
def claim(file: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock `file`, in a folder of locks; the kernel frees it when the process ends for any reason.

    If another process holds the lock, wait for it or, without `wait`, raise a ValueError that names that process;
    `what` names the work of this process for such messages. Locks are advisory (flock): OSError on a file system
    without them.
    """
    with naming_the_file(file, "locking"):
        handle = _take(file, what, wait=wait)
    with handle:
        _held.add(handle)
        try:
            yield
        finally:
            _held.discard(handle)
            with contextlib.suppress(OSError):  # the lock is free anyway, and the folder may hold other locks
                os.unlink(file)
                os.rmdir(file.parent)


def holder(file: Path) -> str | None:
    """Return who holds the lock `file`, or None. A stale lock of a killed process is deleted."""
    with contextlib.suppress(FileNotFoundError), open(file, "r+", encoding="utf-8") as handle:
        if not try_lock(handle.fileno(), wait=False):
            return handle.read() or "another process"
        os.unlink(file)
    return None


def _take(file: Path, what: str, *, wait: bool) -> TextIO:
    """Open and lock `file` and write the holder's name to it; the lock is held until the file is closed."""
    while True:
        make_folder(file.parent.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(file.parent)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:  # retry if just deleted
            handle = stack.enter_context(open(file, "a+", encoding="utf-8"))
            if not try_lock(handle.fileno(), wait=wait):
                handle.seek(0)
                raise ValueError(f"{file.parent.parent}: {handle.read() or 'another process'} is using it")
            if os.fstat(handle.fileno()).st_nlink == 0:  # its last holder deleted it between our open and our lock
                continue
            handle.truncate(0)
            handle.write(f"{what}, process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')},")
            handle.flush()
            stack.pop_all()
            return handle


def _release_in_child() -> None:
    """Close inherited locks in a forked process, which would otherwise keep them after its parent is killed."""
    for handle in _held:
        handle.close()
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
