"""A cache whose files are damaged, missing, foreign or hostile, in both formats: named, and never read."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cache.formats import FORMATS
from data.cache.listing import Rows
from data.cache.manifest import MANIFEST, Manifest, Plan
from data.cache.reader import FAILURES, ROWS, LatentCache
from data.storage import sha256_file
from tests.helpers.caches import EVERY, Moments, changed, files, write


def shard_file(cache: LatentCache, shard: int) -> Path:
    return cache.path / cache.manifest.shards[shard].file


def labels_file(cache: LatentCache) -> Path:
    return cache.path / FORMATS[cache.manifest.format].LABELS


def flip(file: Path, place: int = -1, bit: int = 1) -> None:
    payload = bytearray(file.read_bytes())
    payload[place] ^= bit
    file.write_bytes(payload)


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the fields of a manifest as somebody would who knows how it is sealed."""
    fields = json.loads((path / MANIFEST).read_bytes())
    del fields["sha256"]
    change(fields)
    text = json.dumps(fields, indent=2).removesuffix("\n}")
    seal = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(f'{text},\n  "sha256": "{seal}"\n}}\n')


_seen: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in ("open", "mmap.__new__"):
        _seen.append(str(arguments[0]) if event == "open" else f"a mapping of {arguments[1]:,} bytes")


@functools.cache
def _listen() -> None:
    sys.addaudithook(_note)  # it cannot be taken back, and does nothing outside of `watched`


@contextmanager
def watched() -> Iterator[list[str]]:
    """The files that are opened in the block, and what is mapped into memory."""
    global _seen
    _listen()
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen = None


def test_not_one_of_a_thousand_flipped_bits_goes_unnoticed(cache: LatentCache) -> None:
    """Places are drawn from all bytes of all files, the manifest's included."""
    names = sorted(files(cache.path))
    ends = np.cumsum([(cache.path / name).stat().st_size for name in names])
    random, unnoticed = np.random.default_rng(0), []
    for place in random.integers(0, ends[-1], 1000).tolist():
        number, bit = int(np.searchsorted(ends, place, side="right")), 1 << int(random.integers(8))
        file, offset = cache.path / names[number], place - int(ends[number])  # from the file's end
        flip(file, offset, bit)
        with suppress(ValueError):
            LatentCache(cache.path).verify()
            unnoticed.append((names[number], offset, bit))
        flip(file, offset, bit)
    LatentCache(cache.path).verify()  # all is as it was
    assert not unnoticed


@pytest.mark.parametrize("name", ["shard 0", "shard 2", "labels", ROWS, FAILURES])
def test_a_missing_truncated_or_longer_file_is_named(cache: LatentCache, name: str) -> None:
    file = shard_file(cache, int(name[-1])) if name.startswith("shard") else cache.path / name
    file = labels_file(cache) if name == "labels" else file
    payload = file.read_bytes()
    for damaged in (payload[:-1], payload + b"\0", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file}: {len(damaged)} bytes, expected {len(payload)}"):
            LatentCache(cache.path)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file}: missing"):
        LatentCache(cache.path)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_missing_shard_is_named_before_anything_is_read(cache: LatentCache, shard: int) -> None:
    flip(labels_file(cache))
    shard_file(cache, shard).unlink()
    with watched() as seen, pytest.raises(ValueError, match=f"{shard_file(cache, shard)}: missing"):
        LatentCache(cache.path)
    assert seen == [str(cache.path / MANIFEST)]


def test_damaged_labels_and_rows_are_never_used(cache: LatentCache) -> None:
    flip(cache.path / ROWS)
    with pytest.raises(ValueError, match=f"{ROWS}: damaged"):
        LatentCache(cache.path).keys()
    flip(labels_file(cache))
    with pytest.raises(ValueError, match=f"{labels_file(cache)}: damaged"):
        LatentCache(cache.path)


def test_swapped_shards_are_found(cache: LatentCache, tmp_path: Path) -> None:
    first, second = shard_file(cache, 0), shard_file(cache, 1)
    assert first.stat().st_size == second.stat().st_size
    for source, target in ((first, tmp_path / "aside"), (second, first), (tmp_path / "aside", second)):
        source.rename(target)
    with pytest.raises(ValueError, match=f"{first}: damaged"):
        LatentCache(cache.path).verify()


