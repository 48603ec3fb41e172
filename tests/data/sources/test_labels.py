"""Class lists, and lists of files and labels in a folder."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from data.sources.base import NO_CLASS
from tests.helpers.pictures import (
    REDS,
    opened,
    picture,
    reds,
    write_folder,
)


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
    assert images.classes == ("0", "2")  # numbers without names are names: there is no class without images
    assert reds(images) == [("2", 20), ("0", 10)]
    assert all(images.stamps)
    assert images.notes == [f"skipped: 1 not listed in {name} (such as 3.png)"]


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
    with pytest.raises(ValueError, match=r"a/1\.png: its label \d+ is not one of the 2 classes"):
        opened(folder)


@pytest.mark.parametrize("name", ["metadata.jsonl", "dataset.json"])
@pytest.mark.parametrize("label", [-1, 1.5, [0, 1], {}])
def test_a_label_that_is_no_class_is_refused(tmp_path: Path, name: str, label: object) -> None:
    with pytest.raises(ValueError, match=r"data\.source: .*label"):
        opened(listed_folder(tmp_path, name, [("a/1.png", 0), ("2.png", label)]))


@pytest.mark.parametrize("name", ["metadata.jsonl", "dataset.json"])
@pytest.mark.parametrize("label", [None, ""])
def test_an_image_without_a_label_beside_others_has_no_class_which_is_said(
    tmp_path: Path, name: str, label: object
) -> None:
    images = opened(listed_folder(tmp_path, name, [("a/1.png", "cat"), ("2.png", label)]))
    assert images.classes == ("cat",)
    assert images.labels.tolist() == [0, NO_CLASS]
    assert "1 image has no class (such as 2.png): they train as unlabelled images" in images.notes


@pytest.mark.parametrize(("label", "expected"), [(2, "2"), (2.0, "2"), (True, "true"), (" x ", "x"), ("007", "007")])
def test_labels_of_every_kind_are_names_in_their_written_form(tmp_path: Path, label: object, expected: str) -> None:
    images = opened(listed_folder(tmp_path, "metadata.jsonl", [("a/1.png", "dog"), ("2.png", label)]))
    assert reds(images) == [("dog", 10), (expected, 20)]


def test_numbers_and_names_in_one_list_are_all_names_which_is_said(tmp_path: Path) -> None:
    images = opened(listed_folder(tmp_path, "metadata.jsonl", [("a/1.png", "dog"), ("2.png", 7)]))
    assert images.classes == ("7", "dog")
    assert "numbers (such as that of 2.png) and names (such as that of a/1.png)" in images.notes[1]


def test_codes_that_are_numbers_keep_their_digits_and_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    write_folder(tmp_path, {**LISTED, "metadata.csv": b"file_name,label\n2.png,4006381333931\n3.png,0012\na/1.png,9\n"})
    assert opened(tmp_path).classes == ("9", "0012", "4006381333931")


def test_captions_are_no_classes_and_images_without_folders_are_one_class(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"2.png": picture(20), "3.png": picture(30), "metadata.csv": b"file_name,text\n2.png,a dog\n"}
    )
    images = opened(tmp_path)
    assert reds(images) == [("images", 20), ("images", 30)]
    assert images.notes == ["no image has a class: all get one class, images, for an unconditional model"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_columns_may_be_separated_by_other_marks(tmp_path: Path, separator: str) -> None:
    lines = ["label,file_name", '"a cat",a\\1.png', "dog, ./2.png", "dog,3.png"]
    text = "\r\n".join(line.replace(",", separator) for line in lines)
    write_folder(tmp_path, {**LISTED, "metadata.csv": text.encode("utf-8-sig")})
    assert reds(opened(tmp_path)) == [("a cat", 10), ("dog", 20), ("dog", 30)]


@pytest.mark.parametrize("name", ["metadata.jsonl", "dataset.json"])
def test_a_list_that_is_nested_too_deeply_is_named(tmp_path: Path, name: str) -> None:
    listed_folder(tmp_path, name, [("2.png", "dog")])
    (tmp_path / name).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}: ValueError: its JSON is nested too deeply"):
        opened(tmp_path)


def test_lines_of_json_may_be_one_array(tmp_path: Path) -> None:
    text = json.dumps([{"file_name": "2.png", "label": "dog"}, {"file_name": "a/1.png", "label": "cat"}], indent=1)
    write_folder(tmp_path, {**LISTED, "metadata.jsonl": text.encode()})
    assert reds(opened(tmp_path)) == [("dog", 20), ("cat", 10)]


@pytest.mark.parametrize("name", LISTS)
def test_a_file_that_is_listed_with_two_labels_is_refused(tmp_path: Path, name: str) -> None:
    again = [("2.png", "cat"), ("a/1.png", "cat"), ("./2.png", "cat")]
    assert len(opened(listed_folder(tmp_path / "same", name, again)).keys) == 2
    with pytest.raises(ValueError, match=f"{name}: .*2.png is listed as cat and as dog"):
        opened(listed_folder(tmp_path / "other", name, [*again, ("2.png", "dog")]))


def test_the_column_of_classes_may_be_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {**LISTED, "metadata.csv": b"file_name,kind,label\n2.png,dog,x\na/1.png,cat,y\n"})
    assert opened(tmp_path).classes == ("x", "y")
    assert opened(tmp_path, label_column="kind").classes == ("cat", "dog")


def test_a_list_may_lie_in_a_folder_of_its_own(tmp_path: Path, spread: Callable[[Path], str]) -> None:
    contents = {
        **LISTED,
        "a/metadata.csv": b"file_name,label\n1.png,cat\n",
        "metadata.csv": b"file_name,label\n2.png,dog\n",
    }
    images = opened(spread(write_folder(tmp_path / "images", contents)))
    assert sorted(reds(images)) == [("cat", 10), ("dog", 20)]


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_names_are_equal_in_every_form_of_unicode(tmp_path: Path, written: Literal["NFC", "NFD"]) -> None:
    other: Literal["NFC", "NFD"] = "NFD" if written == "NFC" else "NFC"
    name = unicodedata.normalize(other, "café")
    write_folder(tmp_path / "a", {f"{name}/1.png": picture(1), "thé/1.png": picture(2)})
    (tmp_path / "a" / "classes.txt").write_text(unicodedata.normalize(written, "thé\ncafé\n"), encoding="utf-8")
    assert reds(opened(tmp_path / "a")) == [("café", 1), ("thé", 2)]
    listed = unicodedata.normalize(written, "file_name,label\ncafé/1.png,x\nthé/1.png,y\n")
    write_folder(
        tmp_path / "b", {f"{name}/1.png": picture(1), "thé/1.png": picture(2), "metadata.csv": listed.encode()}
    )
    assert reds(opened(tmp_path / "b")) == [("x", 1), ("y", 2)]


def test_a_line_of_the_list_of_classes_may_go_on_with_a_remark(tmp_path: Path) -> None:
    contents = {"n01/1.png": picture(1), "big cat/1.png": picture(2), "classes.txt": b"big cat \nn01 tench, a fish\n"}
    assert reds(opened(write_folder(tmp_path, contents))) == [("big cat", 2), ("n01", 1)]


def test_a_class_that_is_listed_twice_is_refused(root: Path) -> None:
    (root / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match=r"classes\.txt: cat is class 0 and class 2"):
        opened(root)


def test_a_class_without_images_is_said(root: Path) -> None:
    (root / "classes.txt").write_text("dog\nbird\ncat\n")
    assert opened(root).notes == ["1 of 3 classes have no image (such as bird)"]


def test_labels_that_begin_at_1_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = listed_folder(tmp_path, "metadata.csv", [("2.png", 1), ("a/1.png", 2)])
    (folder / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(
        ValueError, match=r"label 2 is not one of the 2 classes, numbered from 0 \(the first class is 0, not 1\)"
    ):
        opened(folder)


@pytest.mark.parametrize(
    ("name", "text"), [("metadata.csv", "file_name\n{}\n"), ("metadata.jsonl", '{{"file_name": "{}"}}')]
)
def test_where_a_list_has_no_labels_the_folder_is_the_class(root: Path, name: str, text: str) -> None:
    (root / name).write_text(text.format("dog/1.png"))
    assert reds(opened(root)) == REDS


def test_where_a_data_set_has_no_labels_its_folders_are_the_classes(root: Path, spread: Callable[[Path], str]) -> None:
    (root / "dataset.json").write_text('{"labels": null}')
    assert reds(opened(spread(root))) == REDS


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("outside", ["../1.png", "a/../../1.png", "/1.png"])
def test_a_list_does_not_lead_out_of_its_folder(tmp_path: Path, name: str, outside: str) -> None:
    (tmp_path / "1.png").write_bytes(picture(99))
    with pytest.raises(ValueError, match=f"{name}: .*is outside the folder"):
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
