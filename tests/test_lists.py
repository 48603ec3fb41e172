"""Class lists, and lists of files and labels in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pictures import (
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
