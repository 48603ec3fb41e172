from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.folder import SUFFIXES, ImageFolder, read_image
from numpy.typing import NDArray
from PIL import Image

from data import folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with two and three images; the same file name in both, and one image in a nested folder."""
    for number, key in enumerate(["dog/1.png", "dog/2.jpg", "cat/2.PNG", "cat/1.png", "cat/old/1.png"]):
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(path)
    return tmp_path / "images"


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def saved(image: Image.Image, path: Path, **options: object) -> NDArray[np.uint8]:
    """Pixels that are read from `image` once it is written to `path`, at its own size."""
    image.save(path, **options)
    return read_image(path, image.width)


def test_images_are_sorted_within_sorted_classes(root: Path) -> None:
    images = ImageFolder(root, image_size=8)
    assert images.keys == ["cat/1.png", "cat/2.PNG", "cat/old/1.png", "dog/1.png", "dog/2.jpg"]
    assert images.classes == ("cat", "dog")
    np.testing.assert_array_equal(images.labels, [0, 0, 0, 1, 1])
    assert images.labels.dtype == np.int64


def test_a_file_name_in_two_classes_is_two_images(root: Path) -> None:
    batch = ImageFolder(root, image_size=8).load([3, 0])
    np.testing.assert_array_equal(batch.indices, [3, 0])
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 120]
    assert not batch.failures


def test_what_is_hidden_or_no_image_is_passed_over(root: Path) -> None:
    before = ImageFolder(root, image_size=8)
    for name in ("cat/.1.png", "cat/notes.txt", "cat/png", "top.png", ".hidden/1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes((root / "cat/1.png").read_bytes())
    (root / "empty").mkdir()
    (root / "cat" / "folder.png").mkdir()
    after = ImageFolder(root, image_size=8)
    assert after.keys == before.keys
    assert after.classes == before.classes


def test_hidden_folders_within_a_class_are_passed_over(root: Path) -> None:
    before = ImageFolder(root, image_size=8).keys
    (root / "cat/.ipynb_checkpoints").mkdir()
    (root / "cat/.ipynb_checkpoints/1.png").write_bytes((root / "cat/1.png").read_bytes())
    assert ImageFolder(root, image_size=8).keys == before


def test_a_loop_of_linked_folders_is_not_followed(root: Path) -> None:
    before = ImageFolder(root, image_size=8).keys
    (root / "cat/old/loop").symlink_to(root / "cat", target_is_directory=True)
    (root / "dog/up").symlink_to("..", target_is_directory=True)
    assert ImageFolder(root, image_size=8).keys == before


def test_a_linked_image_is_an_image(root: Path) -> None:
    (root / "dog/3.png").symlink_to(root / "cat/1.png")
    images = ImageFolder(root, image_size=8)
    pixels = images.load([images.keys.index("dog/3.png"), images.keys.index("cat/1.png")]).pixels
    np.testing.assert_array_equal(pixels[0], pixels[1])


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "1.png").touch()  # not in the folder of a class
    with pytest.raises(ValueError, match=r"data\.source: no images under"):
        ImageFolder(tmp_path, image_size=8)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source: no such folder: .*nowhere"):
        ImageFolder(tmp_path / "nowhere", image_size=8)


def test_the_fingerprint_of_an_unchanged_folder_is_stable(root: Path) -> None:
    images = ImageFolder(root, image_size=8)
    first = images.fingerprint()
    images.load(range(5))
    assert images.fingerprint() == first
    assert ImageFolder(root, image_size=8).fingerprint() == first


CHANGES: dict[str, Callable[[Path], object]] = {
    "add": lambda root: Image.new("RGB", (8, 8)).save(root / "dog/9.png"),
    "remove": lambda root: (root / "dog/1.png").unlink(),
    "touch": lambda root: os.utime(root / "dog/1.png", ns=(0, 10**18)),
    "rename": lambda root: (root / "dog/1.png").rename(root / "dog/3.png"),
    "move to another class": lambda root: (root / "dog/1.png").rename(root / "cat/9.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_shows_a_change(root: Path, change: str) -> None:
    first = ImageFolder(root, image_size=8).fingerprint()
    CHANGES[change](root)
    assert ImageFolder(root, image_size=8).fingerprint() != first


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_listed_format_can_be_read(tmp_path: Path, suffix: str) -> None:
    pixels = saved(Image.new("RGB", (16, 16), (200, 100, 50)), tmp_path / f"1{suffix}")
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() < 8  # JPEG and WebP are lossy


def test_rgb_of_the_right_size_is_left_as_it_is(tmp_path: Path) -> None:
    pixels = noise(9, 9)
    result = saved(Image.fromarray(pixels), tmp_path / "1.png")
    np.testing.assert_array_equal(result, pixels)
    assert result.dtype == np.uint8


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = noise(9, 9, 1)
    np.testing.assert_array_equal(saved(Image.fromarray(grey[..., 0]), tmp_path / "1.png"), np.repeat(grey, 3, -1))


def test_black_and_white_become_0_and_255(tmp_path: Path) -> None:
    bits = np.eye(4, dtype=bool)
    result = saved(Image.fromarray(bits), tmp_path / "1.png")
    np.testing.assert_array_equal(result, np.repeat(bits[..., None], 3, 2) * 255)


def test_alpha_is_composited_over_white(tmp_path: Path) -> None:
    pixels = noise(16, 16, 4)
    pixels[0, :, 3], pixels[1, :, 3], pixels[2, :, 3] = 0, 255, 128
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    result = saved(Image.fromarray(pixels), tmp_path / "1.png")
    np.testing.assert_allclose(result, colour * alpha + 255 * (1 - alpha), atol=1)
    assert (result[0] == 255).all()
    np.testing.assert_array_equal(result[1], pixels[1, :, :3])


def test_grey_with_alpha_is_composited_over_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[0, 0], [0, 255]], [[0, 51], [100, 0]]], np.uint8))
    assert saved(image, tmp_path / "1.png")[..., 0].tolist() == [[255, 0], [204, 255]]


def test_transparent_colours_of_a_palette_become_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert saved(image, tmp_path / "1.png", transparency=1).tolist() == [
        [[10, 20, 30], [255, 255, 255]],
        [[70, 80, 90], [255, 255, 255]],
    ]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_spans_the_whole_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 32768], [65535, 257 * 77]], np.uint16)
    result = saved(Image.fromarray(values), tmp_path / f"1{suffix}")
    np.testing.assert_array_equal(result, np.repeat(np.array([[0, 128], [255, 77]])[..., None], 3, 2))


def test_float_grey_spans_0_to_1_and_saturates(tmp_path: Path) -> None:
    values = np.array([[0, 0.2], [1, 0.6], [-3, 7]], np.float32).T[:2, :2]
    assert saved(Image.fromarray(values), tmp_path / "1.tif")[..., 0].tolist() == [[0, 255], [51, 153]]
    assert saved(Image.fromarray(values * 10 - 5), tmp_path / "2.tif")[..., 0].tolist() == [[0, 255], [0, 255]]


def test_a_float_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        saved(Image.fromarray(np.array([[0, np.nan], [0, 0]], np.float32)), tmp_path / "1.tif")


def test_inks_are_subtracted_from_white(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0]], [[0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
    assert saved(Image.fromarray(inks, mode="CMYK"), tmp_path / "1.tif").tolist() == [
        [[255, 255, 255], [0, 255, 255]],
        [[255, 0, 0], [0, 0, 0]],
    ]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (2, lambda pixels: pixels[:, ::-1]),
        (3, lambda pixels: pixels[::-1, ::-1]),
        (6, lambda pixels: np.rot90(pixels, -1)),  # the camera was held with its right side down
        (8, lambda pixels: np.rot90(pixels)),
    ],
)
def test_exif_orientation_is_applied(
    tmp_path: Path, orientation: int, upright: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> None:
    pixels, exif = noise(6, 6), Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(saved(Image.fromarray(pixels), tmp_path / "1.png", exif=exif), upright(pixels))


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    first, *rest = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    result = saved(first, tmp_path / "1.gif", save_all=True, append_images=rest)
    assert (result == (255, 0, 0)).all()


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_of_an_oblong_image_is_taken(tmp_path: Path, wide: bool) -> None:
    pixels = noise(10, 30)
    pixels = pixels if wide else pixels.swapaxes(0, 1)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    centre = pixels[:, 10:20] if wide else pixels[10:20]
    np.testing.assert_array_equal(read_image(tmp_path / "1.png", 10), centre)


@pytest.mark.parametrize("size", [8, 32])
def test_the_shorter_side_is_resized(tmp_path: Path, size: int) -> None:
    """The middle third of a picture is one colour: it fills the square that is cut out, but for borders that blend."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    result = read_image(tmp_path / "1.png", size)
    assert result.shape == (size, size, 3)
    assert (result[:, size // 4 : -size // 4] == (200, 100, 50)).all()


def test_shrinking_averages(tmp_path: Path) -> None:
    """A chequerboard of single pixels would alias to black or white; its mean is grey."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "1.png")
    assert np.abs(read_image(tmp_path / "1.png", 8).astype(int) - 127.5).max() < 4


DAMAGE: dict[str, Callable[[Path], object]] = {
    "garbage": lambda path: path.write_bytes(b"this is no image" * 20),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-400]),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:33]),
    "zero bytes": lambda path: path.write_bytes(b""),
    "vanished": lambda path: path.unlink(),
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_read_is_a_failure_and_no_other_image_is_lost(
    tmp_path: Path, damage: str, suffix: str
) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("1.png", f"2{suffix}", "3.png"):
        Image.fromarray(noise(16, 16)).save(tmp_path / "cat" / name)
    images = ImageFolder(tmp_path, image_size=16)
    DAMAGE[damage](tmp_path / images.keys[1])
    batch = images.load([0, 1, 2])
    assert list(batch.failures) == [1]
    assert len(batch.failures[1]) > 10
    assert not batch.pixels[1].any()
    np.testing.assert_array_equal(batch.pixels[[0, 2]], [noise(16, 16)] * 2)


def test_odd_metadata_does_not_stop_the_batch(root: Path) -> None:
    """Orientation 6 beside a width that is text: Pillow's rotation rewrites the metadata and raises struct.error."""
    tags = struct.pack("<HHI4sHHI4s", 0x0100, 2, 4, b"abc\0", 0x0112, 3, 1, b"\6\0\0\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + b"\0\0\0\0"
    Image.new("RGB", (8, 8)).save(root / "dog/2.jpg", exif=exif)
    batch = ImageFolder(root, image_size=8).load([3, 4])
    assert 3 not in batch.failures


def test_a_picture_over_the_limit_is_refused_by_its_header(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MAX_PIXELS", 64)
    payload = io.BytesIO()
    Image.new("RGB", (13, 5)).save(payload, "PNG")
    (root / "cat/1.png").write_bytes(payload.getvalue()[:41])  # no pixels: to decode it would be another error
    batch = ImageFolder(root, image_size=8).load([0, 1])
    assert list(batch.failures) == [0]
    assert "13x5 pixels" in batch.failures[0]


def test_a_header_of_a_forged_size_is_a_failure(root: Path) -> None:
    header = struct.pack(">II", 100_000, 100_000)
    payload = (root / "cat/1.png").read_bytes()
    chunk = b"IHDR" + header + payload[24:29]
    (root / "cat/1.png").write_bytes(payload[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + payload[33:])
    assert list(ImageFolder(root, image_size=8).load([0, 1]).failures) == [0]


def test_a_link_to_nowhere_is_a_failure_and_does_not_stop_the_fingerprint(root: Path) -> None:
    (root / "cat/0.png").symlink_to("gone.png")
    images = ImageFolder(root, image_size=8)
    assert list(images.load([0, 1]).failures) == [0]
    before = images.fingerprint()
    assert ImageFolder(root, image_size=8).fingerprint() == before
    (root / "cat/gone.png").write_bytes((root / "cat/1.png").read_bytes())
    assert images.fingerprint() != before
