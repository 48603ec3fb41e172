"""Writing a latent cache: by many processes, in many runs, and from data sets that change."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data.cache.formats import FORMATS
from data.cache.listing import Rows
from data.cache.manifest import MANIFEST, Draft, Manifest, Plan
from data.cache.reader import FAILURES, LatentCache
from data.cache.records import load_failures, load_records, progress
from data.cache.writer import CacheWriter, DamagedShardsError, EncodedShard, Job
from data.storage import probe
from tests.helpers.disks import forked

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child uses no other thread
Moments = NDArray[np.floating]
BROKEN = {5: "unreadable", 40: "unreadable", 70: "unreadable"}


def entries(folder: Path) -> dict[str, bytes | None]:
    """Every folder and the contents of every file, unfinished ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def write(
    writer: CacheWriter, moments: Moments, failures: Mapping[int, str], shards: Collection[int] | None = None
) -> None:
    """Write `shards`, by default all that are pending."""
    for shard in writer.pending() if shards is None else shards:
        fresh = writer.rows_to_encode(shard)
        mine = {row: reason for row, reason in failures.items() if row in fresh}
        writer.write(EncodedShard(shard, fresh, moments[fresh], mine))


def encode(writer: CacheWriter, moments: Moments, failures: Mapping[int, str] = BROKEN, **options: Any) -> None:
    """Write what is pending and finish, as one process does it."""
    with writer.claimed():
        write(writer, moments, failures, **options)
        writer.finish()


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing takes time, and shows when a machine dies, not when a process does."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def whole(tmp_path: Path, plan: Plan, rows: Rows, moments: Moments) -> dict[str, bytes | None]:
    """What one process writes in one run."""
    encode(CacheWriter(tmp_path / "whole", plan, rows), moments)
    return entries(tmp_path / "whole")


# Jobs


@pytest.mark.parametrize("shards", [1, 2, 3, 10, 1251])
def test_shares_of_jobs_are_every_shard_once_and_as_alike_as_can_be(shards: int) -> None:
    for jobs in (1, 2, 3, 5, 7, 64):
        shares = [Job(number, jobs).share(shards) for number in range(jobs)]
        assert list(itertools.chain(*shares)) == list(range(shards))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("jobs", [1, 2, 3, 5, 7])
def test_jobs_in_any_order_write_the_same_files_and_the_last_one_the_manifest(
    tmp_path: Path, plan: Plan, rows: Rows, moments: Moments, whole: dict[str, bytes | None], jobs: int
) -> None:
    orders = [range(jobs), *(np.random.default_rng(seed).permutation(jobs) for seed in range(3))]
    for number, order in enumerate(orders):
        path, left = tmp_path / f"order {number}", plan.shard_count
        for job in order:
            writer = CacheWriter(path, plan, rows, Job(int(job), jobs))
            with writer.claimed():
                left -= len(writer.pending())
                write(writer, moments, BROKEN)
                assert (writer.finish() is None) == (left > 0) == (not (path / MANIFEST).exists())
        assert entries(path) == whole


def test_jobs_that_write_in_turns_write_the_same_files(
    path: Path, plan: Plan, rows: Rows, moments: Moments, whole: dict[str, bytes | None]
) -> None:
    with ExitStack() as stack:
        writers = [CacheWriter(path, plan, rows, Job(number, 2)) for number in range(2)]
        for writer in writers:
            stack.enter_context(writer.claimed())
        for writer, shard in ((writers[1], 2), (writers[0], 0), (writers[1], 1)):
            assert writer.finish() is None
            write(writer, moments, BROKEN, [shard])
        manifests = [writer.finish() for writer in writers]
        assert manifests[0] == manifests[1] == LatentCache(path).manifest
    assert entries(path) == whole


@pytest.mark.parametrize("jobs", [3, 7])
def test_processes_at_work_at_once_write_the_same_files(
    tmp_path: Path, plan: Plan, rows: Rows, moments: Moments, whole: dict[str, bytes | None], jobs: int
) -> None:
    """Over and over, as they meet in another place each time."""
    for number in range(6):
        path, (start, go) = tmp_path / f"run {number}", os.pipe()

        def work(number: int, path: Path = path, start: int = start, go: int = go) -> None:
            os.close(go)
            os.read(start, 1)  # ends when the last holder of `go`, the test, has closed it
            probe(path, "cache.path")
            writer = CacheWriter(path, plan, rows, Job(number, jobs))
            with writer.claimed():
                assert {failure.row for failure in load_failures(path)} <= set(BROKEN)
                write(writer, moments, BROKEN)
                writer.write_failures()
                writer.finish()

        children = [forked(functools.partial(work, number)) for number in range(jobs)]
        os.close(go)
        os.close(start)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * jobs
        assert entries(path) == whole


