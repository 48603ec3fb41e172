from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import data.sources.urls
from data.sources.files import ImageFiles, open_container, open_source
from data.sources.urls import check_url
from tests.helpers.pictures import (
    KEYS,
    PICTURES,
    REDS,
    everything,
    in_forks,
    in_memory,
    opened,
    parquet_of,
    picture,
    reds,
    samples,
    write_folder,
    write_tar,
    write_zip,
)

# What holds wherever the images are

ARCHIVES: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {
    "images.zip": write_zip,
    "images.tar": lambda path, pictures: write_tar(path, samples(pictures)),
    "images.parquet": parquet_of,
}
PLACES: dict[str, Callable[[Path], str]] = {
    "a folder": lambda folder: str(write_folder(folder / "images", PICTURES)),
    "a zip file": lambda folder: str(ARCHIVES["images.zip"](folder / "images.zip", PICTURES)),
    "a tar": lambda folder: str(ARCHIVES["images.tar"](folder / "images.tar", PICTURES)),
    "a Parquet file": lambda folder: str(ARCHIVES["images.parquet"](folder / "images.parquet", PICTURES)),
}
PLACES |= {
    f"{name} in memory": lambda folder, make=make: in_memory(Path(make(folder)))  # type: ignore[misc]
    for name, make in list(PLACES.items())
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of five images in every kind of place."""
    return PLACES[request.param](tmp_path)


def test_the_same_images_are_read_from_every_place(place: str) -> None:
    images = opened(place)
    assert reds(images) == REDS
    assert images.classes == ("cat", "dog")
    assert images.labels.dtype == np.int64
    assert images.size >= sum(map(len, PICTURES.values())) / 2
    assert images.name == place


def test_every_image_has_a_stamp_and_a_key_of_its_own(place: str) -> None:
    images = opened(place)
    assert len(set(images.keys)) == len(images.stamps) == 5
    assert all(images.stamps)
    assert all(not os.path.isabs(key) and "memory" not in key for key in images.keys)


def test_images_are_read_in_the_order_that_is_asked_for(place: str) -> None:
    batch = opened(place).load([3, 0, 3])
    np.testing.assert_array_equal(batch.indices, [3, 0, 3])
    assert batch.pixels[:, 0, 0, 0].tolist() == [120, 0, 120]
    assert not batch.failures


def test_the_fingerprint_of_what_is_unchanged_is_stable(place: str) -> None:
    images = opened(place)
    first = images.fingerprint()
    everything(images)
    assert images.fingerprint() == first
    assert opened(place).fingerprint() == first


def test_forks_read_the_same_pixels_at_the_same_time(place: str) -> None:
    images, order = opened(place), [4, 1, 0, 3, 2] * 20
    before = images.load(order)
    for batch in in_forks(images, order, 3):
        assert not batch.failures
        np.testing.assert_array_equal(batch.pixels, before.pixels)
    np.testing.assert_array_equal(images.load(order).pixels, before.pixels)


def test_a_copy_that_is_sent_to_another_process_reads_the_same_pixels(place: str) -> None:
    images = opened(place)
    everything(images)
    assert reds(pickle.loads(pickle.dumps(images))) == REDS


class Remote(AsyncFileSystemWrapper):
    """Files in memory, behind an event loop in a thread as those of S3 are: a fork lacks that thread."""

    def __init__(self) -> None:
        super().__init__(MemoryFileSystem(), asynchronous=False)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("remote://"))


@pytest.mark.parametrize("name", [name for name in PLACES if name.endswith("memory")])
def test_a_connection_that_does_not_survive_a_fork_is_made_anew(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("remote", Remote, clobber=True)
    monkeypatch.setattr(data.sources.urls, "PROTOCOLS", (*data.sources.urls.PROTOCOLS, "remote"))
    images = opened(PLACES[name](tmp_path).replace("memory:", "remote:"))
    assert reds(images) == REDS
    (batch,) = in_forks(images, range(5), 1)
    assert not batch.failures
    assert batch.pixels[:, 0, 0, 0].tolist() == [red for _, red in REDS]


CHANGES: dict[str, Callable[[dict[str, bytes]], object]] = {
    "add": lambda pictures: pictures.update({"dog/3.png": picture(1)}),
    "edit": lambda pictures: pictures.update({"dog/1.png": picture(121)}),
    "delete": lambda pictures: pictures.pop("dog/1.png"),
    "rename": lambda pictures: pictures.update({"dog/3.png": pictures.pop("dog/1.png")}),
    "another class": lambda pictures: pictures.update({"cat/9.png": pictures.pop("dog/1.png")}),
}


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_shows_that_an_archive_was_written_anew(tmp_path: Path, name: str, change: str) -> None:
    path, pictures = tmp_path / name, dict(PICTURES)
    os.utime(ARCHIVES[name](path, pictures), ns=(0, 10**18))
    first = opened(path)
    reds(first)
    CHANGES[change](pictures)
    os.utime(ARCHIVES[name](path, pictures), ns=(0, 10**18 + 10**9))
    second = opened(path)
    assert second.fingerprint() != first.fingerprint()
    expected = [(key.split("/")[0], Image.open(io.BytesIO(data)).getpixel((0, 0))[0]) for key, data in pictures.items()]  # type: ignore[index]
    assert sorted(reds(second)) == sorted(expected)


@pytest.mark.parametrize(("name", "same"), [("images.zip", True), ("images.tar", False), ("images.parquet", False)])
def test_a_zip_file_has_checksums_and_may_be_touched_where_others_have_their_time_alone(
    tmp_path: Path, name: str, same: bool
) -> None:
    path = ARCHIVES[name](tmp_path / name, PICTURES)
    first = opened(path).fingerprint()
    os.utime(path, ns=(0, 10**18))
    assert (opened(path).fingerprint() == first) == same


def test_the_matte_is_part_of_what_is_said_of_the_pixels(tmp_path: Path) -> None:
    payload = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(payload, "PNG")
    write_folder(tmp_path, {"cat/1.png": payload.getvalue()})
    white, red = opened(tmp_path), opened(tmp_path, matte="red")
    assert white.load([0]).pixels[0, 0, 0].tolist() == [255, 255, 255]
    assert red.load([0]).pixels[0, 0, 0].tolist() == [255, 0, 0]
    assert white.preprocessing != red.preprocessing


def test_a_source_is_opened_by_its_name(root: Path) -> None:
    images = open_source(str(root), image_size=8, count=3, seed=0, matte="white")
    assert reds(images) == REDS
    assert len(open_source("solids", image_size=32, count=3, seed=0, matte="white").keys) == 3


# Folders


def test_images_are_sorted_within_sorted_classes(root: Path) -> None:
    images = opened(root)
    assert images.keys == KEYS
    assert images.classes == ("cat", "dog")
    np.testing.assert_array_equal(images.labels, [0, 0, 0, 1, 1])


def test_a_folder_may_be_given_relative_to_where_one_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    images = opened("images/")
    monkeypatch.chdir("/")
    assert reds(images) == REDS
    assert images.fingerprint() == opened(root).fingerprint()


def test_what_is_hidden_or_no_image_is_passed_over(root: Path, spread: Callable[[Path], str]) -> None:
    hidden = ("cat/.1.png", ".hidden/1.png", "cat/.ipynb_checkpoints/1.png", "cat/@eaDir/1.png", "dog/Thumbs.db")
    for name in (*hidden, "cat/notes.txt", "cat/list.json", "dog/list.json"):
        write_folder(root, {name: picture(1)})
    write_folder(root, {"cat/png": b"no picture", "cat/empty": b""})
    (root / "empty").mkdir()
    (root / "cat" / "folder.png").mkdir()
    images = opened(spread(root))
    assert images.keys == KEYS
    assert images.classes == ("cat", "dog")
    (note,) = images.notes
    for count in (
        "2 .json (such as cat/list.json)",
        "1 .txt (such as cat/notes.txt)",
        "2 without suffix (such as cat/empty)",
        "5 hidden",
    ):
        assert count in note


def test_what_is_no_plain_file_is_passed_over_and_counted(root: Path) -> None:
    os.mkfifo(root / "cat/0.png")  # to open it would wait for ever
    os.mkfifo(root / "dog/pipe")
    images = opened(root)
    assert reds(images) == REDS
    assert images.notes == ["skipped: 2 not a regular file (such as cat/0.png)"]


def test_a_loop_of_linked_folders_is_not_followed(root: Path) -> None:
    (root / "cat/old/loop").symlink_to(root / "cat", target_is_directory=True)
    (root / "dog/up").symlink_to("..", target_is_directory=True)
    (root / "dog/self").symlink_to("self", target_is_directory=True)
    assert opened(root).keys == KEYS


def test_a_class_may_be_a_link_to_a_folder(root: Path) -> None:
    (root / "dog").rename(root.parent / "elsewhere")
    (root / "dog").symlink_to(root.parent / "elsewhere", target_is_directory=True)
    assert reds(opened(root)) == REDS


def test_a_linked_image_is_an_image(root: Path) -> None:
    (root / "dog/3.png").symlink_to(root / "cat/2.PNG")
    assert reds(opened(root)) == [*REDS, ("dog", 40)]


def test_a_link_to_nowhere_is_a_failure_until_it_leads_somewhere(root: Path) -> None:
    (root / "cat/0.png").symlink_to("gone.png")
    images = opened(root)
    assert list(images.load([0, 1]).failures) == [0]
    before = images.fingerprint()
    assert opened(root).fingerprint() == before
    (root / "cat/gone.png").write_bytes(picture(9))
    assert opened(root).fingerprint() != before
    assert not images.load([0]).failures


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_names_that_are_not_utf_8_are_read_and_can_be_printed(root: Path) -> None:
    write_folder(root / os.fsdecode(b"caf\xe9"), {os.fsdecode(b"\xff.png"): picture(7), "1.png": picture(8)})
    images = opened(root)
    assert reds(images) == [("caf\\xe9", 8), ("caf\\xe9", 7), *REDS]
    assert images.fingerprint() == opened(root).fingerprint()
    (root / "classes.txt").write_bytes(b"dog\ncaf\xe9\ncat\n")
    assert opened(root).classes == ("dog", "caf\\xe9", "cat")
    moved = root.rename(root.with_name(os.fsdecode(b"\xe9")))
    assert opened(moved).name == f"{root.parent}/\\xe9"


@pytest.mark.parametrize("brackets", ["[1]", "x*", "what?"])
def test_a_folder_may_be_named_like_a_pattern(tmp_path: Path, brackets: str) -> None:
    write_tar(tmp_path / brackets / "1.tar", samples(PICTURES))
    assert reds(opened(tmp_path / brackets)) == REDS


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"1.heic": b"\0\0\0\x18ftypheic", "cat/notes.txt": b""})
    expected = r"data\.source: no images under .*one folder per class.*1 \.heic \(such as 1\.heic\), 1 \.txt"
    with pytest.raises(ValueError, match=expected):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.zip", "nowhere.tar", "nowhere-*.tar", "nowhere.parquet"])
@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_what_is_not_there_is_refused(tmp_path: Path, scheme: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"data\.source: no such folder or file: .*nowhere"):
        opened(f"{scheme}{tmp_path}/{name}")


@pytest.mark.parametrize("names", [["1.txt"], ["1.tar.gz"], ["1.zip", "2.zip"], ["1.tar", "2.parquet"]])
def test_files_of_other_kinds_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_zip(tmp_path / name, PICTURES)
    with pytest.raises(ValueError, match=r"give a folder, one \.zip, or \.tar or \.parquet files"):
        opened(tmp_path / (names[0] if len(names) == 1 else "*"))


TOUCHES: dict[str, Callable[[Path], object]] = {
    "add": lambda root: (root / "dog/9.png").write_bytes(picture(0)),
    "edit": lambda root: (root / "dog/1.png").write_bytes(picture(0) + b"\0"),
    "delete": lambda root: (root / "dog/1.png").unlink(),
    "touch": lambda root: os.utime(root / "dog/1.png", ns=(0, 10**18)),
    "rename": lambda root: (root / "dog/1.png").rename(root / "dog/3.png"),
    "another class": lambda root: (root / "dog/1.png").rename(root / "cat/9.png"),
    "a class renamed": lambda root: (root / "dog").rename(root / "hound"),
    "a list of classes": lambda root: (root / "metadata.csv").write_text("file_name,label\ndog/1.png,cat\n"),
}


@pytest.mark.parametrize("change", TOUCHES)
def test_the_fingerprint_of_a_folder_shows_a_change(root: Path, change: str) -> None:
    first = opened(root).fingerprint()
    TOUCHES[change](root)
    assert opened(root).fingerprint() != first


def test_stamps_tell_which_image_has_changed(root: Path) -> None:
    before = opened(root).stamps
    os.utime(root / "dog/1.png", ns=(0, 10**18))
    after = opened(root).stamps
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, True, False, True]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "garbage": lambda path: path.write_bytes(b"this is no image" * 20),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-400]),
    "zero bytes": lambda path: path.write_bytes(b""),
    "vanished": lambda path: path.unlink(),
    "a folder now": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_read_is_a_failure_and_no_other_image_is_lost(
    tmp_path: Path, damage: str, suffix: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    (tmp_path / "cat").mkdir()
    for name in ("1.png", f"2{suffix}", "3.png"):
        Image.fromarray(noise).save(tmp_path / "cat" / name)
    images = ImageFiles(str(tmp_path), image_size=16)
    DAMAGE[damage](tmp_path / images.keys[1])
    batch = images.load([0, 1, 2])
    assert list(batch.failures) == [1]
    assert len(batch.failures[1]) > 10
    assert not batch.pixels[1].any()
    np.testing.assert_array_equal(batch.pixels[[0, 2]], [noise, noise])


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:SECRET@bucket/images",
        "s3://KEY:SEC/RET@bucket/images",
        "https://SECRET@example.org/images.zip",
        "zip://*::https://user:SECRET@example.org/images.zip",
        "ftp://user:SECRET@example.org:21/images",
        "https://example.org/images.zip?sig=SECRET",
        "https://example.org/images.zip?se=2026&X-Amz-Signature=SECRET",
        "zip://*::https://example.org/images.zip?sv=1&access_token=SECRET&x=1",
        "https://example.org/images.zip?AWSAccessKeyId=KEY",
    ],
)
def test_a_url_with_credentials_is_refused_and_not_printed(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"data\.source: a URL with credentials") as caught:
        opened(url)
    printed = "".join(capfd.readouterr()) + str(caught.value) + repr(caught.value.__cause__)
    assert "SEC" not in printed
    assert "KEY" not in printed


URLS = [
    "http://host:8020/a",
    "hf://datasets/user/name@main/a:b",
    "zip://a.tar::memory://b",
    "s3://bucket/a?versionId=3",
]


@pytest.mark.parametrize("url", [*URLS, "owner/name", "C:/images", "images/a?b=c"])
def test_a_port_a_revision_and_a_chain_are_no_credentials(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "reference://a",
        "zip://a::simplecache::github://b",
        "shell://ls",
        "ftp://a/b",
        "filecache::s3://a",
        "zip://b::cached://c",
    ],
)
def test_other_protocols_are_refused_before_fsspec_hears_of_them(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: pytest.fail(url))
    with pytest.raises(ValueError, match=r"data\.source: \w+:// is not supported"):
        open_container(url)


def test_a_tar_within_a_zip_file_is_read_by_a_chained_url(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", samples(PICTURES)).read_bytes()
    outer = write_zip(tmp_path / "outer.zip", {"inner.tar": inner})
    assert reds(opened(f"zip://inner.tar::{outer}")) == REDS
