"""A process that dies, or a disk that is full, in any operation of the disk: what was finished stays, and the next
process ends with the bytes of a run that nothing disturbed.
"""

from __future__ import annotations

import functools
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data.cache.manifest import MANIFEST
from data.cache.reader import LatentCache
from data.cache.records import existing_plan, load_records, progress
from tests.helpers.disks import (
    Death,
    Encode,
    FullDisk,
    entries,
    on_disk,
    use_disk,
    was_killed,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child uses no other thread


def check_accounts(path: Path) -> None:
    """What is recorded is there, byte for byte, and all images are accounted for."""
    if not existing_plan(path):
        return
    committed, failed, pending = progress(path)
    shards = [record.shard for record in load_records(path).values()]
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
            assert "run the same command again to resume" in str(error)
            assert not list(path.rglob(".staged-*"))
            for record in load_records(path).values():
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
        grown = first.plan.changed(rows=24, data_fingerprint="0" * 64, data_bytes=24_000)
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
        with pytest.raises(ValueError, match=r"no image has latents: 0\.png: asleep"):
            hopeless.run(path)
        assert entries(path) == {}

    for path in crashes(refused, tmp_path, start):
        refused(Path(shutil.copytree(path, f"{path} again")))
        first._replace(retry=True).run(path)
        assert entries(path) == entries(whole), path.name
