from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from data.cache import LatentCache
from data.manifest import MANIFEST, Manifest, Plan
from data.storage import publish, remove, sha256_file, staged_folder
from data.writer import CacheWriter

Moments = NDArray[np.floating]
Labels = NDArray[np.int64]


class Crash(Exception):  # noqa: N818 - it stands for the end of the process
    pass


def write(writer: CacheWriter, moments: Moments, failures: dict[int, str] | None = None) -> None:
    """Write all that is pending."""
    for shard in writer.pending():
        write_shard(writer, shard, moments, failures)
    writer.finish()


def write_shard(writer: CacheWriter, shard: int, moments: Moments, failures: dict[int, str] | None = None) -> None:
    rows = writer.rows_of(shard)
    mine = {row: reason for row, reason in (failures or {}).items() if row in rows}
    writer.write(shard, moments[rows.start : rows.stop], mine)


def files(folder: Path) -> dict[str, str]:
    """Hash of every file, unfinished ones included."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def shard_file(cache: LatentCache, shard: int) -> Path:
    return cache.path / cache.manifest.shards[shard].file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def new_writer(path: Path, plan: Plan, keys: list[str], labels: Labels) -> Callable[..., CacheWriter]:
    """A writer of the cache at `path`, of `plan` with changes."""

    def make(where: Path = path, **changes: Any) -> CacheWriter:
        return CacheWriter(where, Plan(**(plan.model_dump() | changes)), keys, labels)

    return make


def test_what_is_written_is_what_is_read(
    new_writer: Callable[..., CacheWriter], path: Path, moments: Moments, keys: list[str], labels: Labels
) -> None:
    write(new_writer(), moments)
    cache, expected = LatentCache(path), moments.astype(np.float16)
    assert len(cache) == 75
    assert cache.keys() == keys
    np.testing.assert_array_equal(cache.labels, labels)
    np.testing.assert_array_equal(cache.read(np.arange(75)), expected)
    assert cache.read(np.arange(75)).dtype == np.float16


def test_rows_are_read_in_any_order_and_more_than_once(
    new_writer: Callable[..., CacheWriter], moments: Moments
) -> None:
    write(new_writer(), moments)
    cache, expected = LatentCache(new_writer().path), moments.astype(np.float16)
    rng = np.random.default_rng(0)
    for indices in (rng.permutation(75), rng.integers(0, 75, 200), np.array([74, 0, 74]), np.array([], np.int64)):
        np.testing.assert_array_equal(cache.read(indices), expected[indices])


@pytest.mark.parametrize("store", ["moments", "mean"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_zarr_reads_what_the_cache_reads(
    new_writer: Callable[..., CacheWriter], path: Path, labels: Labels, store: str, dtype: str
) -> None:
    moments = np.random.default_rng(1).normal(size=(75, 2, 4, 2, 3)).astype(np.float32)
    write(new_writer(store=store, dtype=dtype, views=("identity", "flip")), moments)
    group, cache = zarr.open_group(path / "latents.zarr", mode="r"), LatentCache(path)
    np.testing.assert_array_equal(cache.read(np.arange(75)), moments.astype(dtype))
    np.testing.assert_array_equal(group["moments"][:], moments.astype(dtype))
    np.testing.assert_array_equal(group["label"][:], labels)
    assert group["moments"].dtype == dtype


@pytest.mark.parametrize(
    "failed",
    [[0], [74], [3, 31, 32, 70], list(range(16, 32)), list(range(64, 75)), list(range(32, 64)), list(range(74))],
    ids=["first", "last", "scattered", "a chunk", "the last shard", "a whole shard", "all but one"],
)
def test_failures_are_recorded_and_passed_over(
    new_writer: Callable[..., CacheWriter],
    path: Path,
    moments: Moments,
    keys: list[str],
    labels: Labels,
    failed: list[int],
) -> None:
    write(new_writer(), moments, {row: f"reason {row}" for row in failed})
    cache, good = LatentCache(path), np.setdiff1d(np.arange(75), failed)
    manifest = cache.manifest
    assert [(f.row, f.key, f.reason) for f in manifest.failures] == [(r, keys[r], f"reason {r}") for r in failed]
    assert (manifest.committed, manifest.failed, len(cache)) == (75 - len(failed), len(failed), 75 - len(failed))
    assert cache.keys() == [keys[row] for row in good]
    np.testing.assert_array_equal(cache.rows, good)
    np.testing.assert_array_equal(cache.labels, labels[good])
    np.testing.assert_array_equal(cache.read(np.arange(len(cache))), moments[good].astype(np.float16))
    group = zarr.open_group(path / "latents.zarr", mode="r")
    assert np.isnan(group["moments"][:][failed]).all()
    assert (group["label"][:][failed] == -1).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70_000])  # float16 ends at 65504
def test_values_that_are_not_finite_are_never_committed(
    new_writer: Callable[..., CacheWriter], path: Path, moments: Moments, value: float
) -> None:
    moments[40, 0, 3, 1, 2] = value
    write(new_writer(), moments, {41: "unreadable"})
    cache = LatentCache(path)
    assert [(f.row, f.key) for f in cache.manifest.failures] == [(40, "cat/40.png"), (41, "dog/41.png")]
    assert "NaN or infinite" in cache.manifest.failures[0].reason
    assert np.isfinite(cache.read(np.arange(len(cache)))).all()
    assert np.isfinite([*cache.manifest.mean, *cache.manifest.std]).all()


@pytest.mark.parametrize("store", ["moments", "mean"])
def test_mean_and_std_are_those_of_latents_drawn_from_the_posterior(
    new_writer: Callable[..., CacheWriter], path: Path, moments: Moments, store: str
) -> None:
    write(new_writer(store=store), moments, {5: "unreadable", 40: "unreadable"})
    cache = LatentCache(path)
    stored = cache.read(np.arange(73)).astype(np.float64)
    channels = 2 if store == "moments" else 4
    mean = stored[:, :, :channels]
    variance = mean.var((0, 1, 3, 4))
    if store == "moments":
        variance += (stored[:, :, 2:] ** 2).mean((0, 1, 3, 4))  # law of total variance
    np.testing.assert_allclose(cache.manifest.mean, mean.mean((0, 1, 3, 4)))
    np.testing.assert_allclose(cache.manifest.std, np.sqrt(variance))


def test_shards_in_any_order_make_the_same_files(
    new_writer: Callable[..., CacheWriter], tmp_path: Path, moments: Moments
) -> None:
    failures = {7: "unreadable", 70: "unreadable"}
    write(new_writer(), moments, failures)
    backwards = new_writer(tmp_path / "backwards")
    for shard in reversed(backwards.pending()):
        write_shard(backwards, shard, moments, failures)
    backwards.finish()
    assert files(backwards.path) == files(new_writer().path)


def test_a_run_that_crashes_anywhere_and_is_continued_equals_one_undisturbed(
    new_writer: Callable[..., CacheWriter], tmp_path: Path, moments: Moments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in its n-th flush, rename or delete, for every n; another one goes on."""
    failures = {7: "unreadable", 70: "unreadable"}
    write(new_writer(tmp_path / "whole"), moments, failures)
    whole, left = files(tmp_path / "whole"), -1

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            return operation(*args)

        return run

    monkeypatch.setattr(os, "fsync", dying(lambda handle: None))  # flushing takes time and shows in no test
    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(data.cache, "remove", dying(remove))
    differ, n = [], 0
    while left <= 0:  # until a run ends before its n-th operation
        n += 1
        left, path = n, tmp_path / f"run{n}"
        try:
            write(new_writer(path), moments, failures)
        except Crash:
            left = 0
            write(new_writer(path), moments, failures)
        if files(path) != whole:
            differ.append((n, sorted(files(path).keys() ^ whole.keys())))
    assert n > 30  # 12 files with a flush of the file, a rename and a flush of the folder each
    assert not differ


