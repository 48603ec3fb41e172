from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from data.files import ImageFiles, open_container
from data.source import Batch, Source, open_source

KEYS = ["cat/1.png", "cat/2.PNG", "cat/old/1.png", "dog/1.png", "dog/2.bmp"]
REDS = [("cat", 0), ("cat", 40), ("cat", 80), ("dog", 120), ("dog", 160)]  # class and red value of each image


def picture(red: int, suffix: str = ".png") -> bytes:
    """The bytes of an image of one colour."""
    payload = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(payload, Image.registered_extensions()[suffix.lower()])
    return payload.getvalue()


PICTURES = {key: picture(red, Path(key).suffix) for key, (_, red) in zip(KEYS, REDS, strict=True)}


def opened(url: str | Path, **options: Any) -> ImageFiles:
    return ImageFiles(str(url), image_size=8, **options)


def everything(images: Source) -> Batch:
    batch = images.load(range(len(images.keys)))
    assert not batch.failures
    return batch


def reds(images: Source) -> list[tuple[str, int]]:
    """The class and the red value of every image."""
    pixels = everything(images).pixels
    return [(images.classes[label], int(p[0, 0, 0])) for label, p in zip(images.labels, pixels, strict=True)]


def write_folder(path: Path, contents: Mapping[str, bytes]) -> Path:
    for key, payload in contents.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(payload)
    return path