@pytest.mark.parametrize("other", ["moments", "labels"])
def test_the_manifest_of_another_cache_is_found_by_its_hashes(
    cache: LatentCache, tmp_path: Path, plan: Plan, rows: Rows, moments: Moments, other: str
) -> None:
    failures = dict.fromkeys((5, 40), "unreadable")
    if other == "moments":
        twin = write(tmp_path / "twin", plan, rows, moments + 1, failures)
    else:
        twin = write(tmp_path / "twin", plan, replace(rows, labels=1 - rows.labels), moments, failures)
    ours, theirs = (cache.path / MANIFEST).read_bytes(), (twin.path / MANIFEST).read_bytes()
    for path, payload in ((cache.path, theirs), (twin.path, ours)):
        (path / MANIFEST).write_bytes(payload)
        with pytest.raises(ValueError, match="damaged: its SHA-256 is not the recorded one"):
            LatentCache(path).verify()


@pytest.mark.parametrize("format", ["zarr"], indirect=True)
def test_a_zarr_json_that_claims_a_huge_shape_is_refused_by_its_hash(cache: LatentCache) -> None:
    file = cache.path / "latents.zarr/moments/zarr.json"
    text = file.read_text()
    metadata = json.loads(text)
    metadata["shape"] = [2**60, *metadata["shape"][1:]]
    file.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=f"{file}: {file.stat().st_size} bytes"):
        LatentCache(cache.path)
    file.write_text(json.dumps(metadata, separators=(",", ":")).ljust(len(text)))
    assert file.stat().st_size == len(text)
    with watched() as seen:
        LatentCache(cache.path).read(np.arange(73))  # goes by the manifest
    assert str(file) not in seen
    with pytest.raises(ValueError, match=f"{file}: damaged"):
        LatentCache(cache.path).verify()


# Manifests that are none, or of something else.

UNREADABLE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "not JSON": lambda text: "{" + text,
    "truncated": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "nested": lambda text: "[" * 100_000,
    "a field too few": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "dtype"}),
    "a field too many": lambda text: json.dumps(json.loads(text) | {"unheard_of": 1}),
    "a wrong type": lambda text: json.dumps(json.loads(text) | {"rows": "many"}),
    "another version": lambda text: json.dumps(json.loads(text) | {"format_version": 2}),
    "not sealed": lambda text: text[: text.index(',\n  "sha256": "', len(text) - 100)] + "\n}\n",
    "an edited digit": lambda text: text.replace('"image_size": 16', '"image_size": 17'),
    "an edited seal": lambda text: text[:-5] + ("1" if text[-5] == "0" else "0") + text[-4:],
    "other white space": lambda text: json.dumps(json.loads(text)),
}


