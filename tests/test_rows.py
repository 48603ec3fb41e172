"""The listing of a data set that changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.cache import ROWS
from data.rows import Change, Rows


def listing(**images: tuple[str, str]) -> Any:
    """A source that lists images in the order given, each with its class and its stamp."""
    classes = tuple(sorted({name for name, _ in images.values()}))
    labels = np.array([classes.index(name) for name, _ in images.values()], np.int64)
    return SimpleNamespace(
        keys=list(images), labels=labels, classes=classes, stamps=[stamp for _, stamp in images.values()]
    )


OLD = {"a": ("cat", "1"), "b": ("dog", "2"), "c": ("cat", "3")}
NO_CHANGE = Change([], [], [])


@pytest.mark.parametrize(
    ("now", "keys", "change"),
    [
        (OLD, "abc", NO_CHANGE),
        (dict(reversed(OLD.items())), "abc", NO_CHANGE),
        ({"Z": ("dog", "9"), **OLD, "0": ("ant", "8")}, "abcZ0", Change(["Z", "0"], [], [])),
        ({"a": OLD["a"], "c": OLD["c"]}, "ac", Change([], ["b"], [])),
        (OLD | {"b": ("dog", "9")}, "abc", Change([], [], ["b"])),
        (OLD | {"b": ("cat", "2")}, "abc", Change([], [], ["b"])),
        ({"d": ("cow", "2"), "c": ("cat", "9"), "a": OLD["a"]}, "acd", Change(["d"], ["b"], ["c"])),
    ],
    ids=["nothing", "the order", "added", "gone", "another stamp", "another class", "all at once"],
)
def test_a_listing_is_told_from_that_of_the_cache_and_keeps_its_order(
    tmp_path: Path, now: dict[str, tuple[str, str]], keys: str, change: Change
) -> None:
    (tmp_path / ROWS).write_bytes(Rows.of(listing(**OLD)).lines())
    source = listing(**now)
    rows, found = Rows.aligned(source, tmp_path, ("cat", "dog"))
    assert found == change
    assert "".join(rows.keys) == keys
    assert rows.classes[:2] == ("cat", "dog")  # whatever sorts before them
    assert {key: (rows.classes[label], stamp) for key, stamp, label in rows._entries()} == now
    assert [source.keys[index] for index in rows.order] == list(rows.keys)


def test_a_cache_without_a_listing_takes_the_data_set_as_it_is(tmp_path: Path) -> None:
    rows, change = Rows.aligned(listing(**OLD), tmp_path, ())
    assert (rows.keys, change) == (["a", "b", "c"], NO_CHANGE)


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"key": "a"}', '{"key": "a", "label": 9, "stamp": ""}', "\udcff"])
def test_a_damaged_listing_is_refused_by_its_name(tmp_path: Path, line: str) -> None:
    (tmp_path / ROWS).write_bytes(Rows.of(listing(**OLD)).lines() + line.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{tmp_path / ROWS}: damaged"):
        Rows.aligned(listing(**OLD), tmp_path, ("cat", "dog"))
