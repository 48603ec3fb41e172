"""The listing of a data set that changes, or is damaged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.cache.listing import Change, Rows
from data.cache.manifest import Draft, Plan
from data.cache.reader import ROWS


def listing(**images: tuple[str, str]) -> Any:
    """A source that lists images in the order given, each with its class and its stamp."""
    classes = tuple(sorted({name for name, _ in images.values()}))
    labels = np.array([classes.index(name) for name, _ in images.values()], np.int64)
    return SimpleNamespace(
        keys=list(images), labels=labels, classes=classes, stamps=[stamp for _, stamp in images.values()]
    )


OLD = {"a": ("cat", "1"), "b": ("dog", "2"), "c": ("cat", "3")}
NO_CHANGE = Change([], [], [], [])


@pytest.fixture
def draft(tmp_path: Path, plan: Plan) -> Draft:
    """Of an unfinished cache at `tmp_path` that lists `OLD`."""
    rows = Rows.of(listing(**OLD))
    (tmp_path / ROWS).write_bytes(rows.lines())
    return Draft(**{**dict(plan), "rows": 3, "files": (rows.file,)})


pytestmark = pytest.mark.parametrize("format", ["zarr"], indirect=True)  # which a listing knows nothing of


@pytest.mark.parametrize(
    ("now", "keys", "change"),
    [
        (OLD, "abc", NO_CHANGE),
        (dict(reversed(OLD.items())), "abc", NO_CHANGE),
        ({"Z": ("dog", "9"), **OLD, "0": ("ant", "8")}, "abcZ0", Change(["Z", "0"], [], [], [])),
        ({"a": OLD["a"], "c": OLD["c"]}, "ac", Change([], ["b"], [], [])),
        (OLD | {"b": ("dog", "9")}, "abc", Change([], [], ["b"], [])),
        (OLD | {"b": ("cat", "2")}, "abc", Change([], [], ["b"], [])),
        ({"d": ("cow", "2"), "c": ("cat", "9"), "a": OLD["a"]}, "acd", Change(["d"], ["b"], ["c"], [])),
        (OLD | {"b": ("dog", "2-later")}, "abc", Change([], [], [], ["b"])),
    ],
    ids=["nothing", "the order", "added", "gone", "another stamp", "another class", "all at once", "another time"],
)
def test_a_listing_is_told_from_that_of_the_cache_and_keeps_its_order(
    tmp_path: Path, draft: Draft, now: dict[str, tuple[str, str]], keys: str, change: Change
) -> None:
    source = listing(**now)
    rows, found = Rows.aligned(source, tmp_path, draft)
    assert found == change
    assert "".join(rows.keys) == keys
    assert rows.classes[:2] == ("cat", "dog")  # whatever sorts before them
    assert {key: (rows.classes[label], stamp) for key, stamp, label in rows._entries()} == now
    assert [source.keys[index] for index in rows.order] == list(rows.keys)


@pytest.mark.parametrize("damage", [*range(0, 129, 8), -1, "missing", "empty", "truncated", "longer"])
def test_a_damaged_listing_is_never_read(tmp_path: Path, draft: Draft, damage: int | str) -> None:
    """Whatever the bit: a key, a label, a stamp or the order of rows. The very list of the data set stands for it."""
    file = tmp_path / ROWS
    lines = bytearray(file.read_bytes())
    if isinstance(damage, int):
        lines[damage] ^= 1
    changed = {"empty": b"", "truncated": lines[:-1], "longer": lines + b"\n"}.get(str(damage), lines)
    file.unlink()
    if damage != "missing":
        file.write_bytes(changed)
    problem = "missing" if damage == "missing" else "damaged"
    for now in (dict(reversed(OLD.items())), OLD | {"d": ("dog", "4")}):
        with pytest.raises(ValueError, match=f"^{file}: {problem}.*: delete {tmp_path} and create it again$"):
            Rows.aligned(listing(**now), tmp_path, draft)
    rows, change = Rows.aligned(listing(**OLD), tmp_path, draft)
    assert (rows.file, change) == (draft.files[0], NO_CHANGE)