def test_an_unfinished_cache_lacks_only_what_was_not_written(
    new_writer: Callable[..., CacheWriter], path: Path, moments: Moments
) -> None:
    first = new_writer()
    assert first.pending() == [0, 1, 2]
    write_shard(first, 1, moments)
    assert new_writer().pending() == [0, 2]
    with pytest.raises(ValueError, match=r"cache\.path: .*not finished"):
        LatentCache(path)


def test_a_finished_cache_is_left_alone(new_writer: Callable[..., CacheWriter], path: Path, moments: Moments) -> None:
    write(new_writer(), moments)
    before = {file: (path / file).stat().st_mtime_ns for file in files(path)}
    again = new_writer()
    assert again.done
    assert again.pending() == []
    assert again.finish() == LatentCache(path).manifest
    assert {file: (path / file).stat().st_mtime_ns for file in files(path)} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("dtype", {"dtype": "float32"}),
        ("store", {"store": "mean"}),
        ("data_fingerprint", {"data_fingerprint": "0" * 64}),
        ("views", {"views": ("identity", "flip")}),
        ("vae.weights_sha256", {"vae": {"weights_sha256": "b" * 64}}),
        ("vae.scaling_factor", {"vae": {"scaling_factor": 0.5}}),
    ],
)
def test_a_cache_of_another_plan_is_refused_by_the_name_of_the_field(
    new_writer: Callable[..., CacheWriter],
    plan: Plan,
    path: Path,
    moments: Moments,
    field: str,
    change: dict[str, Any],
    finished: bool,
) -> None:
    writer = new_writer()
    write(writer, moments) if finished else write_shard(writer, 0, moments)
    before = files(path)
    if "vae" in change:
        change = {"vae": plan.vae.model_dump() | change["vae"]}
    with pytest.raises(ValueError, match=rf"the cache there has {field} = "):
        new_writer(**change)
    assert files(path) == before


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"data_source": "./somewhere"}], ids=["batch", "spelling"])
def test_another_way_to_the_same_latents_continues_the_cache(
    new_writer: Callable[..., CacheWriter], moments: Moments, change: dict[str, Any]
) -> None:
    write_shard(new_writer(), 0, moments)
    assert new_writer(**change).pending() == [1, 2]


