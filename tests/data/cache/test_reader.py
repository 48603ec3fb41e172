"""What a latent cache promises, in both of its formats."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zarr
from numpy.typing import NDArray

from data.cache.listing import Rows
from data.cache.manifest import MANIFEST, Plan
from data.cache.reader import FAILURES, ROWS, LatentCache, least_shard_rows
from data.cache.writer import CacheWriter
from data.storage import remove
from tests.helpers.caches import EVERY, Moments, changed, files, write, write_shard

Labels = NDArray[np.int64]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def plainly_read(cache: LatentCache) -> tuple[list[int], list[int], Moments]:
    """Rows, labels and moments of the committed images, by the format's own library alone."""
    if cache.manifest.format == "zarr":
        group = zarr.open_group(cache.path / "latents.zarr", mode="r")
        label, moments = np.asarray(group["label"][:]), np.asarray(group["moments"][:])
        failed = label == -1
        assert np.isnan(moments[failed]).all()
        return np.flatnonzero(~failed).tolist(), label[~failed].tolist(), moments[~failed]

    def load(payload: bytes) -> Moments:
        return np.load(io.BytesIO(payload), allow_pickle=False)

    urls = sorted(str(file) for file in (cache.path / "shards").iterdir())
    decoders = {"cls": int, "moments.npy": load}
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).map_dict(**decoders))
    rows, labels = [int(sample["__key__"]) for sample in samples], [sample["cls"] for sample in samples]
    return rows, labels, np.stack([sample["moments.npy"] for sample in samples])


# What is written is what is read.