# Locks


@contextmanager
def another(writer: CacheWriter, inner: Callable[[], object] = lambda: None) -> Iterator[int]:
    """The number of a process that is at work with `writer` until it is killed."""
    ready, tell = os.pipe()

    def work() -> None:
        with writer.claimed():
            inner()
            os.write(tell, b".")
            signal.pause()

    child = forked(work)
    try:
        assert os.read(ready, 1) == b"."
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (Job(), Job(), "is using it"),
        (Job(1, 2), Job(1, 2), "is using it"),
        (Job(), Job(1, 2), "another number of jobs"),
        (Job(1, 2), Job(), "another number of jobs"),
        (Job(0, 2), Job(2, 3), "another number of jobs"),
    ],
)
def test_a_second_writer_of_the_same_shards_is_refused_until_the_first_is_dead(
    path: Path, plan: Plan, rows: Rows, first: Job, second: Job, told: str
) -> None:
    writer = CacheWriter(path, plan, rows, second)
    with another(CacheWriter(path, plan, rows, first)) as process:
        who = rf"{path}: job {first}, process {process} on {socket.gethostname()} since .*{told}"
        for _ in range(2):  # a refusal leaves the lock as it was
            with pytest.raises(ValueError, match=who), writer.claimed():
                pass
    with writer.claimed():
        pass
    assert not (path / ".locks").exists()


def test_writers_of_other_shards_are_let_in_together(path: Path, plan: Plan, rows: Rows, moments: Moments) -> None:
    with another(CacheWriter(path, plan, rows, Job(0, 2))):
        writer = CacheWriter(path, plan, rows, Job(1, 2))
        encode(writer, moments)
        assert writer.pending() == []
    encode(CacheWriter(path, plan, rows, Job(0, 2)), moments)
    assert len(LatentCache(path)) == 72


def test_the_lock_of_a_killed_process_is_free_even_while_processes_live_that_it_started(
    path: Path, plan: Plan, rows: Rows
) -> None:
    """Such as those that read images ahead of it."""
    reader, tell = os.pipe()

    def read_ahead() -> None:
        os.write(tell, os.getpid().to_bytes(8, "little"))
        signal.pause()

    with another(CacheWriter(path, plan, rows), lambda: forked(read_ahead)):
        child = int.from_bytes(os.read(reader, 8), "little")
    try:
        writer = CacheWriter(path, plan, rows)
        with writer.claimed():
            os.kill(child, 0)  # it is alive
            assert writer.pending() == [0, 1, 2]
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        os.close(tell)


# Accounts


def check_accounts(path: Path, plan: Plan, shards: Collection[int], failed: Collection[int]) -> None:
    """Every image is committed, failed or pending; `shards` are there, and `failed` are the failures in them."""
    expected = sum(len(plan.rows_of(shard)) for shard in shards)
    assert progress(path) == (expected - len(failed), len(failed), plan.rows - expected)
    assert sorted(load_records(path)) == sorted(shards)
    assert [failure.row for failure in load_failures(path)] == sorted(failed)


def test_images_are_committed_failed_or_pending_at_every_moment(
    path: Path, plan: Plan, rows: Rows, moments: Moments
) -> None:
    moments[34, 0, 0, 0, 0] = np.nan
    writer = CacheWriter(path, plan, rows)
    with writer.claimed():
        check_accounts(path, plan, [], [])
        for shards, failed in (([1], {34, 40}), ([1, 2], {34, 40, 70}), ([0, 1, 2], {5, 34, 40, 70})):
            write(writer, moments, BROKEN, shards[-1:] if shards[0] else [0])
            check_accounts(path, plan, shards, failed)
        writer.finish()
    check_accounts(path, plan, [0, 1, 2], {5, 34, 40, 70})
    with writer.claimed():
        writer.redo([5, 6])
        check_accounts(path, plan, [1, 2], {34, 40, 70})
        write(writer, moments, {5: "unreadable"})
        check_accounts(path, plan, [0, 1, 2], {5, 34, 40, 70})
        writer.finish()
    assert len(LatentCache(path)) == plan.rows - 4


def failures_of(path: Path) -> list[tuple[int, str, str]]:
    lines = [json.loads(line) for line in (path / FAILURES).read_text(encoding="utf-8").splitlines()]
    return [(line["row"], line["key"], line["reason"]) for line in lines]


