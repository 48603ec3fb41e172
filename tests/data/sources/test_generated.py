"""Generated images of anybody: they are read as they are, from wherever they lie, or refused in one line."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data.sources.base import NO_CLASS, Source
from data.sources.files import ImageFiles
from data.sources.generated import open_generated, write_npz
from tests.helpers.pictures import everything, in_forks, write_folder, write_zip
from tests.helpers.world import CLASSES, IMAGE_SIZE, World

SIZE, NAMES = 8, ("cat", "dog", "fox")
PIXELS = np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2, 0])
ROW = PIXELS[0].nbytes
NONE = [NO_CLASS] * len(PIXELS)


def opened(path: Path, classes: tuple[str, ...] = NAMES) -> Source:
    return open_generated(str(path), image_size=SIZE, classes=classes)


def png(image: NDArray[Any], suffix: str = "png") -> bytes:
    payload = io.BytesIO()
    Image.fromarray(image).save(payload, suffix)
    return payload.getvalue()


def in_classes() -> dict[str, bytes]:
    return {f"{NAMES[k]}/{i}.png": png(image) for i, (k, image) in enumerate(zip(LABELS, PIXELS, strict=True))}


def in_one_folder() -> dict[str, bytes]:
    return {f"{i:06d}.png": png(image) for i, image in enumerate(PIXELS)}


def saved(path: Path, *arrays: Any, **named: Any) -> Path:
    np.savez(path, *arrays, **named)
    return path


def compressed(path: Path) -> Path:
    np.savez_compressed(path, PIXELS, LABELS)
    return path


def written(path: Path, labels: NDArray[np.int64] = LABELS) -> Path:
    write_npz(path, np.split(PIXELS, [3, 4]), labels, SIZE)
    return path


# The same images, wherever they are

PLACES: dict[str, Callable[[Path], Path]] = {
    "npz": lambda root: saved(root / "a.npz", PIXELS, LABELS),
    "compressed npz": lambda root: compressed(root / "a.npz"),
    "npz of ours": lambda root: written(root / "a.npz"),
    "class folders": lambda root: write_folder(root / "a", in_classes()),
    "zip of class folders": lambda root: write_zip(root / "a.zip", in_classes()),
    "npz without classes": lambda root: saved(root / "a.npz", PIXELS),
    "flat folder": lambda root: write_folder(root / "a", in_one_folder()),
    "zip": lambda root: write_zip(root / "a.zip", in_one_folder()),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_same_images_have_the_same_pixels_and_classes_wherever_they_are(place: str, tmp_path: Path) -> None:
    images = opened(PLACES[place](tmp_path))
    order = np.argsort(np.argsort(LABELS, kind="stable")) if "class folders" in place else np.arange(7)
    np.testing.assert_array_equal(everything(images).pixels[order], PIXELS)
    known = "without" not in place and place not in ("flat folder", "zip")
    assert images.labels[order].tolist() == (LABELS.tolist() if known else NONE)
    assert images.labels.dtype == np.int64
    assert images.classes == NAMES
    assert len(images.keys) == len(images.stamps) == 7


@pytest.mark.parametrize("place", PLACES)
def test_forks_and_copies_read_the_same_at_the_same_time(place: str, tmp_path: Path) -> None:
    images, order = opened(PLACES[place](tmp_path)), [4, 1, 0, 3, 2] * 20
    before = images.load(order).pixels
    images.load([2, 3])  # in the midst of the file
    for batch in in_forks(images, order, 3):
        np.testing.assert_array_equal(batch.pixels, before)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images)).load([4, 5]).pixels, images.load([4, 5]).pixels)


@pytest.mark.parametrize("make", [saved, lambda path, *arrays: compressed(path)], ids=["stored", "compressed"])
def test_any_images_are_read_in_any_order(make: Callable[..., Path], tmp_path: Path) -> None:
    images = opened(make(tmp_path / "a.npz", PIXELS, LABELS))
    for indices in ([3], [3, 4, 5], [6, 0], [], [0, 1, 2], [5, 5, 1, 2, 1], range(7), [6], [0]):
        batch = images.load(indices)
        assert batch.indices.tolist() == list(indices)
        np.testing.assert_array_equal(batch.pixels, PIXELS[list(indices)])


def test_ranges_in_turn_read_every_byte_once_and_hold_no_more_than_a_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = opened(saved(tmp_path / "a.npz", np.repeat(PIXELS, 100, 0)))
    asked, real = [], zipfile.ZipExtFile.read

    def read(file: zipfile.ZipExtFile, count: int | None = -1) -> bytes:
        asked.append(count)
        return real(file, count)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", read)
    for start in range(0, 700, 50):
        images.load(range(start, start + 50))
    assert asked[2:] == [50 * ROW] * 13  # the first range opens the file, and passes its header over
    assert sum(filter(None, asked[:2])) == asked[0] + 50 * ROW < 52 * ROW


def test_what_is_open_is_not_shared_with_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that move the place in one open file would read each other's images, now and then."""
    images = opened(saved(tmp_path / "a.npz", np.repeat(PIXELS, 100, 0)))
    images.load([200])
    opens, real = [], zipfile.ZipFile

    def open_zip(*args: Any) -> zipfile.ZipFile:
        opens.append(args)
        return real(*args)

    monkeypatch.setattr(zipfile, "ZipFile", open_zip)
    images.load([300])
    assert not opens
    monkeypatch.setattr(os, "getpid", lambda: -1)
    np.testing.assert_array_equal(images.load([400, 500]).pixels, PIXELS[[4, 5]])
    assert len(opens) == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_other_kinds_of_pixels_become_rgb_as_those_of_a_data_set_do(mode: str, tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    image = grey if mode == "I;16" else Image.fromarray(PIXELS[0]).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(PIXELS[1, ..., 0]))
    for name in ("a.tif", "b.tif"):
        image.save(tmp_path / name)
    expected = ImageFiles(str(tmp_path), image_size=SIZE).load([0]).pixels
    np.testing.assert_array_equal(opened(tmp_path).load([0]).pixels, expected)


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    first = opened(saved(tmp_path / "a.npz", PIXELS))
    shutil.copy(tmp_path / "a.npz", tmp_path / "b.npz")
    assert opened(tmp_path / "b.npz").fingerprint() == first.fingerprint()
    assert opened(saved(tmp_path / "b.npz", PIXELS[::-1])).fingerprint() != first.fingerprint()


