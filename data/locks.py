"""Locks between processes: one at a time changes a cache, a run or a file."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from data.storage import make_folder, telling, try_lock

_held: set[TextIO] = set()  # by this process


@contextmanager
def claim(file: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock `file`, in a folder of locks, which the kernel frees when the process ends, however it ends.

    Held by another process, it is waited for or, without `wait`, a ValueError names that process; `what` says what
    is being done. Locks are advisory (flock): on a file system without them, OSError says so.
    """
    with telling(file, "locking"):
        handle = _take(file, what, wait=wait)
    with handle:
        _held.add(handle)
        try:
            yield
        finally:
            _held.discard(handle)
            with contextlib.suppress(OSError):  # it is free all the same, and others may have theirs beside it
                os.unlink(file)
                os.rmdir(file.parent)


def holder(file: Path) -> str | None:
    """Who holds the lock `file`; None when nobody does. One that a killed process left is deleted."""
    with contextlib.suppress(FileNotFoundError), open(file, "r+", encoding="utf-8") as handle:
        if not try_lock(handle.fileno(), wait=False):
            return handle.read() or "another process"
        os.unlink(file)
    return None


def _take(file: Path, what: str, *, wait: bool) -> TextIO:
    """The lock `file`, open, with its holder's name in it; it is held until it is closed."""
    while True:
        make_folder(file.parent.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(file.parent)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:  # else its folder went just now
            handle = stack.enter_context(open(file, "a+", encoding="utf-8"))
            if not try_lock(handle.fileno(), wait=wait):
                handle.seek(0)
                raise ValueError(f"{file.parent.parent}: {handle.read() or 'another process'} is at work on it")
            if os.fstat(handle.fileno()).st_nlink == 0:  # its last holder deleted it between our open and our lock
                continue
            handle.truncate(0)
            handle.write(f"{what}, process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')},")
            handle.flush()
            stack.pop_all()
            return handle


def _let_go() -> None:
    """A forked process has no part in its parent's locks: it would keep them when the parent is killed."""
    for handle in _held:
        handle.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
