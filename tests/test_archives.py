"""Images in zip files, tar shards and Parquet files."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import folder, tar_shards
from tests.pictures import (
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
        ({"b.png": picture(1), "b.cls": b"1"}, {"a.x.png": b"", "a/1.png": picture(2), "a/1.cls": b"0"})
    ):
        write_tar(tmp_path / f"train-{number}.tar", members)
    images = opened(tmp_path)
    assert images.keys == ["train-0.tar/b", "train-1.tar/a/1"]
    assert reds(images) == [("1", 1), ("0", 2)]
    assert reds(opened(tmp_path / "train-*.tar")) == reds(images)
    assert opened(tmp_path / "train-*.tar").keys == images.keys
    assert opened(tmp_path / "train-1.tar").keys == images.keys[1:]


def test_shards_of_one_name_in_two_folders_have_keys_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "0.tar", samples(PICTURES))
        parquet_of(tmp_path / folder / "0.parquet", PICTURES)
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
    with pytest.raises(ValueError, match=r"2\.tar/1: its label -?\d+ is none of the 2 classes"):
        opened(url)


@pytest.mark.parametrize(
    "beside",
    [{}, {"1.json": b"{}"}, {"1.cls": b""}, {"2.cls": b"0"}, {"1.cls": b"x" * (tar_shards.MAX_LABEL_BYTES + 1)}],
    ids=["nothing", "no label", "empty", "another's", "huge"],
)
def test_an_image_without_a_label_is_refused(tmp_path: Path, beside: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"1\.tar: 1: no 1\.cls and no label in a 1\.json beside it"):
        opened(write_tar(tmp_path / "1.tar", {"1.png": picture(5), **beside}))


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
            ("hard.png", tarfile.LNKTYPE, "cat/1.png"),
            ("link.cls", tarfile.SYMTYPE, "cat/1.cls"),
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


# Parquet files


def test_rows_of_several_files_and_groups_are_one_data_set(tmp_path: Path) -> None:
    names, payloads = ["cat", "dog"], list(PICTURES.values())
    write_parquet(tmp_path / "data/train-00000.parquet", payloads[:3], [0, 0, 0], names, rows_per_group=2)
    write_parquet(tmp_path / "data/train-00001.parquet", payloads[3:], [1, 1], names, rows_per_group=1)
    images = opened(tmp_path)
    assert images.keys[2:4] == ["data/train-00000.parquet/000002", "data/train-00001.parquet/000000"]
    assert reds(images) == REDS
    assert images.load([4, 0, 3]).pixels[:, 0, 0, 0].tolist() == [160, 0, 120]
    assert reds(opened(tmp_path / "data")) == reds(opened(tmp_path / "data" / "train-*.parquet")) == REDS


def test_names_of_classes_are_those_of_the_schema(tmp_path: Path) -> None:
    payloads = [picture(1), picture(2)]
    named = write_parquet(tmp_path / "1.parquet", payloads, [2, 0], ["zebra", "ape", "cat"], label="fine_label")
    assert opened(named).classes == ("zebra", "ape", "cat")
    assert reds(opened(named)) == [("cat", 1), ("zebra", 2)]
    assert reds(opened(write_parquet(tmp_path / "2.parquet", payloads, [2, 0]))) == [("2", 1), ("0", 2)]
    assert reds(opened(write_parquet(tmp_path / "3.parquet", payloads, ["dog", "cat"]))) == [("dog", 1), ("cat", 2)]


@pytest.mark.parametrize(
    ("labels", "names", "reason"),
    [
        ([0, -1], ["cat", "dog"], r"1\.parquet/000001: its label -?\d+ is none of the 2 classes"),
        ([0, 2], ["cat", "dog"], r"1\.parquet/000001: its label -?\d+ is none of the 2 classes"),
        ([0, None], ["cat", "dog"], "some are missing"),
    ],
)
def test_rows_without_a_class_are_refused(
    tmp_path: Path, labels: list[int | None], names: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        opened(write_parquet(tmp_path / "1.parquet", [picture(1), picture(2)], labels, names))


def test_files_whose_classes_have_other_numbers_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet", [picture(1)], [0], ["cat", "dog"])
    write_parquet(tmp_path / "2.parquet", [picture(2)], [0], ["dog", "cat"])
    with pytest.raises(ValueError, match=r"1\.parquet, 2\.parquet: they differ in the names"):
        opened(tmp_path)


def test_a_row_without_bytes_is_a_failure(tmp_path: Path) -> None:
    images = opened(write_parquet(tmp_path / "1.parquet", [picture(1), None, b"", picture(4)], [0, 0, 0, 0]))
    batch = images.load(range(4))
    assert list(batch.failures) == [1, 2]
    assert batch.failures[1] == "ValueError: the row has no image bytes"
    assert batch.pixels[[0, 3], 0, 0, 0].tolist() == [1, 4]


def test_a_table_without_images_or_labels_is_refused_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet: needs a column of images .* it has text, label"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"2\.parquet: needs .* one named label; it has image, kind"):
        opened(write_parquet(tmp_path / "2.parquet", [picture(0)], [0], label="kind"))


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_parquet_file_is_refused(tmp_path: Path, length: int) -> None:
    path = parquet_of(tmp_path / "1.parquet", PICTURES)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"data\.source: .*1\.parquet: "):
        opened(path)


def test_a_damaged_page_of_a_parquet_file_is_a_failure(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "1.parquet", PICTURES)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    payload = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    payload[start : start + 40] = bytes(40)
    images = opened(path)
    path.write_bytes(payload)
    assert sorted(images.load(range(5)).failures) == [2, 3]


def test_pyarrow_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet_of(tmp_path / "1.parquet", PICTURES)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"need pyarrow: pip install 'latentmill\[parquet\]'"):
        opened(path)
