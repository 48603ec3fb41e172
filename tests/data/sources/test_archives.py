"""Images in zip files, tar shards and Parquet files."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data.sources import folder, tar
from data.sources.base import NO_CLASS
from tests.helpers.pictures import (
    KEYS,
    PICTURES,
    REDS,
    in_forks,
    in_memory,
    opened,
    parquet_of,
    picture,
    reds,
    samples,
    write_folder,
    write_parquet,
    write_tar,
    write_zip,
)

# Zip files


def test_members_of_a_zip_file_that_lead_elsewhere_or_are_hidden_are_passed_over(tmp_path: Path) -> None:
    evil = {"../cat/1.png": picture(1), "cat/../../1.png": picture(2), "__MACOSX/cat/._1.png": b"", ".x/1.png": b""}
    before = set(tmp_path.parent.rglob("*"))
    images = opened(write_zip(tmp_path / "images.zip", evil | PICTURES))
    assert reds(images) == REDS
    assert set(tmp_path.parent.rglob("*")) - before == {tmp_path / "images.zip"}


def test_a_damaged_member_of_a_zip_file_is_a_failure(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", PICTURES)
    payload = bytearray(path.read_bytes())
    for place in (zipfile.ZipFile(path).getinfo(key).header_offset + 30 + len(key) + 8 for key in KEYS[:2]):
        payload[place] ^= 0xFF
    path.write_bytes(payload)
    batch = opened(path).load(range(5))
    assert list(batch.failures) == [0, 1]
    assert batch.pixels[2:, 0, 0, 0].tolist() == [80, 120, 160]


@pytest.mark.parametrize("length", [0, 10, 100, -1, -30])
def test_a_truncated_zip_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write_zip(tmp_path / "images.zip", PICTURES)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"data\.source: .*images\.zip: .*zip"):
        opened(path)


def test_a_member_of_a_zip_file_over_the_limit_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MAX_FILE_BYTES", 1000)
    bomb = picture(0) + bytes(2_000_000)  # the image is there to be read, if it were unpacked
    batch = opened(write_zip(tmp_path / "images.zip", {"cat/1.png": bomb, "cat/2.png": picture(3)})).load([0, 1])
    assert batch.failures == {0: f"ValueError: {len(bomb)} bytes, over the limit of 1000"}


def test_one_zip_file_may_be_given_by_a_pattern_and_is_read_in_forks(tmp_path: Path) -> None:
    write_zip(tmp_path / "images-of-today.zip", PICTURES)
    images = opened(tmp_path / "images-*.zip")
    (batch,) = in_forks(images, range(5), 1)
    assert not batch.failures


# Tar shards


def test_the_key_of_a_sample_is_its_tar_and_its_name_up_to_the_first_dot(tmp_path: Path) -> None:
    for number, members in enumerate(
        ({"b.png": picture(1), "b.cls": b"1"}, {"a/1.x.png": picture(2), "a/1.cls": b"0"})
    ):
        write_tar(tmp_path / f"train-{number}.tar", members)
    images = opened(tmp_path)
    assert images.keys == ["train-0.tar/b", "train-1.tar/a/1"]
    assert reds(images) == [("1", 1), ("0", 2)]
    assert reds(opened(tmp_path / "train-*.tar")) == reds(images)
    assert opened(tmp_path / "train-*.tar").keys == images.keys
    assert opened(tmp_path / "train-1.tar").keys == images.keys[1:]


def test_shards_of_one_name_in_two_folders_have_keys_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / name / "0.tar", samples(PICTURES))
        parquet_of(tmp_path / name / "0.parquet", PICTURES)
    assert opened(tmp_path / "*" / "0.tar").keys[4:6] == ["a/0.tar/dog/2", "b/0.tar/cat/1"]
    assert opened(tmp_path / "*" / "0.parquet").keys[4:6] == ["a/0.parquet/000004", "b/0.parquet/000000"]


LABELS: dict[str, tuple[dict[str, bytes], str]] = {
    "a number": ({"1.cls": b"1\n"}, "1"),
    "a name": ({"1.cls": "Hündin".encode()}, "Hündin"),
    "a number in JSON": ({"1.json": b'{"label": 1}'}, "1"),
    "a name in JSON": ({"1.json": b'{"label": "dog", "text": "a dog"}'}, "dog"),
    "JSON of other things": ({"1.cls": b"dog", "1.json": b'{"text": "a dog"}'}, "dog"),
    "JSON of other things, first": ({"1.json": b"[5]", "1.cls": b"dog"}, "dog"),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("first", [True, False])
def test_the_class_of_a_sample_is_what_lies_beside_it(tmp_path: Path, kind: str, first: bool) -> None:
    beside, expected = LABELS[kind]
    image = {"1.png": picture(5)}
    images = opened(write_tar(tmp_path / "1.tar", image | beside if first else beside | image))
    assert reds(images) == [(expected, 5)]


@pytest.mark.parametrize("memory", [True, False])
def test_classes_beside_the_tars_name_the_numbers(tmp_path: Path, memory: bool) -> None:
    folder = tmp_path / "shards"
    write_tar(folder / "1.tar", {"1.png": picture(5), "1.cls": b"1", "2.png": picture(6), "2.cls": b"0"})
    (folder / "classes.txt").write_text("cat\ndog\n")
    url = in_memory(folder) if memory else str(folder)
    assert reds(opened(url)) == reds(opened(f"{url}/1.tar")) == [("dog", 5), ("cat", 6)]
    write_tar(folder / "2.tar", {"1.png": picture(5), "1.cls": b"2"})
    url = in_memory(folder) if memory else str(folder)
    with pytest.raises(ValueError, match=r"2\.tar/1: its label -?\d+ is not one of the 2 classes"):
        opened(url)


@pytest.mark.parametrize(
    "beside",
    [{}, {"1.json": b"{}"}, {"1.cls": b""}, {"1.cls": b"x" * (tar.MAX_LABEL_BYTES + 1)}],
    ids=["nothing", "no label", "empty", "huge"],
)
def test_an_image_without_a_label_beside_others_has_no_class(tmp_path: Path, beside: dict[str, bytes]) -> None:
    other = {"0.png": picture(4), "0.cls": b"cat"}
    images = opened(write_tar(tmp_path / "1.tar", {**other, "1.png": picture(5), **beside}))
    assert images.labels.tolist() == [0, NO_CLASS]
    assert "1 image has no class (such as 1.tar/1): they train as unlabelled images" in images.notes


def test_an_image_without_a_label_and_a_label_without_an_image_are_refused_by_their_names(tmp_path: Path) -> None:
    members = {"a.png": picture(1), "a.cls": b"0", "Bee.png": picture(2), "x.cls": b"1", "bee.cls": b"1"}
    with pytest.raises(ValueError, match=r"Bee\.png has no label, and bee\.cls no image: .*the same case"):
        opened(write_tar(tmp_path / "1.tar", members))
    images = opened(write_tar(tmp_path / "2.tar", {"a.png": picture(1), "a.cls": b"0", "x.cls": b"1"}))
    assert images.notes == [f"skipped: 1 without an image (labels) (such as {tmp_path}/2.tar/x.cls)"]


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    for again in ("1.png", "./1.png", "x/../1.png"):
        path = write_tar(tmp_path / "1.tar", {"1.png": picture(1), "1.cls": b"0"})
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo(again)
            archive.addfile(info, io.BytesIO())
        if ".." in again:
            assert "hidden or outside" in opened(path).notes[0]
        else:
            with pytest.raises(ValueError, match=r"1\.tar: .*two members are called 1\.png"):
                opened(path)


def test_samples_whose_names_differ_in_case_are_two(tmp_path: Path) -> None:
    members = {"a.png": picture(1), "A.PNG": picture(2), "./a.cls": b"0", "A.cls": b"1"}
    assert reds(opened(write_tar(tmp_path / "1.tar", members))) == [("0", 1), ("1", 2)]


def test_two_images_of_one_sample_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "1.tar", {"1.png": picture(9), "1.bmp": picture(5, ".bmp"), "1.cls": b"0"})
    with pytest.raises(ValueError, match=r"1\.png and 1\.bmp are two images of one sample: .*data\.image_column=png"):
        opened(path)
    images = opened(path, image_column="bmp")
    assert reds(images) == [("0", 5)]
    assert images.notes == [f"skipped: 1 .png (such as {path}/1.png)"]


def test_dots_that_make_two_images_one_sample_are_refused(tmp_path: Path) -> None:
    members = {"v1.0.png": picture(1), "v1.0.cls": b"0", "v1.5.png": picture(2), "v1.5.cls": b"0"}
    with pytest.raises(ValueError, match=r"v1\.0\.png and v1\.5\.png are one sample, v1, .* first dot"):
        opened(write_tar(tmp_path / "1.tar", members))
    parts = {"1.seg.png": picture(1), "1.png": picture(2), "1.cls": b"0"}
    assert reds(opened(write_tar(tmp_path / "2.tar", parts), image_column="png")) == [("0", 2)]


def test_two_labels_of_one_sample_are_refused_if_they_differ(tmp_path: Path) -> None:
    members = {"1.png": picture(1), "1.cls": b"0", "1.json": b'{"label": 0}'}
    assert reds(opened(write_tar(tmp_path / "1.tar", members))) == [("0", 1)]
    with pytest.raises(ValueError, match=r"1\.cls says 0, 1\.json says 1"):
        opened(write_tar(tmp_path / "2.tar", {**members, "1.json": b'{"label": 1}'}))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_inside_a_tar_are_followed_and_others_counted(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "1.tar", {"a/1.png": picture(1), "a/1.cls": b"cat"})
    inside = "a/1" if kind == tarfile.LNKTYPE else "../a/1"
    links = {"b/2.png": f"{inside}.png", "b/2.cls": f"{inside}.cls", "c/3.png": "b/2.png", "c/3.cls": "b/2.cls"}
    if kind == tarfile.SYMTYPE:
        links |= {"c/3.png": "../b/2.png", "c/3.cls": "/etc/../b/2.cls", "c/4.png": "/etc/hostname", "d/x": "x"}
        del links["c/3.png"], links["c/3.cls"]
    with tarfile.open(path, "a") as archive:
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    images = opened(path)
    assert images.keys[:2] == ["1.tar/a/1", "1.tar/b/2"]
    assert set(reds(images)) == {("cat", 1)}
    assert len(images.keys) == (3 if kind == tarfile.LNKTYPE else 2)
    lost = "2 linked (to nothing in the tar)"
    assert any(lost in note for note in images.notes) == (kind == tarfile.SYMTYPE)


def test_a_tar_of_class_folders_has_these_for_classes_which_is_said(tmp_path: Path) -> None:
    images = opened(write_tar(tmp_path / "pets.tar", {f"./{key}": payload for key, payload in PICTURES.items()}))
    assert sorted(reds(images)) == REDS
    assert images.notes == ["no label beside any image: the folders inside the tars are the classes"]


def test_tars_without_labels_are_one_class_if_they_are_numbered_and_refused_otherwise(tmp_path: Path) -> None:
    for name in ("train-000.tar", "train-001.tar"):
        write_tar(tmp_path / "shards" / name, {"1.png": picture(1)})
    assert opened(tmp_path / "shards").classes == ("images",)
    for name in ("n01440764.tar", "n01443537.tar"):
        write_tar(tmp_path / "classes" / name, {"1.png": picture(1)})
    with pytest.raises(
        ValueError, match=r"n01440764\.tar: no image has a label .*unpack each into a folder of its name"
    ):
        opened(tmp_path / "classes")


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_parts_of_a_data_set_are_not_mixed(tmp_path: Path, suffix: str) -> None:
    for part in ("train-00000-of-00001", "test-00000-of-00001"):
        path = tmp_path / "data" / f"{part}{suffix}"
        write_tar(path, samples(PICTURES)) if suffix == ".tar" else parquet_of(path, PICTURES)
    url = tmp_path / "data" if suffix == ".tar" else tmp_path
    with pytest.raises(
        ValueError, match=rf"several splits .*test, train: .*data\.source={tmp_path}/data/train\*\{suffix}"
    ):
        opened(url)
    assert reds(opened(tmp_path / "data" / f"train*{suffix}")) == REDS


def test_other_files_beside_tars_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", samples(PICTURES))
    write_folder(tmp_path, {"README.md": b"", "2.tar.gz": b""})
    assert opened(tmp_path).notes == ["skipped: 1 .gz (such as 2.tar.gz), 1 .md (such as README.md)"]


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    song = tmp_path / "song"
    canary = pickle.dumps(Canary(song))
    others = {f"cat/1.{suffix}": canary for suffix in ("pkl", "pickle", "pyd", "pth", "npy", "ten", "txt")}
    tar = write_tar(tmp_path / "1.tar", samples(PICTURES) | others | {"cat/9.png": canary, "cat/9.cls": b"cat"})
    packed = write_zip(tmp_path / "1.zip", PICTURES | others | {"cat/9.png": canary})
    parquet = write_parquet(tmp_path / "1.parquet", [*PICTURES.values(), canary], [0, 0, 0, 1, 1, 0], ["cat", "dog"])
    folder = write_folder(tmp_path / "images", PICTURES | others | {"cat/9.png": canary})
    for place in (tar, packed, parquet, folder):
        images = opened(place)
        (failed,) = images.load(range(6)).failures
        assert images.classes[images.labels[failed]] == "cat"
    assert not song.exists()
    pickle.loads(canary)
    assert song.exists()  # the bird can sing


def test_members_of_a_tar_that_are_no_plain_images_and_labels_do_nothing(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "1.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, kind, target in (
            ("link.png", tarfile.SYMTYPE, "/etc/hostname"),
            ("hard.png", tarfile.LNKTYPE, "../cat/1.png"),
            ("link.cls", tarfile.SYMTYPE, "../cat/1.cls"),
            ("fifo.png", tarfile.FIFOTYPE, ""),
            ("device.png", tarfile.CHRTYPE, ""),
            ("folder.png", tarfile.DIRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        for name, payload in {"../evil.png": picture(1), "a/../../evil.cls": b"0", "/abs.txt": b""}.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
        for name, payload in samples(PICTURES).items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    before = set(tmp_path.rglob("*"))
    images = opened(path)
    assert reds(images) == REDS
    assert set(tmp_path.rglob("*")) == before


def test_a_huge_member_is_passed_over_unread(tmp_path: Path) -> None:
    """A file of 16 GiB on paper, all of it a hole: to read it would take the memory, or the patience."""
    huge = tarfile.TarInfo("1.mp4")
    huge.size = 2**34
    rest = write_tar(tmp_path / "rest", samples(PICTURES)).read_bytes()
    with open(tmp_path / "1.tar", "wb") as file:
        file.write(huge.tobuf(tarfile.GNU_FORMAT))
        file.seek(huge.size, io.SEEK_CUR)
        file.write(rest)
    images = opened(tmp_path / "1.tar")
    assert reds(images) == REDS
    (tmp_path / "1.tar").unlink()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ValueError, match=r"data\.source: .*1\.tar: "):
        opened(write_tar(tmp_path / "1.tar", samples(PICTURES), mode))


def test_a_tar_is_refused_wherever_it_was_cut_off(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "1.tar", samples(dict(list(PICTURES.items())[:2])))
    payload = path.read_bytes()
    end = len(payload.rstrip(b"\0"))
    for length in range(0, end, 128):
        path.write_bytes(payload[:length])
        with pytest.raises(ValueError, match=r"data\.source: .*1\.tar: ") as caught:
            opened(path)
        assert "\n" not in str(caught.value)


def test_a_damaged_header_of_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "1.tar", samples(PICTURES))
    payload = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
    for offset in headers:
        payload[offset + 150] ^= 0xFF  # in its checksum
        path.write_bytes(payload)
        with pytest.raises(ValueError, match=r"data\.source: .*1\.tar: "):
            opened(path)
        payload[offset + 150] ^= 0xFF


@pytest.mark.parametrize("label", [b"\xff", b"{", b'{"label": }'])
def test_a_damaged_label_is_refused_by_the_name_of_the_tar(tmp_path: Path, label: bytes) -> None:
    with pytest.raises(ValueError, match=r"data\.source: .*1\.tar: "):
        opened(write_tar(tmp_path / "1.tar", {"1.png": picture(0), "1.json": label}))


def test_hidden_files_beside_the_tars_are_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", samples(PICTURES))
    (tmp_path / "._1.tar").write_bytes(b"what macOS leaves behind")
    assert reds(opened(tmp_path)) == REDS


def test_a_tar_that_was_cut_since_it_was_listed_gives_failures(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "1.tar", samples(PICTURES))
    images = opened(path)
    path.write_bytes(path.read_bytes()[:1000])
    assert sorted(images.load(range(5)).failures) == [1, 2, 3, 4]
    path.unlink()
    assert len(images.load(range(5)).failures) == 5
