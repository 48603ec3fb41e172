"""Disks that fail, fill up or lose power, and processes that die on them."""

from __future__ import annotations

import builtins
import errno
import gc
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import data.storage
from data.cache.listing import Rows
from data.cache.manifest import Plan
from data.cache.records import load_failures
from data.cache.writer import CacheWriter, EncodedShard


def forked(work: Callable[[], object]) -> int:
    """The number of a process that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


Fault = Callable[[str, object, Callable[[], object]], object]  # given an operation, its first argument and its half


OPERATIONS = {"fsync", "mkdir", "makedirs", "open", "replace", "rmdir", "unlink"}


class Disk:
    """What `data.storage` takes for `os`: `fault` hears of every operation that changes the disk, before it is done.

    Nothing is flushed to the disk: that takes time, and shows when a machine dies, not when a process does.
    """

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name) if name != "fsync" else lambda handle: None
        return self._heard(name, real) if name in OPERATIONS else real

    def open_file(self, file: Path, mode: str = "r", **options: Any) -> Any:
        if mode in ("rb", "r", "r+"):
            return builtins.open(file, mode, **options)
        return File(self._heard("open", builtins.open)(file, mode, **options), self._fault)

    def _heard(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operate(first: Any, *args: Any, **options: Any) -> Any:
            self._fault(name, first, lambda: None)
            return real(first, *args, **options)

        return operate


class File:
    """A file open for writing, whose writes and flushes `fault` hears of."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> None:
        self._fault("write", None, lambda: (self._file.write(content[: len(content) // 2]), self._file.flush()))
        self._file.write(content)

    def flush(self) -> None:
        self._fault("flush", None, lambda: None)
        self._file.flush()


def use_disk(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    disk = Disk(fault)
    monkeypatch.setattr(data.storage, "os", disk)
    monkeypatch.setattr(data.storage, "open", disk.open_file, raising=False)


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    results: dict[Any, Any] = {}

    def remembered(*args: Any) -> Any:
        key = tuple(arg.tobytes() if isinstance(arg, np.ndarray) else arg for arg in args)
        if key not in results:
            results[key] = function(*args)
        return results[key]

    return remembered


class Death:
    """Kills this process in operation n, with half of it done where it is a write."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, name: str, argument: object, half: Callable[[], object]) -> None:
        self.left -= 1
        if self.left == 0:
            half()
            os.kill(os.getpid(), signal.SIGKILL)


def on_disk(work: Callable[[], object], fault: Fault) -> int:
    """The number of a process that does `work` on a disk with this fault."""

    def begin() -> None:
        gc.disable()
        use_disk(pytest.MonkeyPatch(), fault)
        work()

    return forked(begin)


def was_killed(child: int) -> bool:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def entries(folder: Path) -> dict[str, bytes | None]:
    """Every folder and the contents of every file, unfinished ones included; not the locks, which nobody holds."""
    found = {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
    return {str(name): content for name, content in sorted(found.items()) if name.parts[0] != ".locks"}


class Encode(NamedTuple):
    """A run of the encoder: row i of `plan` has the moments i + `shift`, and the rows in `failures` fail."""

    plan: Plan
    failures: dict[int, str]
    shift: float = 0.0
    change: bool = False
    retry: bool = False
    only: tuple[int, ...] | None = None  # shards, after which it stops

    def run(self, path: Path) -> set[int]:
        """The rows that it encoded."""
        plan, encoded = self.plan, set()
        names = [f"{row}.png" for row in range(plan.rows)]
        rows = Rows(names, np.arange(plan.rows) % 2, plan.classes, names, np.arange(plan.rows))
        writer = CacheWriter(path, plan, rows, change=self.change)
        with writer.claimed():
            if self.retry:
                writer.redo([failure.row for failure in load_failures(path)])
            for shard in writer.pending() if self.only is None else self.only:
                fresh = writer.rows_to_encode(shard)
                moments = np.broadcast_to(fresh.reshape(-1, 1, 1, 1, 1), (len(fresh), *plan.row_shape))
                mine = {row: reason for row, reason in self.failures.items() if row in fresh}
                writer.write(EncodedShard(shard, fresh, moments + self.shift, mine))
                encoded |= set(fresh.tolist())
            writer.finish()
        return encoded


class FullDisk:
    """A disk whose user's share is full from operation n on; or all of it in that one alone, when somebody makes room
    at once."""

    def __init__(self, n: int, *, for_good: bool) -> None:
        self.n, self.for_good, self.count = n, for_good, 0
        self.error = errno.EDQUOT if for_good else errno.ENOSPC

    def __call__(self, name: str, argument: object, half: Callable[[], object]) -> None:
        self.count += 1
        if self.count == self.n or (self.count > self.n and self.for_good and name not in ("rmdir", "unlink")):
            half()
            named = [str(argument)] if isinstance(argument, str | Path) else []  # the kernel does not know it otherwise
            raise OSError(self.error, os.strerror(self.error), *named)