# Which class an image has


def test_samples_of_a_run_have_the_classes_that_were_drawn(world: World, tmp_path: Path) -> None:
    said = json.loads((world.samples / "samples.json").read_text())["images"]
    for folder in (world.samples, world.samples / "images"):
        images = open_generated(str(folder), image_size=IMAGE_SIZE, classes=CLASSES[::-1])  # by name, not by number
        assert [images.classes[k] for k in images.labels] == [image["class"] for image in said]
        assert len({images.classes[k] for k in images.labels}) == 2
        assert not images.load(range(len(said))).failures
    shutil.copytree(world.samples / "images", tmp_path / "images")
    assert set(open_generated(str(tmp_path / "images"), image_size=IMAGE_SIZE, classes=CLASSES).labels) == {NO_CLASS}


@pytest.mark.parametrize("content", ["", "[]", '{"images": [{"index": 0, "class": "cat"}]}', '{"images": [1]}'])
def test_a_record_of_other_samples_is_refused(content: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "images", in_one_folder())
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(ValueError, match=r"^--images: .*samples\.json is not the record of the images in .*images "):
        opened(tmp_path / "images")


def test_numbers_of_classes_are_taken_for_names_first_and_said(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{name}/1.png": png(PIXELS[0]) for name in ("0", "2", "dog")})
    images = opened(tmp_path, ("cat", "0", "dog"))
    assert images.labels.tolist() == [1, 2, 2]
    assert [note for note in images.notes if "index" in note] == ["class 2 is read as an index into the classes: dog"]


def test_numbers_may_have_the_zeros_that_the_last_class_does_not_need(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{name}/1.png": png(PIXELS[0]) for name in ("00", "07", "11")})
    names = tuple(f"class {k}" for k in range(12))
    assert opened(tmp_path, names).labels.tolist() == [0, 7, 11]


def test_folders_of_a_thousand_seeds_are_no_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{seed // 1000 * 1000:06d}/{seed:06d}.png": png(PIXELS[0]) for seed in (0, 1, 1000)})
    images = opened(tmp_path)
    assert images.labels.tolist() == [NO_CLASS] * 3
    assert (
        "folders such as 000000 are read as a thousand seeds each, as EDM writes them, not as classes" in images.notes
    )


@pytest.mark.parametrize("place", ["npz", "class folders"])
def test_classes_are_passed_over_where_the_data_set_has_none(place: str, tmp_path: Path) -> None:
    images = opened(PLACES[place](tmp_path), ("images",))
    assert images.labels.tolist() == NONE
    assert "the classes of the images are ignored: the data set has none" in images.notes


def test_other_arrays_are_passed_over_and_said(tmp_path: Path) -> None:
    images = opened(saved(tmp_path / "a.npz", PIXELS, mu=np.zeros(3), sigma=np.zeros((3, 3))))
    assert images.notes == ["skipped: mu, sigma"]


# What is refused


def written_as(change: Callable[[NDArray[np.uint8]], Any], *labels: Any) -> Callable[[Path], Path]:
    return lambda root: saved(root / "a.npz", change(PIXELS), *labels)


def image_of(width: int, height: int) -> Callable[[Path], Path]:
    """Images of the right size, but for the last, which is met when it is read."""

    def make(root: Path) -> Path:
        return write_folder(root, in_one_folder() | {"last.png": png(np.zeros((height, width, 3), np.uint8))})

    return make


def cut(root: Path, share: float) -> Path:
    path = saved(root / "a.npz", PIXELS)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def flipped(root: Path, times: int = 1) -> Path:
    path = saved(root / "a.npz", np.repeat(PIXELS, times, 0))
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)
    return path


def pickled(root: Path) -> Path:
    return saved(root / "a.npz", np.array([PIXELS[0], PIXELS[1, :4]], object))


def too_few_bytes(root: Path) -> Path:
    payload = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        payload, {"descr": "|u1", "fortran_order": False, "shape": (10**12, SIZE, SIZE, 3)}
    )
    return write_zip(root / "a.npz", {"arr_0.npy": payload.getvalue() + PIXELS.tobytes()})


KEPT = r"not uint8 N 8 8 3: "
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda root: root / "a.npz", r"no such file on this machine: \S+/a\.npz"),
    "no folder": (lambda root: root / "a", r"no such folder or file: \S+/a"),
    "an empty folder": (lambda root: root, r"no images under"),
    "one image": (written_as(lambda x: x[:1]), r"a\.npz: 1 image: at least two images are needed"),
    "no images": (written_as(lambda x: x[:0]), r"a\.npz: 0 images: at least two images are needed"),
    "one file": (
        lambda root: write_folder(root, {"1.png": png(PIXELS[0])}),
        r"1 image: at least two images are needed",
    ),
    "of another size": (
        written_as(lambda x: np.repeat(np.repeat(x, 2, 1), 2, 2)),
        r"a\.npz: 16x16 pixels, but data\.image_size is 8: .*never resized, .*measure them with data\.image_size=16",
    ),
    "not square": (
        written_as(lambda x: x[:, :4]),
        r"a\.npz: 8x4 pixels, but data\.image_size is 8: .*make them square",
    ),
    "a file of another size": (
        image_of(16, 16),
        r"last\.png: 16x16 pixels, but data\.image_size is 8: .*never resized",
    ),
    "a file that is not square": (image_of(8, 4), r"last\.png: 8x4 pixels, .*make them square"),
    "a damaged file": (
        lambda root: write_folder(root, in_one_folder() | {"last.png": png(PIXELS[0])[:60]}),
        r"last\.png: OSError: ",
    ),
    "floats": (written_as(lambda x: x / 255), r"a\.npz: arr_0 is float64 7 8 8 3, " + KEPT + "scale it to 0..255"),
    "NaN": (written_as(lambda x: x * np.float32(np.nan)), r"arr_0 is float32 7 8 8 3, " + KEPT + "scale it to 0..255"),
    "wide integers": (written_as(lambda x: x.astype(np.int64)), r"arr_0 is int64 7 8 8 3, " + KEPT),
    "channels first": (
        written_as(lambda x: x.transpose(0, 3, 1, 2)),
        r"arr_0 is uint8 7 3 8 8, " + KEPT + "channels must",
    ),
    "grey": (written_as(lambda x: x[..., 0]), r"arr_0 is uint8 7 8 8, " + KEPT + "repeat the channel of grey"),
    "one channel": (
        written_as(lambda x: x[..., :1]),
        r"arr_0 is uint8 7 8 8 1, " + KEPT + "repeat the channel of grey",
    ),
    "alpha": (written_as(lambda x: x.repeat(2, 3)[..., :4]), r"arr_0 is uint8 7 8 8 4, " + KEPT + "write RGB images"),
    "flat": (written_as(lambda x: x.reshape(7, -1)), r"arr_0 is uint8 7 192, " + KEPT + "write RGB images"),
    "Fortran's order": (written_as(np.asfortranarray), r"arr_0 is in Fortran order: save numpy\.ascontiguousarray"),
    "objects": (pickled, r"arr_0 holds Python objects, which are never loaded"),
    "other arrays": (
        lambda root: saved(root / "a.npz", images=PIXELS, y=LABELS),
        r"a\.npz: it has no arr_0, but images, y: images must be arr_0, uint8 N 8 8 3, as numpy\.savez",
    ),
    "many arrays": (
        lambda root: saved(root / "a.npz", **{f"x{i}": PIXELS for i in range(7)}),
        r"x4 and 2 more: images",
    ),
    "no arrays": (
        lambda root: write_zip(root / "a.npz", {}),
        r"it has no arr_0, but nothing: images must be arr_0",
    ),
    "text": (
        lambda root: write_folder(root, {"a.npz": b"text"}) / "a.npz",
        r"cannot be read \(File is not a zip file\)",
    ),
    "cut off": (
        lambda root: cut(root, 0.5),
        r"a\.npz: it cannot be read \(.*\): if it is damaged or truncated, copy it",
    ),
    "cut off at its end": (lambda root: cut(root, 0.99), r"a\.npz: it cannot be read"),
    "a bit flipped": (flipped, r"a\.npz: it cannot be read \(Bad CRC-32 for file 'arr_0\.npy'\)"),
    "fewer bytes than it says": (
        too_few_bytes,
        r"the header of arr_0 says uint8 1000000000000 8 8 3, but it has 1,344 bytes",
    ),
    "too few labels": (written_as(lambda x: x, LABELS[:5]), r"arr_1 is int64 5, not 7 integers, one class per image"),
    "labels in a column": (written_as(lambda x: x, LABELS[:, None]), r"arr_1 is int64 7 1, not 7 integers"),
    "labels of floats": (written_as(lambda x: x, LABELS * 1.0), r"arr_1 is float64 7, not 7 integers"),
    "labels of text": (written_as(lambda x: x, np.array(["cat"] * 7)), r"arr_1 is <U3 7, not 7 integers"),
    "labels of objects": (written_as(lambda x: x, np.array(["cat"] * 7, object)), r"arr_1 holds Python objects"),
    "labels from 1 on": (
        written_as(lambda x: x, LABELS + 1),
        r"image 0 has class 3 in arr_1, but the 3 classes are numbered from 0 \(the first class is 0, not 1\): leave",
    ),
    "a label below 0": (written_as(lambda x: x, LABELS - 1), r"image 1 has class -1 in arr_1"),
    "a huge label": (
        written_as(lambda x: x, LABELS.astype(np.uint64) + np.uint64(2**63)),
        r"image 0 has class 9223372036854775810 ",
    ),
    "an unknown class": (
        lambda root: write_folder(root, in_classes() | {"lion/1.png": png(PIXELS[0])}),
        r"lion/1\.png has class lion, which is not one of the 3 classes, cat, dog, fox: rename the class, or put all",
    ),
    "a number of no class": (
        lambda root: write_folder(root, {"0/1.png": png(PIXELS[0]), "3/1.png": png(PIXELS[0])}),
        r"3/1\.png has class 3, which is not one of the 3 classes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, reason = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=f"^--images: .*{reason}") as told:
        everything(opened(path))
    assert "\n" not in str(told.value)
    assert str(path) in str(told.value)


def test_the_first_image_is_met_before_any_other_work(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{i}.png": png(np.zeros((16, 16, 3), np.uint8)) for i in range(2)})
    with pytest.raises(ValueError, match=r"0\.png: 16x16 pixels, but data\.image_size is 8"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "ranges", [[(0, 700)], [(0, 200), (200, 700)], [(600, 700)], [(300, 400), (0, 200), (650, 700)]]
)
def test_whoever_reads_the_last_image_knows_of_a_bit_that_flipped_in_any(
    ranges: list[tuple[int, int]], tmp_path: Path
) -> None:
    images = opened(flipped(tmp_path, 100))
    for start, stop in ranges[:-1]:
        images.load(range(start, stop))
    with pytest.raises(ValueError, match="Bad CRC-32"):
        images.load(range(*ranges[-1]))


# The .npz that is written


def test_an_npz_of_ours_is_read_by_numpy_and_as_adms_evaluator_streams_it(tmp_path: Path) -> None:
    path = written(tmp_path / "folder" / "a.npz")
    with np.load(path, allow_pickle=False) as arrays:
        assert list(arrays) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], PIXELS)
        np.testing.assert_array_equal(arrays["arr_1"], LABELS)
        assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((7, SIZE, SIZE, 3), False, np.dtype(np.uint8))
        assert file.read() == PIXELS.tobytes()
    assert written(tmp_path / "b.npz").read_bytes() == path.read_bytes()