def test_the_list_of_failures_has_the_path_and_the_reason_before_the_cache_is_finished_and_after(
    path: Path, plan: Plan, rows: Rows, moments: Moments
) -> None:
    writer, expected = CacheWriter(path, plan, rows), [(row, rows.keys[row], BROKEN[row]) for row in (5, 40)]
    with writer.claimed():
        write(writer, moments, BROKEN, [1, 0])
        writer.write_failures()
        assert failures_of(path) == expected
    encode(writer, moments)
    assert failures_of(path) == [*expected, (70, rows.keys[70], BROKEN[70])]
    assert LatentCache(path).lines(FAILURES)  # its hash is the manifest's


def test_what_is_mended_leaves_the_list_of_failures_and_what_still_fails_has_its_new_reason(
    path: Path, plan: Plan, rows: Rows, moments: Moments
) -> None:
    writer = CacheWriter(path, plan, rows)
    encode(writer, moments)
    with writer.claimed():
        writer.redo([5, 70])
        assert writer.pending() == [0, 2]
        assert [writer.rows_to_encode(shard).tolist() for shard in (0, 2)] == [[5], [70]]
        assert [f.row for f in writer.write(EncodedShard(2, np.array([70]), moments[[70]], {70: "truncated"}))] == [70]
        assert writer.write(EncodedShard(0, np.array([5]), moments[[5]], {})) == []
        writer.finish()
    assert failures_of(path) == [(40, rows.keys[40], "unreadable"), (70, rows.keys[70], "truncated")]
    cache, good = LatentCache(path), np.setdiff1d(np.arange(plan.rows), [40, 70])
    np.testing.assert_array_equal(cache.rows, good)
    np.testing.assert_array_equal(cache.read(np.arange(len(good))), moments[good].astype(plan.dtype))


def test_mending_all_failures_ends_as_if_nothing_had_failed(
    tmp_path: Path, path: Path, plan: Plan, rows: Rows, moments: Moments
) -> None:
    encode(CacheWriter(tmp_path / "never failed", plan, rows), moments, {})
    writer = CacheWriter(path, plan, rows)
    encode(writer, moments)
    with writer.claimed():
        writer.redo(BROKEN)
        write(writer, moments, {})
        writer.finish()
    assert entries(path) == entries(tmp_path / "never failed")


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_of_failures_alone_is_kept_and_redone_like_any_other(
    path: Path, plan: Plan, rows: Rows, moments: Moments, finished: bool
) -> None:
    writer, failed = CacheWriter(path, plan, rows), dict.fromkeys(range(64, 75), "unreadable")
    encode(writer, moments, failed, shards=None if finished else [1, 2])
    with writer.claimed():
        writer.redo([66])
        assert writer.rows_to_encode(2).tolist() == [66]
        write(writer, moments, {}, [2])
        writer.redo(plan.rows_of(2))  # all of a shard, of which some was kept before
        assert writer.rows_to_encode(2).tolist() == list(plan.rows_of(2))
        write(writer, moments, {})
        writer.finish()
    assert len(LatentCache(path)) == plan.rows
    LatentCache(path).verify()


def grown(plan: Plan, rows: Rows, count: int) -> tuple[Plan, Rows]:
    """`count` images of a new class are behind those that were there."""
    more = [f"owl/{i}.png" for i in range(count)]
    listing = Rows(
        [*rows.keys, *more],
        np.concatenate([rows.labels, np.full(count, 2)]),
        (*rows.classes, "owl"),
        [*rows.stamps, *more],
        np.arange(plan.rows + count),
    )
    changes = {"rows": plan.rows + count, "classes": listing.classes, "data_fingerprint": "e" * 64, "data_bytes": 1}
    return plan.changed(**changes), listing


@pytest.mark.parametrize("count", [1, 21, 60], ids=["within a shard", "to the end of a shard", "and two more shards"])
@pytest.mark.parametrize("finished", [True, False])
def test_extending_encodes_what_is_new_and_keeps_the_rest_as_it_is(
    path: Path, plan: Plan, rows: Rows, moments: Moments, count: int, finished: bool
) -> None:
    encode(CacheWriter(path, plan, rows), moments, shards=None if finished else [0, 2])
    longer, listing = grown(plan, rows, count)
    with pytest.raises(ValueError, match=r"has rows = 75, this run has"):
        CacheWriter(path, longer, listing)
    writer, new = CacheWriter(path, longer, listing, change=True), set(range(75, 75 + count))
    values = np.concatenate([moments + 100, moments])[: longer.rows]  # rows that are encoded again would show
    with writer.claimed():
        expected = new if finished else new | set(range(32, 64))
        assert set(np.concatenate([writer.rows_to_encode(shard) for shard in writer.pending()])) == expected
        write(writer, values, {76: "unreadable"} if count > 1 else {})
        writer.finish()
    cache = LatentCache(path)
    cache.verify()
    kept = cache.rows[~np.isin(cache.rows, list(expected))]
    np.testing.assert_array_equal(kept, np.setdiff1d(np.arange(75), [*BROKEN, *expected]))
    of_kept, of_new = np.searchsorted(cache.rows, kept), np.flatnonzero(np.isin(cache.rows, list(expected)))
    np.testing.assert_array_equal(cache.read(of_kept), moments[kept].astype(plan.dtype))
    np.testing.assert_array_equal(cache.read(of_new), values[cache.rows[of_new]].astype(plan.dtype))
    assert cache.labels.tolist() == listing.labels[cache.rows].tolist()
    assert writer.is_done()