@pytest.mark.parametrize("views", [("identity",), ("identity", "flip")], ids=["one view", "two views"])
@pytest.mark.parametrize("store", ["moments", "mean"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_what_is_read(
    path: Path, plan: Plan, rows: Rows, store: str, dtype: str, views: tuple[str, ...]
) -> None:
    plan = changed(plan, store=store, dtype=dtype, views=views)
    moments = np.random.default_rng(1).normal(size=(75, *plan.row_shape)).astype(np.float32)
    cache = write(path, plan, rows, moments)
    assert len(cache) == 75
    assert cache.keys() == rows.keys
    assert cache.manifest.plan() == plan
    np.testing.assert_array_equal(cache.labels, rows.labels)
    np.testing.assert_array_equal(cache.rows, EVERY)
    np.testing.assert_array_equal(cache.read(EVERY), moments.astype(dtype))
    assert cache.read(EVERY).dtype == dtype
    cache.verify()


@pytest.mark.parametrize(
    "indices",
    [
        np.random.default_rng(0).permutation(73),
        np.random.default_rng(0).integers(0, 73, 200),
        np.array([72, 0, 72]),
        np.array([], np.int64),
        np.array([-1, -73, 3]),
    ],
    ids=["shuffled", "drawn", "the last twice", "none", "from the end"],
)
def test_images_are_read_in_any_order_and_more_than_once(
    cache: LatentCache, moments: Moments, indices: NDArray[np.int64]
) -> None:
    expected = np.delete(moments, [5, 40], axis=0).astype(np.float16)
    np.testing.assert_array_equal(cache.read(indices), expected[indices])


def test_whole_shards_that_are_read_hold_what_is_mapped(cache: LatentCache) -> None:
    for indices in (np.arange(len(cache)), np.array([70, 3, 3, 31]), np.array([], np.int64)):
        np.testing.assert_array_equal(cache.load(indices), cache.read(indices), strict=True)
    shard = cache.path / cache.manifest.shards[1].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"^{shard}: [0-9]+ bytes, expected [0-9]+: "):
        cache.load(np.array([40]))


SHRINKING = """
import sys
from pathlib import Path
import numpy as np
from data.cache.reader import LatentCache

cache = LatentCache(Path(sys.argv[1]))
cache.read(np.array([0]))
shard = cache.path / cache.manifest.shards[1].file
print(shard, flush=True)
with open(shard, "r+b") as file:
    file.truncate(0)
cache.read(np.array([40]))
"""


def test_a_mapped_shard_that_shrinks_ends_the_process_with_its_name(cache: LatentCache) -> None:
    command = [sys.executable, "-c", SHRINKING, str(cache.path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=60)
    assert ended.returncode == 128 + signal.SIGBUS
    (said,) = ended.stderr.strip().splitlines()
    assert said.startswith(f"error: {ended.stdout.strip()}: shorter than when it was opened (SIGBUS")
    assert "latentmill verify" in said


@pytest.mark.parametrize("index", [73, -74, 2**40])
def test_an_image_that_the_cache_does_not_have_is_an_error(cache: LatentCache, index: int) -> None:
    with pytest.raises(IndexError):
        cache.read(np.array([0, index]))


def test_what_was_read_can_be_changed_without_changing_the_cache(cache: LatentCache) -> None:
    before, hashes = cache.read(np.arange(73)), files(cache.path)
    kept = before.copy()
    before[:] = 0
    np.testing.assert_array_equal(cache.read(np.arange(73)), kept)
    assert files(cache.path) == hashes


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_plain_library_reads_the_cache(path: Path, plan: Plan, rows: Rows, moments: Moments, dtype: str) -> None:
    failed = [5, 40, *range(64, 75)]  # the last shard is one of failures alone
    good = np.setdiff1d(EVERY, failed)
    cache = write(path, changed(plan, dtype=dtype), rows, moments, dict.fromkeys(failed, "unreadable"))
    found, labels, values = plainly_read(cache)
    assert found == good.tolist()
    assert labels == rows.labels[good].tolist()
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, moments[good].astype(dtype))


@pytest.mark.parametrize("format", ["zarr"], indirect=True)  # it is replaced below
@pytest.mark.parametrize("seed", range(8))
def test_both_formats_hold_the_same(tmp_path: Path, plan: Plan, seed: int) -> None:
    random = np.random.default_rng(seed)
    count, channels = int(random.integers(1, 90)), 2 * int(random.integers(1, 4))
    plan = changed(
        plan,
        rows=count,
        shard_rows=16 * int(random.integers(1, 5)),
        shape=(channels, *random.integers(1, 5, 2).tolist()),
        store=random.choice(["moments", "mean"]),
        dtype=random.choice(["float16", "float32"]),
        views=[("identity",), ("identity", "flip"), ("flip",)][random.integers(3)],
    )
    labels = random.integers(0, 2, count)
    rows = Rows([f"{i}.png" for i in range(count)], labels, plan.classes, [""] * count, np.arange(count))
    moments = random.normal(0, 3, (count, *plan.row_shape)).astype(np.float32)
    failures = {int(row): "unreadable" for row in np.flatnonzero(random.random(count - 1) < random.random())}
    zarrs, tars = (
        write(tmp_path / name, changed(plan, format=name), rows, moments, failures) for name in ("zarr", "webdataset")
    )
    indices = random.integers(0, len(zarrs), 100)
    np.testing.assert_array_equal(zarrs.read(indices), tars.read(indices))
    np.testing.assert_array_equal(zarrs.rows, tars.rows)
    np.testing.assert_array_equal(zarrs.labels, tars.labels)
    assert zarrs.keys() == tars.keys()
    assert [zarrs.lines(name) for name in (ROWS, FAILURES)] == [tars.lines(name) for name in (ROWS, FAILURES)]
    assert (zarrs.manifest.mean, zarrs.manifest.std) == (tars.manifest.mean, tars.manifest.std)


# Failures.


@pytest.mark.parametrize(
    "failed",
    [[], [0], [74], [3, 31, 32, 70], list(range(16, 32)), list(range(64, 75)), list(range(32, 64)), list(range(74))],
    ids=["none", "first", "last", "scattered", "a chunk", "the last shard", "a whole shard", "all but one"],
)
def test_failures_are_recorded_and_passed_over(
    path: Path, plan: Plan, rows: Rows, moments: Moments, failed: list[int]
) -> None:
    cache = write(path, plan, rows, moments, {row: f"reason {row}" for row in failed})
    manifest, good = cache.manifest, np.setdiff1d(EVERY, failed)
    assert cache.lines(FAILURES) == [{"row": r, "key": rows.keys[r], "reason": f"reason {r}"} for r in failed]
    assert (manifest.committed, manifest.failed, len(cache)) == (75 - len(failed), len(failed), 75 - len(failed))
    assert cache.keys() == [rows.keys[row] for row in good]
    np.testing.assert_array_equal(cache.rows, good)
    np.testing.assert_array_equal(cache.labels, rows.labels[good])
    np.testing.assert_array_equal(cache.read(np.arange(len(cache))), moments[good].astype(np.float16))
    cache.verify()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70_000])  # float16 ends at 65504
def test_values_that_are_not_finite_are_never_committed(
    path: Path, plan: Plan, rows: Rows, moments: Moments, value: float
) -> None:
    moments[40, 0, 3, 1, 2] = value
    cache = write(path, plan, rows, moments, {41: "unreadable"})
    first, second = cache.lines(FAILURES)
    assert (first["row"], first["key"], second["row"], second["key"]) == (40, "cat/40.png", 41, "dog/41.png")
    assert "NaN or infinite" in first["reason"]
    assert np.isfinite(cache.read(np.arange(73))).all()
    assert np.isfinite([*cache.manifest.mean, *cache.manifest.std]).all()
    assert np.isfinite(plainly_read(cache)[2]).all()


def test_a_cache_without_any_image_is_refused_and_leaves_nothing(
    path: Path, plan: Plan, rows: Rows, moments: Moments
) -> None:
    with pytest.raises(ValueError, match=r"no image has latents: cat/0\.png: unreadable"):
        write(path, plan, rows, moments, dict.fromkeys(range(75), "unreadable"))
    assert CacheWriter(path, plan, rows).pending() == [0, 1, 2]  # an encode after the images were mended starts anew
    assert len(write(path, plan, rows, moments)) == 75