def test_an_npz_has_no_classes_where_an_image_has_none(tmp_path: Path) -> None:
    path = written(tmp_path / "a.npz", np.where(LABELS == 2, NO_CLASS, LABELS))
    with np.load(path, allow_pickle=False) as arrays:
        assert list(arrays) == ["arr_0"]


def test_batches_are_written_one_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[NDArray[np.uint8]]] = []

    def batches() -> Iterator[NDArray[np.uint8]]:
        for image in PIXELS:
            batch = image[None].copy()
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert all(each() is None for each in alive[:-1])

    write_npz(tmp_path / "a.npz", batches(), LABELS, SIZE)
    assert len(alive) == 7
    np.testing.assert_array_equal(everything(opened(tmp_path / "a.npz")).pixels, PIXELS)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError, OSError(errno.EIO, "broken", "/another/file")])
def test_a_write_that_stops_leaves_what_was_there(old: bool, fault: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    before = written(path).read_bytes() if old else None

    def batches() -> Iterator[NDArray[np.uint8]]:
        yield PIXELS[:3]
        raise fault

    with pytest.raises(fault if isinstance(fault, type) else OSError) as told:
        write_npz(path, batches(), LABELS, SIZE)
    assert getattr(told.value, "filename", None) in (None, "/another/file")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if old else [])


def test_a_full_disk_is_told_with_the_name_of_the_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device \(while writing; .*a\.npz"):
        written(tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []
