"""Images in Parquet files."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sources.base import NO_CLASS
from tests.helpers.pictures import KEYS, PICTURES, REDS, opened, parquet_of, picture, reds, write_parquet


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
        ([0, -1], ["cat", "dog"], r"1\.parquet/000001: its label -?\d+ is not one of the 2 classes"),
        ([0, 2], ["cat", "dog"], r"1\.parquet/000001: its label -?\d+ is not one of the 2 classes"),
    ],
)
def test_rows_without_a_class_are_refused(tmp_path: Path, labels: list[int], names: list[str], reason: str) -> None:
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
    with pytest.raises(ValueError, match=r"1\.parquet: needs a column of images.* it has text, label"):
        opened(tmp_path)
    path = write_parquet(tmp_path / "2.parquet", [picture(0)], [0], label="kind")
    with pytest.raises(
        ValueError, match=r"2\.parquet: needs .* or data\.label_column=kind, for example; it has image, kind"
    ):
        opened(path)
    assert reds(opened(path, label_column="kind")) == [("0", 0)]
    with pytest.raises(ValueError, match=r"data\.image_column = text: no column of images; it has image, kind"):
        opened(path, image_column="text")


BYTES = list(PICTURES.values())
IMAGES: dict[str, pa.Array] = {
    "binary": pa.array(BYTES, pa.binary()),
    "large binary": pa.array(BYTES, pa.large_binary()),
    "path first": pa.array(
        [{"path": None, "bytes": each} for each in BYTES], pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    ),
    "as polars has it": pa.array(
        [{"bytes": each, "path": "x"} for each in BYTES],
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
    ),
    "bytes alone": pa.array([{"bytes": each} for each in BYTES], pa.struct([("bytes", pa.binary())])),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_read_from_columns_of_every_kind_that_holds_bytes(tmp_path: Path, kind: str) -> None:
    pq.write_table(
        pa.table({"label": [key.split("/")[0] for key in KEYS], "image": IMAGES[kind]}), tmp_path / "1.parquet"
    )
    images = opened(tmp_path / "1.parquet")
    assert reds(images) == REDS
    assert images.size > 0


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (pa.array([1, 2, 1, 2, 5], pa.uint8()), ("1", "2", "5"), [0, 1, 0, 1, 2]),
        (pa.array([True, False, True, True, True]), ("false", "true"), [1, 0, 1, 1, 1]),
        (pa.array([0.0, 3.0, 0.0, 0.0, 0.0]), ("0", "3"), [0, 1, 0, 0, 0]),
        (pa.array([0, None, 0, 1, 1]), ("0", "1"), [0, NO_CLASS, 0, 1, 1]),
        (pa.array(["b", "a", None, "b", "b"]).dictionary_encode(), ("a", "b"), [1, 0, NO_CLASS, 1, 1]),
    ],
)
def test_labels_of_a_column_are_whole_numbers_truths_or_texts(
    tmp_path: Path, labels: pa.Array, classes: tuple[str, ...], numbers: list[int]
) -> None:
    pq.write_table(pa.table({"image": IMAGES["binary"], "target": labels}), tmp_path / "1.parquet")
    images = opened(tmp_path / "1.parquet")
    assert images.classes == classes
    assert images.labels.tolist() == numbers


@pytest.mark.parametrize(
    ("labels", "value"), [([[0]] * 5, r"\[0\]"), ([0.0, 1.5, 0.0, 0.0, 0.0], "1.5"), ([b"cat"] * 5, "b'cat'")]
)
def test_a_label_that_is_no_class_is_refused_by_column_row_and_value(
    tmp_path: Path, labels: list[object], value: str
) -> None:
    pq.write_table(pa.table({"image": IMAGES["path first"], "label": pa.array(labels)}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=rf"1\.parquet: column label, row [01]: {value}: an image has one class"):
        opened(tmp_path / "1.parquet", image_column="image")


def test_of_several_columns_of_images_one_is_chosen_by_its_name(tmp_path: Path) -> None:
    columns = {"mask": pa.array([picture(1)]), "photo": pa.array([picture(2)]), "label": [0], "fine_label": [7]}
    pq.write_table(pa.table(columns), tmp_path / "1.parquet")
    with pytest.raises(
        ValueError, match=r"2 columns hold images, mask, photo: give data\.image_column=mask, for example"
    ):
        opened(tmp_path)
    assert reds(opened(tmp_path, image_column="photo")) == [("0", 2)]
    assert reds(opened(tmp_path, image_column="mask", label_column="fine_label")) == [("7", 1)]
    pq.write_table(pa.table({**columns, "image": pa.array([picture(3)])}), tmp_path / "1.parquet")
    images = opened(tmp_path)
    assert reds(images) == [("0", 3)]
    assert images.notes == ["images are read from column image, classes from label"]


def test_a_file_of_no_rows_is_read_beside_others(tmp_path: Path) -> None:
    table = pa.table({"image": IMAGES["binary"], "label": [0, 0, 0, 1, 1]})
    pq.write_table(table.slice(0, 0), tmp_path / "0.parquet")
    pq.write_table(table, tmp_path / "1.parquet")
    assert len(opened(tmp_path).keys) == 5


def test_a_table_of_images_alone_is_one_class(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": IMAGES["binary"]}), tmp_path / "1.parquet")
    assert opened(tmp_path).classes == ("images",)


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
    with pytest.raises(ValueError, match=r"need pyarrow: run make setup, or pip install pyarrow"):
        opened(path)