def write_zip(path: Path, contents: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, payload in contents.items():
            archive.writestr(zipfile.ZipInfo(key), payload)
    return path


def write_tar(path: Path, contents: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, payload in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


def samples(pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Members of a tar: every picture and the name of its class."""
    members = {}
    for key, payload in pictures.items():
        members[key] = payload
        members[key.split(".")[0] + ".cls"] = key.split("/")[0].encode()
    return members


def write_parquet(
    path: Path,
    payloads: Sequence[bytes | None],
    labels: Sequence[object],
    names: Sequence[str] | None = None,
    *,
    label: str = "label",
    rows_per_group: int = 2,
) -> Path:
    """As `datasets` writes it: images as `{bytes, path}`, and the names of classes in the schema's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.array(
        [{"bytes": payload, "path": f"{row}.png"} for row, payload in enumerate(payloads)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, label: pa.array(labels)})
    if names is not None:
        features = {"image": {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def parquet_of(path: Path, pictures: Mapping[str, bytes]) -> Path:
    names = sorted({key.split("/")[0] for key in pictures})
    labels = [names.index(key.split("/")[0]) for key in pictures]
    return write_parquet(path, list(pictures.values()), labels, names)


def in_memory(path: Path) -> str:
    """The URL of a copy of a file or folder that is on no disk."""
    found = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    copies = {f"/{file.relative_to(path.parent)}": file.read_bytes() for file in found}
    fsspec.filesystem("memory").pipe(copies)
    return f"memory://{path.name}"


@pytest.fixture(autouse=True)
def _memory_is_empty() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with three and two images; the same file name in both, and one image in a nested folder."""
    return write_folder(tmp_path / "images", PICTURES)


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


def in_forks(images: Source, indices: Sequence[int], count: int) -> list[Batch]:
    """What forks of this process read at the same time, with all that it has open."""
    context = multiprocessing.get_context("fork")

    def read(end: Any) -> None:
        end.send(images.load(indices))

    receivers = []
    for _ in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=read, args=(sender,))
        process.start()
        sender.close()  # so that the end of the process is the end of the pipe
        receivers.append((receiver, process))
    batches = [receiver.recv() for receiver, _ in receivers]
    for _, process in receivers:
        process.join()
    return batches


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
def test_a_connection_that_does_not_survive_a_fork_is_made_anew(tmp_path: Path, name: str) -> None:
    fsspec.register_implementation("remote", Remote, clobber=True)
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


def zipped(folder: Path) -> str:
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return str(write_zip(folder.with_suffix(".zip"), contents))


SPREAD: dict[str, Callable[[Path], str]] = {"a folder": str, "a zip file": zipped, "memory": in_memory}


@pytest.fixture(params=SPREAD)
def spread(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Puts a folder where it is, into a zip file, or into memory."""
    return SPREAD[request.param]


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
    for name in ("cat/.1.png", "cat/notes.txt", "cat/png", "top.png", ".hidden/1.png", "cat/.ipynb_checkpoints/1.png"):
        write_folder(root, {name: picture(1)})
    (root / "empty").mkdir()
    (root / "cat" / "folder.png").mkdir()
    images = opened(spread(root))
    assert images.keys == KEYS
    assert images.classes == ("cat", "dog")


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
    write_folder(tmp_path, {"1.png": picture(0), "cat/notes.txt": b""})  # one that is in no class, and a class of none
    with pytest.raises(ValueError, match=r"data\.source: no images under .*one folder per class"):
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


# Classes and lists


def test_classes_are_numbered_in_the_order_of_their_list(root: Path, spread: Callable[[Path], str]) -> None:
    text = "\ufeffdog\ta remark\r\nbird\r\n\r\ncat\n"
    (root / "classes.txt").write_bytes(text.encode())
    images = opened(spread(root))
    assert images.classes == ("dog", "bird", "cat")  # a class may be without images
    np.testing.assert_array_equal(images.labels, [2, 2, 2, 0, 0])
    assert reds(images) == REDS


def test_a_class_that_is_not_in_the_list_is_refused(root: Path, spread: Callable[[Path], str]) -> None:
    (root / "classes.txt").write_text("cat\nbird\n")
    with pytest.raises(ValueError, match=r"dog/1\.png: its class dog is not in classes\.txt"):
        opened(spread(root))


LISTED = {"a/1.png": picture(10), "2.png": picture(20), "3.png": picture(30)}  # the last is on no list
LISTS: dict[str, Callable[[Sequence[tuple[str, Any]]], str]] = {
    "metadata.csv": lambda rows: "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows),
    "metadata.jsonl": lambda rows: "".join(
        json.dumps({"file_name": name, "text": "of\u2028two lines", "label": label}, ensure_ascii=False) + "\n\n"
        for name, label in rows
    ),
    "dataset.json": lambda rows: json.dumps({"labels": rows}),
}


def listed_folder(path: Path, name: str, rows: Sequence[tuple[str, Any]], encoding: str = "utf-8") -> Path:
    return write_folder(path, {**LISTED, name: LISTS[name](rows).encode(encoding)})


@pytest.mark.parametrize("name", LISTS)
def test_a_list_says_which_files_are_images_and_of_what_number(
    tmp_path: Path, name: str, spread: Callable[[Path], str]
) -> None:
    folder = listed_folder(tmp_path / "images", name, [("2.png", 2), ("./a/1.png", 0)])
    images = opened(spread(folder))
    assert images.keys == ["2.png", "a/1.png"]
    assert images.classes == ("0", "1", "2")
    assert reds(images) == [("2", 20), ("0", 10)]
    assert all(images.stamps)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_may_name_classes(tmp_path: Path, name: str, spread: Callable[[Path], str]) -> None:
    folder = listed_folder(tmp_path / "images", name, [("2.png", "dog"), ("a/1.png", "cat")], "utf-8-sig")
    images = opened(spread(folder))
    assert images.classes == ("cat", "dog")
    assert reds(images) == [("dog", 20), ("cat", 10)]


@pytest.mark.parametrize("name", LISTS)
def test_the_fingerprint_shows_that_a_list_gives_an_image_another_class(tmp_path: Path, name: str) -> None:
    folder = listed_folder(tmp_path, name, [("2.png", "dog"), ("a/1.png", "cat")])
    first = opened(folder).fingerprint()
    (folder / name).write_text(LISTS[name]([("2.png", "dog"), ("a/1.png", "dog")]), encoding="utf-8")
    assert opened(folder).fingerprint() != first


@pytest.mark.parametrize("name", LISTS)
def test_numbers_of_a_list_are_lines_of_the_list_of_classes(tmp_path: Path, name: str) -> None:
    folder = listed_folder(tmp_path, name, [("2.png", 1), ("a/1.png", 0)])
    (folder / "classes.txt").write_text("cat\ndog\nbird\n")
    images = opened(folder)
    assert images.classes == ("cat", "dog", "bird")
    assert reds(images) == [("dog", 20), ("cat", 10)]


@pytest.mark.parametrize("name", LISTS)
def test_a_number_that_no_class_has_is_refused(tmp_path: Path, name: str) -> None:
    folder = listed_folder(tmp_path, name, [("2.png", 1), ("a/1.png", 2)])
    (folder / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"a/1\.png: its label \d+ is none of the 2 classes"):
        opened(folder)


@pytest.mark.parametrize("name", ["metadata.jsonl", "dataset.json"])
@pytest.mark.parametrize("label", [-1, None, True, 1.5, [0, 1], ""])
def test_a_label_that_is_no_class_is_refused(tmp_path: Path, name: str, label: object) -> None:
    with pytest.raises(ValueError, match=r"data\.source: .*label"):
        opened(listed_folder(tmp_path, name, [("a/1.png", 0), ("2.png", label)]))


def test_captions_without_classes_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {**LISTED, "metadata.csv": b"file_name,text\n2.png,a dog\n3.png,a cat\n"})
    with pytest.raises(ValueError, match="some are missing"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"), [("metadata.csv", "file_name\n{}\n"), ("metadata.jsonl", '{{"file_name": "{}"}}')]
)
def test_where_a_list_has_no_labels_the_folder_is_the_class(root: Path, name: str, text: str) -> None:
    (root / name).write_text(text.format("dog/1.png"))
    assert reds(opened(root)) == [("dog", 120)]


def test_where_a_data_set_has_no_labels_its_folders_are_the_classes(root: Path, spread: Callable[[Path], str]) -> None:
    (root / "dataset.json").write_text('{"labels": null}')
    assert reds(opened(spread(root))) == REDS


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("outside", ["../1.png", "a/../../1.png", "/1.png"])
def test_a_list_does_not_lead_out_of_its_folder(tmp_path: Path, name: str, outside: str) -> None:
    (tmp_path / "1.png").write_bytes(picture(99))
    with pytest.raises(ValueError, match=f"{name}: .*leads out of the folder"):
        opened(listed_folder(tmp_path / "images", name, [(outside, 0)]))


def test_a_listed_file_that_is_missing_is_a_failure(tmp_path: Path, spread: Callable[[Path], str]) -> None:
    folder = listed_folder(tmp_path / "images", "dataset.json", [("2.png", 0), ("gone.png", 0)])
    batch = opened(spread(folder)).load([0, 1])
    assert list(batch.failures) == [1]
    assert "gone.png" in batch.failures[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", b"name,label\n1.png,0\n"),
        ("metadata.csv", b"file_name,label\n1.png," + b"9" * 200_000),
        ("metadata.csv", b"file_name,label\n\xff.png,0\n"),
        ("metadata.jsonl", b'{"label": 0}'),
        ("metadata.jsonl", b'["1.png", 0]'),
        ("metadata.jsonl", b'{"file_name": "1.png"'),
        ("dataset.json", b"[]"),
        ("dataset.json", b"{}"),
        ("dataset.json", b'{"labels": [["1.png"]]}'),
        ("dataset.json", b'{"labels": 5}'),
        ("dataset.json", b'{"labels"'),
    ],
)
def test_a_damaged_list_is_refused_by_its_name(root: Path, name: str, text: bytes) -> None:
    (root / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"data.source: {name}: .*: see docs/data.md"):
        opened(root)


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:SECRET@bucket/images",
        "s3://KEY:SEC/RET@bucket/images",
        "https://SECRET@example.org/images.zip",
        "zip://*::https://user:SECRET@example.org/images.zip",
        "ftp://user:SECRET@example.org:21/images",
    ],
)
def test_a_url_with_credentials_is_refused_and_not_printed(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"data\.source: a URL with credentials") as caught:
        opened(url)
    printed = "".join(capfd.readouterr()) + str(caught.value) + repr(caught.value.__cause__)
    assert "SEC" not in printed
    assert "KEY" not in printed


@pytest.mark.parametrize("url", ["nosuch://host:8020/a", "nosuch://user/name@main/a:b", "nosuch://a.tar::memory://b"])
def test_a_port_a_revision_and_a_chain_are_no_credentials(url: str) -> None:
    with pytest.raises(ValueError, match=r"data\.source: nosuch://.*nosuch"):
        open_container(url)


def test_a_tar_within_a_zip_file_is_read_by_a_chained_url(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", samples(PICTURES)).read_bytes()
    outer = write_zip(tmp_path / "outer.zip", {"inner.tar": inner})
    assert reds(opened(f"zip://inner.tar::{outer}")) == REDS