@pytest.mark.parametrize("change", UNREADABLE)
def test_a_file_that_is_no_manifest_is_refused_by_its_name(cache: LatentCache, change: str) -> None:
    file = cache.path / MANIFEST
    damaged = UNREADABLE[change](file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    with pytest.raises(ValueError, match=rf"{file}: .*(not a manifest of format version 1|its SHA-256 is not the one)"):
        LatentCache(cache.path)


@pytest.mark.parametrize("field", ["format_version", "dtype", "unheard_of", "shape.1", "vae.downsampling", "mean.0"])
def test_a_manifest_that_is_none_is_refused_by_the_name_of_its_field(cache: LatentCache, field: str) -> None:
    def change(fields: dict[str, Any]) -> None:
        inner: Any = fields
        *outer, last = (int(part) if part.isdigit() else part for part in field.split("."))
        for part in outer:
            inner = inner[part]
        inner[last] = float("nan") if field == "mean.0" else -1

    reseal(cache.path, change)
    with pytest.raises(ValueError, match=rf"{MANIFEST}: {field}: "):
        LatentCache(cache.path)


def test_a_manifest_is_read_as_it_was_saved_and_ends_with_its_seal(cache: LatentCache, tmp_path: Path) -> None:
    cache.manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == cache.manifest
    assert (tmp_path / MANIFEST).read_bytes() == (cache.path / MANIFEST).read_bytes()
    assert list(json.loads((tmp_path / MANIFEST).read_bytes()))[-1] == "sha256"
    reseal(cache.path, lambda fields: None)  # what the tests below rely on
    assert (tmp_path / MANIFEST).read_bytes() == (cache.path / MANIFEST).read_bytes()


def one_shard(rows: int, failed: int) -> Callable[[dict[str, Any]], None]:
    """A manifest that agrees with itself, of a single shard of `rows` rows."""

    def change(fields: dict[str, Any]) -> None:
        shard = fields["shards"][0] | {"rows": rows, "failed": failed}
        fields |= {"rows": rows, "shard_rows": rows, "committed": rows - failed, "failed": failed, "shards": [shard]}

    return change


def move_failure(fields: dict[str, Any]) -> None:
    fields["shards"][0]["failed"] += 1
    fields["shards"][1]["failed"] -= 1


def put(*where: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        inner: Any = fields
        for part in where[:-1]:
            inner = inner[part]
        inner[where[-1]] = value

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "2**60 rows": put("rows", value=2**60),
    "2**60 rows in one shard": one_shard(2**60, 0),
    "2**60 rows, nearly all failed": one_shard(2**60, 2**60 - 31),
    "2**70 rows in one shard": one_shard(2**70, 2**70 - 31),
    "2**60 rows a shard": put("shard_rows", value=2**60),
    "2**70 rows a shard": put("shard_rows", value=2**70),
    "2**60 shards": lambda fields: fields.update(shard_rows=1, rows=2**60, committed=2**60 - 2),
    "a shape of 2**40": put("shape", 1, value=2**40),
    "a shape of 2**70": put("shape", 0, value=2**70),
    "another shape": put("shape", value=[4, 20, 30]),
    "a negative shape": put("shape", value=[-4, -2, 3]),
    "a shape of nothing": put("shape", 2, value=0),
    "negative rows": put("rows", value=-75),
    "a shard of a negative size": put("shards", 0, "size", value=-1),
    "a shard of 2**60 bytes": put("shards", 0, "size", value=2**60),
    "a shard elsewhere": put("shards", 0, "file", value="../../etc/passwd"),
    "a shard at the root": put("shards", 0, "file", value="/etc/passwd"),
    "labels elsewhere": put("files", 0, "file", value="../../etc/passwd"),
    "rows elsewhere": put("files", -2, "file", value="/dev/zero"),
    "a file too few": lambda fields: fields["files"].pop(),
    "a file twice": lambda fields: fields["files"].append(fields["files"][0]),
    "a shard too few": lambda fields: fields["shards"].pop(),
    "a shard too many": lambda fields: fields["shards"].append(fields["shards"][-1]),
    "a shard twice": lambda fields: fields["shards"].__setitem__(1, fields["shards"][0]),
    "shards in another order": lambda fields: fields["shards"].insert(0, fields["shards"].pop(1)),
    "a shard of other rows": put("shards", 0, "rows", value=31),
    "no shards": put("shards", value=[]),
    "other failures": put("failed", value=3),
    "failures of another shard": move_failure,
    "the other format": lambda f: f.update(format="zarr" if f["format"] == "webdataset" else "webdataset"),
    "means of another store": put("store", value="mean"),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_manifest_is_refused_before_anything_is_allocated_or_opened(cache: LatentCache, change: str) -> None:
    reseal(cache.path, HOSTILE[change])
    known = {str(cache.path / MANIFEST), str(labels_file(cache))}  # both are small
    tracemalloc.start()
    try:
        with watched() as seen, pytest.raises(ValueError, match=rf"{cache.path}.*: "):
            LatentCache(cache.path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert set(seen) <= known


@pytest.mark.parametrize("format", ["webdataset"], indirect=True)
def test_labels_are_as_many_as_their_file_holds_whatever_its_header_claims(cache: LatentCache) -> None:
    file = labels_file(cache)
    payload = file.read_bytes().replace(b"(75,), }            ", b"(1099511627776,), } ")
    assert len(payload) == file.stat().st_size
    file.write_bytes(payload)
    reseal(cache.path, put("files", 0, "sha256", value=sha256_file(file)))
    np.testing.assert_array_equal(LatentCache(cache.path).labels, cache.labels)


@pytest.mark.parametrize("format", ["webdataset"], indirect=True)  # the size of a zarr shard gives it away
def test_no_more_is_mapped_than_the_rows_need_however_long_a_shard_might_be(
    tmp_path: Path, plan: Plan, rows: Rows, moments: Moments
) -> None:
    path = tmp_path / "cache"
    write(path, changed(plan, shard_rows=80), rows, moments)
    reseal(path, put("shard_rows", value=2**60))
    np.testing.assert_array_equal(LatentCache(path).read(EVERY), moments.astype(np.float16))