def test_a_folder_of_something_else_is_refused_and_left_alone(
    new_writer: Callable[..., CacheWriter], path: Path
) -> None:
    (path / "cat").mkdir(parents=True)
    (path / "cat" / "photo.png").write_bytes(b"dear to somebody")
    with pytest.raises(ValueError, match="is no latent cache"):
        new_writer()
    assert (path / "cat" / "photo.png").read_bytes() == b"dear to somebody"


def test_a_cache_without_any_image_is_refused(
    new_writer: Callable[..., CacheWriter], path: Path, moments: Moments
) -> None:
    with pytest.raises(ValueError, match=r"no image could be encoded: cat/0\.png: unreadable"):
        write(new_writer(), moments, dict.fromkeys(range(75), "unreadable"))
    assert not new_writer().done  # an encode after the images were mended starts anew
    assert new_writer().pending() == [0, 1, 2]


def test_a_failure_under_a_name_that_is_not_utf_8_is_recorded(path: Path, plan: Plan, moments: Moments) -> None:
    keys = [os.fsdecode(b"cat/\xff%d.png" % row) for row in range(75)]  # as the file system gives them
    write(CacheWriter(path, plan, keys, np.zeros(75, np.int64)), moments, {3: "unreadable"})
    cache = LatentCache(path)
    assert cache.keys() == keys[:3] + keys[4:]
    assert cache.manifest.failed == 1


def test_there_is_no_cache_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache\.path: no latent cache at .*nowhere: run encode first"):
        LatentCache(tmp_path / "nowhere")


