"""A process that dies, or a disk that is full, in any operation of the disk: what was finished stays, and the next
process ends with the bytes of a run that nothing disturbed.
"""

from __future__ import annotations

import builtins
import errno
import functools
import gc
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest

import data.storage
from data.cache.formats import FORMATS
from data.cache.listing import Rows
from data.cache.manifest import MANIFEST, Plan
from data.cache.reader import LatentCache
from data.cache.records import existing_plan, progress, recorded, recorded_failures
from data.cache.writer import CacheWriter
from tests.test_writer import forked

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child uses no other thread
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


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, where the system has such a folder: a test makes ten thousand files."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shards are made a thousand times here: each is encoded once, and nothing is flushed to the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for module in FORMATS.values():
        for name in ("encode_shard", "other_files"):
            monkeypatch.setattr(module, name, remembering(getattr(module, name)))


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
                writer.redo([failure.row for failure in recorded_failures(path)])
            for shard in writer.pending() if self.only is None else self.only:
                fresh = writer.rows_to_encode(shard)
                moments = np.broadcast_to(fresh.reshape(-1, 1, 1, 1, 1), (len(fresh), *plan.row_shape))
                mine = {row: reason for row, reason in self.failures.items() if row in fresh}
                writer.write(shard, moments + self.shift, mine)
                encoded |= set(fresh.tolist())
            writer.finish()
        return encoded


@pytest.fixture
def small(plan: Plan) -> Plan:
    """Shards of 16 and 4 rows."""
    return plan.model_copy(update={"rows": 20, "shard_rows": 16})


@pytest.fixture
def first(small: Plan) -> Encode:
    return Encode(small, {17: "unreadable", 18: "unreadable"})


def check_accounts(path: Path) -> None:
    """What is recorded is there, byte for byte, and all images are accounted for."""
    if not existing_plan(path):
        return
    committed, failed, pending = progress(path)
    shards = [record.shard for record in recorded(path).values()]
    assert (committed + failed, failed) == (sum(s.rows for s in shards), sum(s.failed for s in shards))
    assert [shard.problem(path) for shard in shards] == [None] * len(shards)
    assert pending >= 0
    if (path / MANIFEST).exists():
        LatentCache(path).verify()
        assert pending == 0


def crashes(work: Callable[[Path], object], tmp_path: Path, start: Path | None = None) -> Iterator[Path]:
    """For every operation of `work` what a process left behind that was killed in it, having begun with `start`."""
    ahead: deque[tuple[Path, int]] = deque()  # processes that are dying while the one before them is looked at
    try:
        for n in range(1, 1000):
            path = tmp_path / f"killed in {n}"
            if start:
                shutil.copytree(start, path)
            ahead.append((path, on_disk(functools.partial(work, path), Death(n))))
            if len(ahead) > 2:
                path, child = ahead.popleft()
                if not was_killed(child):
                    break
                check_accounts(path)
                yield path
        assert n > 40  # a file has eight operations
    finally:
        for _, child in ahead:
            was_killed(child)


def test_a_run_that_is_killed_anywhere_and_continued_equals_one_undisturbed(first: Encode, tmp_path: Path) -> None:
    first.run(tmp_path / "whole")
    whole = entries(tmp_path / "whole")
    for path in crashes(first.run, tmp_path):
        first.run(path)
        assert entries(path) == whole, path.name


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


@pytest.mark.parametrize("for_good", [False, True], ids=["for a moment", "for good"])
def test_a_disk_that_is_full_at_any_time_costs_nothing_that_was_finished(
    first: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_good: bool
) -> None:
    first.run(tmp_path / "whole")
    whole, told = entries(tmp_path / "whole"), 0
    for n in range(1, 1000):
        path, disk = tmp_path / f"full in {n}", FullDisk(n, for_good=for_good)
        with monkeypatch.context() as patch:
            use_disk(patch, disk)
            error = raised_by(functools.partial(first.run, path))
        if disk.count < n:
            break
        check_accounts(path)
        if error:
            told += 1
            assert (error.errno, "\n" in str(error)) == (disk.error, False)
            assert str(error.filename).startswith(str(path))
            assert "the same command goes on" in str(error)
            assert not list(path.rglob(".staged-*"))
            for record in recorded(path).values():
                assert (path / record.shard.file).read_bytes() == whole[record.shard.file]
        first.run(path)
        assert entries(path) == whole, n
    assert told > 90  # all but a lock that could not be deleted


def raised_by(work: Callable[[], object]) -> OSError | None:
    try:
        work()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("only", [None, (1,)], ids=["a finished cache", "an unfinished cache"])
def test_a_change_of_a_cache_that_is_killed_anywhere_and_repeated_equals_one_undisturbed(
    first: Encode, tmp_path: Path, only: tuple[int, ...] | None
) -> None:
    """What is kept is told from what is encoded again by a shift of all that the second run encodes; each change of
    each format is tried on one kind of cache."""
    command = "extend" if (first.plan.format == "zarr") == (only is None) else "retry"
    if command == "extend":
        grown = first.plan.model_copy(update={"rows": 24, "data_fingerprint": "0" * 64, "data_bytes": 24_000})
        second, expected = Encode(grown, {20: "unreadable"}, 0.5, change=True), set(range(20, 24))
    else:
        second, expected = Encode(first.plan, {18: "still unreadable"}, 0.5, change=True, retry=True), {17, 18}
    if only:
        expected |= set(range(16))
    start, whole = tmp_path / "start", tmp_path / "whole"
    first._replace(only=only).run(start)
    shutil.copytree(start, whole)
    assert second.run(whole) == expected
    cache, undisturbed = LatentCache(whole), entries(whole)
    values = cache.read(np.arange(len(cache)))[:, 0, 0, 0, 0]
    np.testing.assert_array_equal(values, cache.rows + np.where(np.isin(cache.rows, list(expected)), 0.5, 0))
    for path in crashes(second.run, tmp_path, start):
        assert second.run(path) <= expected
        assert entries(path) == undisturbed, path.name


def test_a_cache_without_any_image_that_is_killed_anywhere_can_be_encoded_again(first: Encode, tmp_path: Path) -> None:
    """It is taken away in a refusal: were any of it left, it would be taken for what was encoded."""
    hopeless = first._replace(failures=dict.fromkeys(range(20), "asleep"))
    start, whole = tmp_path / "start", tmp_path / "whole"
    hopeless._replace(only=(0,)).run(start)
    first.run(whole)

    def refused(path: Path) -> None:
        with pytest.raises(ValueError, match=r"no image could be encoded: 0\.png: asleep"):
            hopeless.run(path)
        assert entries(path) == {}

    for path in crashes(refused, tmp_path, start):
        refused(Path(shutil.copytree(path, f"{path} again")))
        first._replace(retry=True).run(path)
        assert entries(path) == entries(whole), path.name
