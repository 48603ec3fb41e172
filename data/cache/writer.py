"""Writes a latent cache: shard by shard, by any number of jobs, the manifest last.

`CacheWriter.write` publishes a shard, whose bytes the format's `encode_shard` makes; `CacheWriter.finish` publishes all
other files. Until the manifest exists, `plan.json` describes the cache and `records/` holds a record of each published
shard. To change a finished cache, the writer reopens it: it turns the manifest back into a plan and records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.cache.formats import FORMATS
from data.cache.listing import Rows, listing_of
from data.cache.manifest import (
    FAILED,
    MANIFEST,
    Draft,
    Failure,
    File,
    KeptShard,
    Manifest,
    Plan,
    Shard,
    ShardRecord,
    parse,
)
from data.cache.reader import DIGESTS, FAILURES, ROWS
from data.cache.records import PLAN, RECORDS, REWRITE_SHARD, check_plan, existing_plan, load_failures, load_records
from data.locks import claim, holder
from data.storage import publish, publish_checked, read, remove, sha256_file
from data.text import counted, printable

_LOCKS = ".locks"
_DATA_SET = {"rows", "classes", "data_fingerprint", "data_bytes"}


class DamagedShardsError(ValueError):
    """Reports damaged shards, whose records were deleted, so that the shards are pending again."""


class Job(NamedTuple):
    """Identifies writer `number`, from 0, of `jobs` independent writers; each writes its own shards."""

    number: int = 0
    jobs: int = 1

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.jobs}"

    def share(self, shards: int) -> range:
        """Return the shards of this job: adjacent ones, whose images tend to be stored together."""
        return range(self.number * shards // self.jobs, (self.number + 1) * shards // self.jobs)


class EncodedShard(NamedTuple):
    """Holds what was encoded for a shard: the rows that `rows_to_encode` returned, and what became of them."""

    number: int
    rows: NDArray[np.int64]
    moments: NDArray[np.floating]  # n V 2C h w, of `rows`
    failures: Mapping[int, str]  # row -> reason
    digests: Mapping[int, str] = MappingProxyType({})  # row -> digest of its image file, if there is one


class CacheWriter:
    """Writes the missing shards of its job; a crash loses only the shard that is being written.

    Write inside `claimed()`, which keeps out other writers of the same shards.
    """

    def __init__(self, path: Path, plan: Plan, rows: Rows, job: Job | None = None, *, change: bool = False) -> None:
        """Check the plan of an existing cache at `path`; ValueError names the field in which it differs from `plan`.

        With `change`, the data set may differ: the cache may lack the last of `rows`, and `redo` accepts new versions
        of rows.
        """
        assert len(rows.keys) == len(rows.labels) == plan.rows
        self.path, self.plan, self.rows, self.job = path, plan, rows, job or Job()
        self._format = FORMATS[plan.format]
        self._may_differ = _DATA_SET if change else set()
        self._check_plan()

    def is_done(self) -> bool:
        """Return whether the cache is finished; this reads its manifest."""
        found = existing_plan(self.path) if (self.path / MANIFEST).exists() else None
        return found is not None and found.rows == self.plan.rows

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other writers of this job's shards out; ValueError names one that is already running."""
        locks, name = self.path / _LOCKS, f"{self.job.number + 1}-of-{self.job.jobs}"
        with claim(locks / name, f"job {self.job}"):
            for other in locks.glob("*-of-*"):
                writer = holder(other) if other.name.split("-of-")[1] != str(self.job.jobs) else None
                if writer:
                    raise ValueError(f"{self.path}: {writer} is using it, with another number of jobs")
            with self._locked():
                self._check_plan()
                self._start()
            yield

    def pending(self, *, dealt: bool = False) -> list[int]:
        """Return the numbers of this job's shards that are not written yet.

        Its shards are adjacent ones or, `dealt`, every n-th of n jobs: what another number of jobs has left is then
        shared evenly. All jobs must be given the same.
        """
        every = range(self.plan.shard_count)
        mine = every[self.job.number :: self.job.jobs] if dealt else self.job.share(len(every))
        missing = [i for i in mine if not self._record(i).exists()]
        return [] if self.is_done() else missing  # checked last: a finishing job deletes the records

    def rows_to_encode(self, shard: int) -> NDArray[np.int64]:
        """Return the rows of a pending shard that `write` needs moments of: all except those of an older version."""
        rows, kept = np.array(self.plan.rows_of(shard)), self._kept(shard)
        return rows if kept is None else np.setdiff1d(rows, [*kept.rows, *(f.row for f in kept.failures)])

    def write(self, shard: EncodedShard) -> list[Failure]:
        """Publish one shard and return its failures.

        Rows with values that are not finite in the cache's dtype become failures and are never committed.
        """
        number, rows, moments, failures, digests = shard
        every, kept = self.plan.rows_of(number), self._kept(number)
        values = np.full((len(every), *self.plan.row_shape), np.nan, self.plan.dtype)
        with np.errstate(over="ignore"):  # an overflow is found below and becomes a failure
            values[rows - every.start] = moments
        broken = rows[~np.isfinite(values[rows - every.start]).all(axis=(1, 2, 3, 4))]
        reasons = {int(row): "its latents are NaN or infinite" for row in broken} | dict(failures)
        if kept and kept.rows:
            values[np.array(kept.rows, np.int64) - every.start] = self._kept_values(number, kept)
        reasons |= {failure.row: failure.reason for failure in kept.failures} if kept else {}
        labels = self.rows.labels[every.start : every.stop].copy()
        labels[[row - every.start for row in reasons]] = FAILED
        payload = self._format.encode_shard(self.plan, number, values, labels)
        file = self._format.shard_file(number)
        publish(self.path / file, payload)
        failed = [
            Failure(row=row, key=printable(self.rows.keys[row]), reason=printable(reasons[row]))
            for row in sorted(reasons)
        ]
        known = {**(dict(zip(kept.rows, kept.digests, strict=True)) if kept else {}), **digests}
        record = ShardRecord(
            shard=_shard(File.of(file, payload), self.plan, values, labels),
            failures=tuple(failed),
            digests=tuple("" if row in reasons else known.get(row, "") for row in every),
        )
        publish_checked(self._record(number), record.model_dump(mode="json"))
        return failed

    def write_failures(self) -> None:
        """Publish `failures.jsonl` with the failures so far."""
        with self._locked():
            publish(self.path / FAILURES, _lines(load_failures(self.path)))

    def finish(self) -> Manifest | None:
        """Write the other files, the manifest last, once the shards of all jobs exist; return None until then.

        All shards are read once more; DamagedShardsError if one of them is no longer what was written.
        """
        with self._locked():
            if not self.is_done():
                if not all(self._record(i).exists() for i in range(self.plan.shard_count)):
                    return None
                self._check_shards()
                self._assemble()
            self._tidy()
        return Manifest.load(self.path)

    def tidy(self) -> None:
        """Delete leftovers of a process that was killed after it wrote the manifest."""
        if (self.path / PLAN).exists() or (self.path / RECORDS).exists():
            with self._locked():
                self._tidy()

    def redo(self, rows: Iterable[int]) -> None:
        """Mark `rows` of a finished or unfinished cache as missing; the other rows of their shards are kept.

        A finished cache stays readable until all is prepared and its manifest is deleted.
        """
        with self._locked():
            self._reopen(rows)

    def _locked(self) -> AbstractContextManager[None]:
        """Lock plan, rows, failures and manifest, which all jobs share."""
        return claim(self.path / _LOCKS / "manifest", f"job {self.job}", wait=True)

    def _reopen(self, rows: Iterable[int]) -> None:
        again: dict[int, set[int]] = {}
        for row in rows:
            again.setdefault(row // self.plan.shard_rows, set()).add(row)
        records = load_records(self.path)
        if (self.path / MANIFEST).exists():
            remove(self.path / RECORDS)  # left by an interrupted attempt
        for i, record in records.items():
            self._reopen_shard(i, record, again.get(i, set()))
        self._publish_plan()
        remove(self.path / MANIFEST)
        self._publish_rows()

    def _start(self) -> None:
        found = existing_plan(self.path)
        if found and found.rows != self.plan.rows:
            self._reopen([])
        elif not self.is_done():
            if not found:
                self._publish_plan()
            self._publish_rows()

    def _check_plan(self) -> None:
        found = check_plan(self.path, self.plan, ignored=self._may_differ)
        if found and not self._may_differ and listing_of(found) != self.rows.file:
            raise ValueError(
                f"{self.path / ROWS}: it has the same data set, but lists other images or another order: choose"
                " another folder (cache.path for encode) or delete this one"
            )

    def _publish_plan(self) -> None:
        """Publish the plan, with the SHA-256 of the rows about to be published and of the rows that they replace."""
        found = existing_plan(self.path)
        before = [file for file in found.files if file.file == ROWS and file != self.rows.file] if found else []
        draft = Draft(**dict(self.plan), files=(self.rows.file, *before))
        publish_checked(self.path / PLAN, draft.model_dump(mode="json"))

    def _publish_rows(self) -> None:
        lines, file = self.rows.lines(), self.path / ROWS
        if not file.exists() or read(file) != lines:
            publish(file, lines)

    def _reopen_shard(self, number: int, record: ShardRecord, redo: set[int]) -> None:
        """Write the record of a shard that does not change or, for one to be rewritten, the record of its kept rows."""
        start, rows = self.plan.rows_of(number).start, record.shard.rows
        failed = {failure.row for failure in record.failures}
        listed = [row for row in range(start, start + rows) if self._format.KEEPS_FAILED or row not in failed]
        kept = [(row, place) for place, row in enumerate(listed) if row not in failed | redo]
        if not redo and rows == len(self.plan.rows_of(number)):
            publish_checked(self._record(number), record.model_dump(mode="json"))
            return
        shard = KeptShard(
            file=File(file=record.shard.file, size=record.shard.size, sha256=record.shard.sha256),
            rows=tuple(row for row, _ in kept),
            places=tuple(place for _, place in kept),
            digests=tuple(record.digests[row - start] for row, _ in kept),
            failures=tuple(failure for failure in record.failures if failure.row not in redo),
        )
        remove(self._record(number, "kept"))
        publish_checked(self._record(number, "kept.json"), shard.model_dump(mode="json"))
        remove(self._record(number))

    def _kept(self, shard: int) -> KeptShard | None:
        file = self._record(shard, "kept.json")
        return parse(KeptShard, read(file), file, remedy=REWRITE_SHARD) if file.exists() else None

    def _kept_values(self, shard: int, kept: KeptShard) -> NDArray[np.floating]:
        """Return the kept rows, `n V 2C h w`, from a copy, since `write` replaces the original file."""
        copy = self._record(shard, "kept")
        if not copy.exists() or sha256_file(copy) != kept.file.sha256:
            if problem := kept.file.problem(self.path):
                remove(self._record(shard, "kept.json"))
                raise DamagedShardsError(f"{self.path / kept.file.file}: {problem}: {_rewrite_hint(1)}")
            publish(copy, read(self.path / kept.file.file))
        layout = self._format.layout(self.plan)
        blocks, rows = np.divmod(np.array(kept.places), layout.rows)
        return layout.map([copy], self.plan)[0, blocks, rows]

    def _check_shards(self) -> None:
        problems = {}
        for number, record in load_records(self.path).items():
            if problem := record.shard.problem(self.path):
                problems[number] = f"{self.path / record.shard.file}: {problem}"
        for number in problems:
            remove(self._record(number))
        if problems:
            raise DamagedShardsError(f"{next(iter(problems.values()))}: {_rewrite_hint(len(problems))}")

    def _assemble(self) -> None:
        """Publish all files except the shards, the manifest last."""
        records = load_records(self.path).values()
        shards, failures = [record.shard for record in records], [f for record in records for f in record.failures]
        digests = [digest for record in records for digest in record.digests]
        if len(failures) == self.plan.rows:
            others = (self._format.FOLDER, *self._format.OTHER_FILES, ROWS, FAILURES, DIGESTS)
            for name in (RECORDS, *others, PLAN):  # not the folder itself: it may hold other files
                remove(self.path / name)
            raise ValueError(f"no image has latents: {failures[0].key}: {failures[0].reason}")
        labels = self.rows.labels.copy()
        labels[[failure.row for failure in failures]] = FAILED
        files = {
            **self._format.other_files(self.plan, labels),
            ROWS: self.rows.lines(),
            FAILURES: _lines(failures),
            DIGESTS: "".join(digest + "\n" for digest in digests).encode(),
        }
        for name, payload in files.items():
            publish(self.path / name, payload)
        mean, std = _merge(shards)
        Manifest(
            **dict(self.plan),
            committed=self.plan.rows - len(failures),
            failed=len(failures),
            mean=mean,
            std=std,
            shards=tuple(shards),
            files=tuple(File.of(name, payload) for name, payload in files.items()),
        ).save(self.path)

    def _tidy(self) -> None:
        for name in (RECORDS, PLAN):
            remove(self.path / name)
        for lock in (self.path / _LOCKS).iterdir():
            holder(lock)  # deletes stale locks of killed processes; others are deleted by their holders

    def _record(self, shard: int, suffix: str = "json") -> Path:
        return self.path / RECORDS / f"{shard:06d}.{suffix}"


def _rewrite_hint(shards: int) -> str:
    return f"{counted(shards, 'shard')} must be written again: run the same command again"


def _lines(failures: list[Failure]) -> bytes:
    return "".join(json.dumps(failure.model_dump()) + "\n" for failure in failures).encode()


def _shard(file: File, plan: Plan, values: NDArray[np.floating], labels: NDArray[np.int64]) -> Shard:
    """Return a shard's entry, with sums of the posterior's first and second moments over rows, views and positions."""
    channels = plan.latent_channels
    good = values[labels != FAILED].astype(np.float64)
    mean = good[:, :, :channels]
    second = mean**2
    if plan.store == "moments":
        second += good[:, :, channels:] ** 2
    axes = (0, 1, 3, 4)
    return Shard(
        **dict(file),
        rows=len(labels),
        failed=int((labels == FAILED).sum()),
        values=mean.size // channels,
        total=tuple(mean.sum(axes).tolist()),
        squares=tuple(second.sum(axes).tolist()),
    )


def _merge(shards: list[Shard]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel over all shards."""
    count = sum(shard.values for shard in shards)
    mean = np.sum([shard.total for shard in shards], axis=0) / count
    variance = np.sum([shard.squares for shard in shards], axis=0) / count - mean**2
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(variance, 0)).tolist())