@pytest.mark.parametrize("shard", [0, 2])
def test_a_missing_or_truncated_shard_is_named(cache: LatentCache, shard: int) -> None:
    file = shard_file(cache, shard)
    payload = file.read_bytes()
    for damaged in (payload[:-1], payload + b"\0", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file}: {len(damaged)} bytes"):
            LatentCache(cache.path)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file}: missing"):
        LatentCache(cache.path)


def test_a_flipped_bit_in_a_shard_is_found(cache: LatentCache) -> None:
    cache.verify()  # nothing is wrong yet
    rng = np.random.default_rng(0)
    for shard in range(3):
        file = shard_file(cache, shard)
        payload = file.read_bytes()
        for place in rng.integers(0, len(payload) * 8, 20):
            damaged = bytearray(payload)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{file}: damaged"):
                LatentCache(cache.path).verify()
        file.write_bytes(payload)


def test_damaged_labels_are_never_used(cache: LatentCache) -> None:
    file = cache.path / "latents.zarr/label/c/0"
    payload = file.read_bytes()
    flipped = bytes([payload[0] ^ 1]) + payload[1:]
    for damaged in (flipped, payload[:-8]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError):  # noqa: PT011 - zarr's checksum may be what finds it
            LatentCache(cache.path).verify()


def test_missing_labels_are_not_read_as_failures(cache: LatentCache) -> None:
    (cache.path / "latents.zarr/label/c/0").unlink()
    with pytest.raises(ValueError, match="label"):
        LatentCache(cache.path)


MANIFESTS: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "not JSON": lambda text: "{" + text,
    "truncated": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "a field too few": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "dtype"}),
    "a field too many": lambda text: json.dumps(json.loads(text) | {"unheard_of": 1}),
    "a wrong type": lambda text: json.dumps(json.loads(text) | {"rows": "many"}),
    "another version": lambda text: json.dumps(json.loads(text) | {"format_version": 2}),
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_file_that_is_no_manifest_is_refused_by_its_name(cache: LatentCache, change: str) -> None:
    file = cache.path / MANIFEST
    file.write_text(MANIFESTS[change](file.read_text()))
    with pytest.raises(ValueError, match=f"{file}: .*not a manifest of format version 1"):
        LatentCache(cache.path)


def test_a_manifest_is_read_as_it_was_saved(cache: LatentCache, tmp_path: Path) -> None:
    cache.manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == cache.manifest


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_crash_while_publishing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, old: bytes | None
) -> None:
    file = tmp_path / "folder" / "file"
    if old is not None:
        publish(file, old)

    def crash(*args: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, crash)
        with pytest.raises(Crash):
            publish(file, b"new")
    assert (file.read_bytes() if file.exists() else None) == old
    publish(file, b"newer")
    assert file.read_bytes() == b"newer"
    assert list(file.parent.iterdir()) == [file]  # nothing unfinished is left behind


def test_a_staged_folder_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for content in ("first", "second"):
        with staged_folder(final) as staged:
            (staged / content).write_text(content)
            (staged / "inner").mkdir()
            (staged / "inner" / "file").write_text(content)
            assert not (final / content).exists()
        assert sorted(p.name for p in final.iterdir()) == sorted([content, "inner"])
        assert (final / "inner" / "file").read_text() == content
        assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("old", [True, False])
def test_a_staged_folder_that_fails_changes_nothing(tmp_path: Path, old: bool) -> None:
    final = tmp_path / "final"
    if old:
        final.mkdir()
        (final / "file").write_text("old")
    before = files(tmp_path)

    def fill() -> None:
        with staged_folder(final) as staged:
            (staged / "file").write_text("new")
            raise Crash

    with pytest.raises(Crash):
        fill()
    assert files(tmp_path) == before
    assert final.exists() == old


def test_removing_takes_files_folders_and_links_but_not_what_a_link_shows(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").touch()
    (tmp_path / "link").symlink_to(target)
    for name in ("link", "nothing"):
        remove(tmp_path / name)
        assert list(tmp_path.iterdir()) == [target]
    assert (target / "file").exists()
    remove(target)
    assert not target.exists()