@pytest.mark.parametrize("damage", [lambda b: b[:-1] + b"!", lambda b: b[:-512], lambda b: b""])
@pytest.mark.parametrize("copied", [False, True], ids=["the shard", "its copy"])
def test_a_kept_shard_whose_bytes_rotted_is_written_anew(
    path: Path, plan: Plan, rows: Rows, moments: Moments, damage: Callable[[bytes], bytes], copied: bool
) -> None:
    writer = CacheWriter(path, plan, rows)
    encode(writer, moments)
    shard = path / FORMATS[plan.format].shard_file(0)
    with writer.claimed():
        writer.redo([5])
        rotten = path / "records" / "000000.kept" if copied else shard
        rotten.write_bytes(damage(shard.read_bytes()))
        if not copied:  # the copy can be made again
            with pytest.raises(DamagedShardsError, match=f"{shard}: .*: 1 shard must be written again"):
                write(writer, moments, {})
            assert writer.finish() is None
            assert writer.rows_to_encode(0).tolist() == list(plan.rows_of(0))
        write(writer, moments, {})
        writer.finish()
    assert len(LatentCache(path)) == plan.rows - 2
    LatentCache(path).verify()


def test_names_that_are_not_utf_8_are_found_again_in_an_unfinished_and_a_finished_cache(
    path: Path, plan: Plan, rows: Rows, moments: Moments
) -> None:
    keys = [os.fsdecode(b"cat/\xff%d.png" % row) for row in range(plan.rows)]  # as the file system gives them
    source: Any = SimpleNamespace(keys=keys, labels=rows.labels, classes=plan.classes, stamps=rows.stamps)
    writer = CacheWriter(path, plan, Rows.of(source))
    with writer.claimed():
        write(writer, moments, {5: os.fsdecode(b"no such file: \xff5.png")}, [0])
        writer.write_failures()
    assert failures_of(path) == [(5, r"cat/\xff5.png", r"no such file: \xff5.png")]
    assert Rows.load(path, Draft(**dict(plan), files=(writer.rows.file,))).keys == keys
    encode(writer, moments, {})
    assert Rows.load(path, Manifest.load(path)).keys == keys
    assert LatentCache(path).keys() == keys[:5] + keys[6:]


# What is refused

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "truncated": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: b"{" + text,
    "not UTF-8": lambda text: text.replace(b'"', b'"\xff', 1),
    "a list": lambda text: b"[]",
    "a wrong type": lambda text: text.replace(b'"rows": ', b'"rows": "many", "were": '),
    "a field too few": lambda text: text.replace(b'"rows"', b'"lines"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["plan.json", "records/000001.json", "records/000002.kept.json"])
def test_a_damaged_plan_or_record_is_refused_by_its_name(
    path: Path, plan: Plan, rows: Rows, moments: Moments, name: str, damage: str
) -> None:
    writer = CacheWriter(path, plan, rows)
    encode(writer, moments)
    with writer.claimed():
        writer.redo([70])
    file = path / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{file}: damaged or edited: .*: delete "):
        encode(CacheWriter(path, plan, rows), moments)
    if "kept" not in name:
        with pytest.raises(ValueError, match=f"^{file}: "):
            progress(path)


@pytest.mark.parametrize("was_finished", [False, True])
def test_a_cache_without_any_image_leaves_nothing_but_what_was_there(
    path: Path, plan: Plan, rows: Rows, moments: Moments, was_finished: bool
) -> None:
    path.mkdir()
    (path / ".hidden").write_bytes(b"dear to somebody")
    writer = CacheWriter(path, plan, rows)
    if was_finished:
        encode(writer, moments)
    with writer.claimed():
        writer.redo(range(plan.rows))
        write(writer, moments, dict.fromkeys(range(plan.rows), "asleep"))
        writer.write_failures()
        with pytest.raises(ValueError, match=r"^no image has latents: cat/0\.png: asleep$"):
            writer.finish()
    assert entries(path) == {".hidden": b"dear to somebody"}
    encode(CacheWriter(path, plan, rows), moments)
    assert len(LatentCache(path)) == plan.rows - len(BROKEN)
