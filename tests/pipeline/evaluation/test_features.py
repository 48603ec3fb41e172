"""Features on the disk: the same whatever the order, the batches and the interruptions in which they came."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data.sources.base import Batch
from pipeline.evaluation import features as module
from pipeline.evaluation.features import FeatureSet, compute_features
from tests.helpers.networks import Means


@dataclasses.dataclass
class Pictures:
    """Images of one colour each; those in `broken` cannot be read, and reading `dead` ends the process that does."""

    colours: NDArray[np.uint8]
    labels: NDArray[np.int64]
    broken: Sequence[int] = ()
    dead: int = -1

    @property
    def keys(self) -> list[str]:
        return [f"{i}.png" for i in range(len(self.colours))]

    image_size = 4
    preprocessing = "none"

    def fingerprint(self) -> str:
        return str(self.colours.tolist())

    def load(self, indices: Sequence[int]) -> Batch:
        if self.dead in indices:
            raise ValueError("the power is gone")
        pixels = np.broadcast_to(self.colours[list(indices), None, None], (len(indices), 4, 4, 3)).copy()
        return Batch(np.asarray(indices), pixels, {i: "no image" for i in indices if i in self.broken})


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 16)
    monkeypatch.setattr(module, "_READ", 8)


def pictures(count: int = 50, **others: object) -> Pictures:
    random = np.random.default_rng(0)
    return Pictures(random.integers(0, 256, (count, 3), dtype=np.uint8), random.integers(0, 4, count), **others)  # type: ignore[arg-type]


def compute(images: Pictures, folder: Path, workers: int = 1) -> FeatureSet:
    return compute_features(images, Means(), folder, workers=workers, name="some images")  # type: ignore[arg-type]


def test_every_row_is_the_features_the_label_and_the_index_of_one_image(tmp_path: Path) -> None:
    images = pictures()
    rows = compute(images, tmp_path)
    assert sorted(rows.indices) == list(range(50))
    assert rows.labels.tolist() == images.labels[rows.indices].tolist()
    assert np.array_equal(rows.read(slice(0, 50)), images.colours[rows.indices].astype(np.float32))
    assert np.array_equal(rows.read(slice(7, 9)), rows.read(slice(0, 50))[7:9])
    assert rows.dimension == 3


def test_rows_do_not_depend_on_the_order_of_the_images_nor_on_processes(tmp_path: Path) -> None:
    images, order = pictures(), np.random.default_rng(1).permutation(50)
    other = Pictures(images.colours[order], images.labels[order])
    one, two = compute(images, tmp_path / "one"), compute(other, tmp_path / "two", workers=2)
    assert np.array_equal(one.read(slice(0, 50)), two.read(slice(0, 50)))
    assert np.array_equal(one.digests, two.digests)
    assert np.array_equal(one.labels, two.labels)
    assert (tmp_path / "one").exists()
    assert one.folder.name != two.folder.name  # of sets that are listed otherwise


def test_the_first_rows_are_a_fair_sample(tmp_path: Path) -> None:
    shades = np.repeat(np.arange(200, dtype=np.uint8)[:, None], 3, axis=1)  # listed from dark to bright
    rows = compute(Pictures(shades, np.zeros(200, np.int64)), tmp_path)
    assert 80 < rows.read(slice(0, 100)).mean() < 120


def test_what_was_computed_before_an_interruption_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the power is gone"):
        compute(pictures(dead=40), tmp_path)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 2  # whole parts of 16
    with pytest.raises(ValueError, match="the power is gone"):  # the first two are not read again
        compute(pictures(dead=49), tmp_path)
    assert all(file.stat().st_mtime_ns == then for file, then in kept.items())
    assert np.array_equal(
        compute(pictures(), tmp_path).read(slice(0, 50)), compute(pictures(), tmp_path / "x").read(slice(0, 50))
    )
    assert not list(tmp_path.glob("*.parts"))


def test_a_finished_set_is_not_computed_again(tmp_path: Path) -> None:
    rows = compute(pictures(), tmp_path)
    assert np.array_equal(compute(pictures(dead=0), tmp_path).read(slice(0, 50)), rows.read(slice(0, 50)))


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path: Path) -> None:
    rows = compute(pictures(broken=(3, 20)), tmp_path)
    assert rows.failures == {"3.png": "no image", "20.png": "no image"}
    assert sorted(rows.indices) == [i for i in range(50) if i not in (3, 20)]


def test_copies_are_counted_and_stand_in_the_order_of_the_images(tmp_path: Path) -> None:
    images = pictures()
    images.colours[[10, 30, 40]] = images.colours[5]
    rows = compute(images, tmp_path)
    assert rows.copies() == 3
    assert rows.indices[np.isin(rows.indices, (5, 10, 30, 40))].tolist() == [5, 10, 30, 40]


def test_features_that_are_not_finite_are_refused_with_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Means, "features", lambda self, images: images.float().mean(dim=(1, 2)) / 0)
    with pytest.raises(ValueError, match=r"0.png: its features by Means are NaN or infinite"):
        compute(pictures(), tmp_path)


def test_fewer_than_two_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="some images: only 1 of 2 images could be read: at least 2 needed"):
        compute(pictures(2, broken=(0,)), tmp_path)


@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "indices.npy", "digests.npy", "meta.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    file = compute(pictures(), tmp_path).folder / name
    payload = bytearray(file.read_bytes())
    payload[-5] ^= 1
    file.write_bytes(payload)
    with pytest.raises(ValueError, match=r"some-images-.*: damaged: delete it to compute the features again"):
        compute(pictures(), tmp_path)
