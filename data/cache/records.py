"""Reads the state of a latent cache, finished or not: its plan, and the record of every finished shard."""

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
from data.cache.reader import DIGESTS, FAILURES, read_verified_file
from data.storage import read

PLAN = "plan.json"  # describes an unfinished cache; deleted after the manifest is written
RECORDS = "records"  # folder with a record of every finished shard of an unfinished cache
REWRITE_SHARD = "delete it and run the same command again to write its shard again"
_PROVENANCE = {"batch_size", "data_source", "source"}  # not compared: other fields determine the bytes


def existing_plan(path: Path) -> Manifest | Draft | None:
    """Read the plan of the finished or unfinished cache at `path`; None if there is none.

    ValueError if the folder holds something else.
    """
    # Safe while other jobs start or finish: the plan is created first and deleted after the manifest exists.
    files = path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir())
    planned = None
    with contextlib.suppress(FileNotFoundError):
        planned = read(path / PLAN)
    if (path / MANIFEST).exists():
        return Manifest.load(path)
    if planned is not None:
        return parse(Draft, planned, path / PLAN, remedy=f"delete {path} and create it again")
    if files:
        raise ValueError(f"{path}: this folder has files, but is no latent cache: choose an empty or a new one")
    return None


def load_records(path: Path) -> dict[int, ShardRecord]:
    """Load the records of all finished shards of the cache at `path`, by shard number.

    Shards without a record must be encoded again: shards with failures if the `failures.jsonl` of a finished cache is
    damaged, and all shards of image files if their digests are.
    """
    if not (path / MANIFEST).exists():
        files = sorted((path / RECORDS).glob("[0-9]*[0-9].json"))  # excludes kept and staged files
        with contextlib.suppress(FileNotFoundError):  # a finishing job deletes them after writing the manifest
            return {int(file.stem): parse(ShardRecord, read(file), file, remedy=REWRITE_SHARD) for file in files}
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


def load_digests(path: Path) -> dict[int, str]:
    """Load the digest of the image file of every row committed so far in the cache at `path`."""
    plan = existing_plan(path) or Manifest.load(path)
    if isinstance(plan, Manifest):
        read_verified_file(path, plan, DIGESTS)  # if damaged, fail instead of comparing no image
    return {
        row: digest
        for number, record in load_records(path).items()
        for row, digest in enumerate(record.digests, plan.rows_of(number).start)
        if digest
    }


def load_failures(path: Path) -> list[Failure]:
    """Load the failures of all finished shards of the cache at `path`."""
    return [failure for record in load_records(path).values() for failure in record.failures]


def progress(path: Path) -> tuple[int, int, int]:
    """Count the committed, failed and pending images of the cache at `path`; ValueError if there is no cache."""
    plan = existing_plan(path) or Manifest.load(path)
    if isinstance(plan, Manifest):
        return plan.committed, plan.failed, 0
    shards = [record.shard for record in load_records(path).values()]
    failed = sum(shard.failed for shard in shards)
    committed = sum(shard.rows for shard in shards) - failed
    return committed, failed, plan.rows - committed - failed


def check_plan(path: Path, plan: Plan, *, ignored: Collection[str] = ()) -> Manifest | Draft | None:
    """Return the plan of the cache at `path`; ValueError names the first field, except for `ignored`, that differs."""
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
