"""What is there so far of a latent cache, finished or not: its plan, and the record of every shard."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from data.cache.manifest import (
    MANIFEST,
    Draft,
    Failure,
    Manifest,
    Plan,
    ShardRecord,
    first_difference,
    parse,
)
from data.cache.reader import DIGESTS, FAILURES, verified
from data.storage import read

PLAN = "plan.json"  # what is being written, until the manifest is there
RECORDS = "records"  # the folder of the records of what is finished of it
ANEW = "delete it, and the same command writes its shard anew"
_PROVENANCE = {"batch_size", "data_source", "source"}  # recorded, but what they led to is pinned by the other fields


def existing_plan(path: Path) -> Manifest | Draft | None:
    """What is planned of the finished or unfinished cache at `path`; None where there is none.

    ValueError when the folder holds something else.
    """
    # In this order: of jobs that begin or end meanwhile, the plan comes before other files and goes after the manifest.
    files = path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir())
    planned = None
    with contextlib.suppress(FileNotFoundError):
        planned = read(path / PLAN)
    if (path / MANIFEST).exists():
        return Manifest.load(path)
    if planned is not None:
        return parse(Draft, planned, path / PLAN, remedy=f"delete {path} and write it anew")
    if files:
        raise ValueError(f"{path}: this folder has files, but is no latent cache: choose an empty or a new one")
    return None


def recorded(path: Path) -> dict[int, ShardRecord]:
    """The records of all shards that are there so far of the cache at `path`, by their numbers.

    Where a finished cache's `failures.jsonl` is damaged, a shard with failures has none: it must be encoded again. So
    must all shards of image files whose digests are.
    """
    if not (path / MANIFEST).exists():
        files = sorted((path / RECORDS).glob("[0-9]*[0-9].json"))  # neither what is kept nor what is staged
        with contextlib.suppress(FileNotFoundError):  # a job that finishes deletes them, once the manifest is there
            return {int(file.stem): parse(ShardRecord, read(file), file, remedy=ANEW) for file in files}
    manifest = Manifest.load(path)
    failures: dict[int, list[Failure]] = {}
    listed = next(file for file in manifest.files if file.file == FAILURES)
    if listed.problem(path) is None:
        for line in read(path / FAILURES).decode().splitlines():
            failure = Failure.model_validate_json(line)
            failures.setdefault(failure.row // manifest.shard_rows, []).append(failure)
    digests = ("",) * manifest.rows
    if manifest.data_bytes:
        listed = next(file for file in manifest.files if file.file == DIGESTS)
        if listed.problem(path) is not None:
            return {}
        digests = tuple(read(path / DIGESTS).decode().split("\n")[:-1])
    return {
        i: ShardRecord(
            shard=shard,
            failures=tuple(failures.get(i, ())),
            digests=digests[manifest.rows_of(i).start : manifest.rows_of(i).stop],
        )
        for i, shard in enumerate(manifest.shards)
        if shard.failed == len(failures.get(i, ()))
    }


def recorded_digests(path: Path) -> dict[int, str]:
    """The digest of the image file of every row that is committed so far in the cache at `path`."""
    plan = existing_plan(path) or Manifest.load(path)
    if isinstance(plan, Manifest):
        verified(path, plan, DIGESTS)  # or no image would be compared
    return {
        row: digest
        for number, record in recorded(path).items()
        for row, digest in enumerate(record.digests, plan.rows_of(number).start)
        if digest
    }


def recorded_failures(path: Path) -> list[Failure]:
    """The failures of all shards that are there so far of the cache at `path`."""
    return [failure for record in recorded(path).values() for failure in record.failures]


def progress(path: Path) -> tuple[int, int, int]:
    """Images committed, failed and pending of the cache at `path`; ValueError where there is none."""
    plan = existing_plan(path) or Manifest.load(path)
    if isinstance(plan, Manifest):
        return plan.committed, plan.failed, 0
    shards = [record.shard for record in recorded(path).values()]
    failed = sum(shard.failed for shard in shards)
    committed = sum(shard.rows for shard in shards) - failed
    return committed, failed, plan.rows - committed - failed


def check_plan(path: Path, plan: Plan, *, ignored: Collection[str] = ()) -> Manifest | Draft | None:
    """What is planned of the cache at `path`; ValueError names the first field, but for `ignored`, that differs."""
    found = existing_plan(path)
    difference = found and first_difference(plan, found, ignored={*_PROVENANCE, *ignored})
    if difference:
        name, ours, theirs = (_short(part) for part in difference)
        raise ValueError(
            f"{path}: the cache there has {name} = {theirs}, this run has {ours}:"
            " choose another folder (cache.path for encode) or delete this one"
        )
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