def test_keys_that_are_not_utf_8_are_kept(path: Path, plan: Plan, rows: Rows, moments: Moments) -> None:
    keys = [os.fsdecode(b"cat/\xff%d.png" % row) for row in range(75)]  # as the file system gives them
    cache = write(path, plan, replace(rows, keys=keys), moments, {3: "unreadable"})
    assert cache.keys() == keys[:3] + keys[4:]
    assert [line["row"] for line in cache.lines(FAILURES)] == [3]


# The manifest's statistics, and the same files from the same plan.


@pytest.mark.parametrize("store", ["moments", "mean"])
def test_mean_and_std_are_those_of_latents_drawn_from_the_posterior(
    path: Path, plan: Plan, rows: Rows, moments: Moments, store: str
) -> None:
    cache = write(path, changed(plan, store=store), rows, moments, {5: "unreadable", 40: "unreadable"})
    stored = cache.read(np.arange(73)).astype(np.float64)
    mean = stored[:, :, : cache.manifest.latent_channels]
    variance = mean.var((0, 1, 3, 4))
    if store == "moments":
        variance += (stored[:, :, 2:] ** 2).mean((0, 1, 3, 4))  # law of total variance
    np.testing.assert_allclose(cache.manifest.mean, mean.mean((0, 1, 3, 4)))
    np.testing.assert_allclose(cache.manifest.std, np.sqrt(variance))


def test_shards_in_any_order_make_the_same_files(tmp_path: Path, plan: Plan, rows: Rows, moments: Moments) -> None:
    failures = {7: "unreadable", 70: "unreadable"}
    forwards = write(tmp_path / "forwards", plan, rows, moments, failures)
    backwards = write(tmp_path / "backwards", plan, rows, moments, failures, step=-1)
    assert files(forwards.path) == files(backwards.path)
    named = {file.file for file in (*forwards.manifest.shards, *forwards.manifest.files)}
    assert files(forwards.path).keys() == named | {MANIFEST}  # nothing is left over


@pytest.mark.parametrize("rows", [1, 2**14, 2**14 + 1, 1_300_000, 2**24 + 1, 100_000_000, 2**40 - 1])
def test_all_shards_of_any_cache_can_be_mapped_into_memory(rows: int) -> None:
    shard_rows = least_shard_rows(rows)
    assert -(-rows // shard_rows) <= 2**14  # of the 65,530 mappings of a process
    assert shard_rows == 1 or -(-rows // (shard_rows // 2)) > 2**14, "smaller ones would do"
    assert shard_rows & (shard_rows - 1) == 0, "a power of two, so that chunks of 16 rows divide it"


def test_a_finished_cache_is_left_alone(cache: LatentCache, plan: Plan, rows: Rows) -> None:
    before = {file: (cache.path / file).stat().st_mtime_ns for file in files(cache.path)}
    writer = CacheWriter(cache.path, plan, rows)
    assert writer.is_done()
    assert writer.pending() == []
    with writer.claimed():
        assert writer.finish() == cache.manifest
    assert {file: (cache.path / file).stat().st_mtime_ns for file in files(cache.path)} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("format", {}),
        ("dtype", {"dtype": "float32"}),
        ("store", {"store": "mean"}),
        ("data_fingerprint", {"data_fingerprint": "0" * 64}),
        ("views", {"views": ("identity", "flip")}),
        ("vae.weights_sha256", {"vae": {"weights_sha256": "b" * 64}}),
        ("vae.scaling_factor", {"vae": {"scaling_factor": 0.5}}),
    ],
)
def test_a_cache_of_another_plan_is_refused_by_the_name_of_the_field(
    path: Path, plan: Plan, rows: Rows, moments: Moments, field: str, change: dict[str, Any], finished: bool
) -> None:
    if finished:
        write(path, plan, rows, moments)
    else:
        writer = CacheWriter(path, plan, rows)
        with writer.claimed():
            write_shard(writer, 0, moments, {})
    before = files(path)
    if "vae" in change:
        change = {"vae": plan.vae.model_dump() | change["vae"]}
    elif field == "format":
        change = {"format": "zarr" if plan.format == "webdataset" else "webdataset"}
    with pytest.raises(ValueError, match=rf"the cache there has {field} = "):
        CacheWriter(path, changed(plan, **change), rows)
    assert files(path) == before


def test_a_folder_of_something_else_is_refused_and_left_alone(path: Path, plan: Plan, rows: Rows) -> None:
    (path / "cat").mkdir(parents=True)
    (path / "cat" / "photo.png").write_bytes(b"dear to somebody")
    with pytest.raises(ValueError, match="is no latent cache"):
        CacheWriter(path, plan, rows)
    assert (path / "cat" / "photo.png").read_bytes() == b"dear to somebody"


# Damage.


def test_there_is_no_cache_where_there_is_no_folder_or_no_manifest(cache: LatentCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache\.path: no latent cache at .*nowhere: run encode first"):
        LatentCache(tmp_path / "nowhere")
    remove(cache.path / MANIFEST)
    with pytest.raises(ValueError, match=r"cache\.path: no latent cache at .*not finished: run encode again"):
        LatentCache(cache.path)
