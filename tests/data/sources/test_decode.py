from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data.sources import decode
from data.sources.decode import (
    DECODER_ERRORS,
    FORMATS,
    SIGNATURE_BYTES,
    SUFFIXES,
    decode_image,
    has_image_signature,
    is_image,
)

Pixels = NDArray[np.uint8]


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image: Image.Image | NDArray, name: str = "PNG", **options: object) -> bytes:
    """The file that Pillow writes in the format `name`."""
    payload = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(payload, name, **options)
    return payload.getvalue()


def reread(image: Image.Image | NDArray, name: str = "PNG", matte: str = "white", **options: object) -> Pixels:
    """Pixels that are read from `image` once it is written, at its own size."""
    payload = encoded(image, name, **options)
    return decode_image(payload, image.height if isinstance(image, Image.Image) else len(image), matte)


def triple(grey: object) -> Pixels:
    """Three equal channels."""
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, -1)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file up to where its pixels would begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + struct.pack(">I", 99) + b"IDAT"


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_listed_format_can_be_read(suffix: str) -> None:
    name = Image.registered_extensions()[suffix]
    pixels = reread(Image.new("RGB", (16, 16), (200, 100, 50)), name)
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() < 8  # JPEG and WebP are lossy, GIF has a palette
    assert name in FORMATS


@pytest.mark.parametrize(
    ("name", "image"), [("a.png", True), ("b/a.b.JPG", True), ("a.npy", False), ("png", False), (".png", False)]
)
def test_the_suffix_tells_an_image(name: str, image: bool) -> None:
    assert is_image(name) == image


def test_no_format_is_read_but_those_that_are_listed() -> None:
    """Pillow would hand PostScript to another program, whatever the file's name is."""
    with pytest.raises(ValueError, match="not a supported image format"):
        reread(noise(9, 9), "EPS")


@pytest.mark.parametrize(("name", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_rgb_of_the_right_size_is_left_as_it_is(name: str, options: dict[str, object]) -> None:
    result = reread(noise(9, 9), name, **options)
    np.testing.assert_array_equal(result, noise(9, 9))
    assert result.dtype == np.uint8


def test_grey_becomes_three_equal_channels() -> None:
    grey = noise(9, 9)[..., 0]
    np.testing.assert_array_equal(reread(grey), triple(grey))


def test_black_and_white_become_0_and_255() -> None:
    bits = np.eye(4, dtype=bool)
    np.testing.assert_array_equal(reread(bits), triple(bits) * 255)


def test_a_palette_becomes_its_colours() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert reread(image).tolist() == [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]


@pytest.mark.parametrize(
    ("name", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")], ids=["png", "tiff", "big-endian tiff"]
)
def test_16_bit_grey_spans_the_whole_range(name: str, dtype: str) -> None:
    values = np.array([[0, 32768], [65535, 257 * 77]], dtype)
    np.testing.assert_array_equal(reread(values, name), triple([[0, 128], [255, 77]]))


def test_a_portable_greymap_is_scaled_by_the_top_that_it_names() -> None:
    payload = b"P5 2 2 1023\n" + np.array([0, 1023, 512, 256], ">u2").tobytes()
    np.testing.assert_array_equal(decode_image(payload, 2), triple([[0, 255], [128, 64]]))


def test_32_bit_integers_saturate_at_16_bit() -> None:
    values = np.array([[-5, 70_000], [32_768, 65_535]], np.int32)
    np.testing.assert_array_equal(reread(values, "TIFF"), triple([[0, 255], [128, 255]]))


def test_float_grey_spans_0_to_1_and_saturates() -> None:
    values = np.array([[0, 0.2, 1], [0.6, -3, 7], [0.5, 1e-9, 1e30]], np.float32)
    np.testing.assert_array_equal(reread(values, "TIFF"), triple([[0, 51, 255], [153, 0, 255], [128, 0, 255]]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_float_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        reread(np.array([[0, value], [0, 0]], np.float32), "TIFF")


def test_inks_are_subtracted_from_white() -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0]], [[0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
    image = Image.frombytes("CMYK", (2, 2), inks.tobytes())
    assert reread(image, "TIFF").tolist() == [[[255, 255, 255], [0, 255, 255]], [[255, 0, 0], [0, 0, 0]]]


def test_jpegs_of_inks_which_store_them_inverted_have_the_same_colours() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(reread(image, "JPEG", quality=100).astype(int) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize(
    ("matte", "below"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#102030", (16, 32, 48))]
)
@pytest.mark.parametrize(("name", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_alpha_is_composited_over_the_matte(
    name: str, options: dict[str, object], matte: str, below: tuple[int, int, int]
) -> None:
    pixels = noise(16, 16, 4)
    pixels[0, :, 3], pixels[1, :, 3], pixels[2, :, 3] = 0, 255, 128
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    result = reread(pixels, name, matte, **options)
    np.testing.assert_allclose(result, colour * alpha + np.array(below) * (1 - alpha), atol=1)
    assert (result[0] == below).all()
    np.testing.assert_array_equal(result[1], pixels[1, :, :3])


def test_grey_with_alpha_is_composited_over_the_matte() -> None:
    image = Image.fromarray(np.array([[[0, 0], [0, 255]], [[0, 51], [100, 0]]], np.uint8))
    assert reread(image)[..., 0].tolist() == [[255, 0], [204, 255]]
    assert reread(image, matte="red").tolist() == [[[255, 0, 0], [0, 0, 0]], [[204, 0, 0], [255, 0, 0]]]


@pytest.mark.parametrize("name", ["PNG", "GIF"])
def test_transparent_colours_of_a_palette_become_the_matte(name: str) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert reread(image, name, "blue", transparency=1).tolist() == [
        [[10, 20, 30], [0, 0, 255]],
        [[70, 80, 90], [0, 0, 255]],
    ]


def test_one_transparent_colour_of_grey_and_of_rgb_becomes_the_matte() -> None:
    grey = np.array([[7, 8], [8, 7]], np.uint8)
    np.testing.assert_array_equal(reread(grey, matte="black", transparency=8), triple([[7, 0], [0, 7]]))
    np.testing.assert_array_equal(reread(triple(grey), transparency=(8, 8, 8)), triple([[7, 255], [255, 7]]))


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),  # the camera was held with its right side down
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
    9: lambda pixels: pixels,  # of no meaning
}


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "WEBP" else {}
    turned = reread(noise(8, 8), name, exif=exif, **options)
    np.testing.assert_array_equal(turned, UPRIGHT[orientation](reread(noise(8, 8), name, **options)))


def test_an_oblong_image_is_turned_before_its_centre_is_taken() -> None:
    pixels, exif = noise(4, 8), Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encoded(pixels, exif=exif), 4)
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1)[2:6])


def test_odd_metadata_does_not_stop_an_image() -> None:
    """Orientation 6 beside a width that is text: Pillow's rotation rewrites the metadata and raises struct.error."""
    tags = struct.pack("<HHI4sHHI4s", 0x0100, 2, 4, b"abc\0", 0x0112, 3, 1, b"\6\0\0\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + b"\0\0\0\0"
    board = np.kron([[0, 255], [128, 64]], np.ones((8, 8))).astype(np.uint8)
    assert np.abs(reread(board, "JPEG", exif=exif).astype(int) - triple(np.rot90(board, -1))).max() < 8


@pytest.mark.parametrize(
    ("name", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {})]
)
def test_the_first_frame_of_several_is_read(name: str, options: dict[str, object]) -> None:
    first, *rest = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    result = reread(first, name, save_all=True, append_images=rest, **options)
    assert np.abs(result.astype(int) - (255, 0, 0)).max() < 2


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_of_an_oblong_image_is_taken(wide: bool) -> None:
    pixels = noise(10, 30) if wide else noise(30, 10)
    centre = pixels[:, 10:20] if wide else pixels[10:20]
    np.testing.assert_array_equal(decode_image(encoded(pixels), 10), centre)


@pytest.mark.parametrize("size", [8, 32])
def test_the_shorter_side_is_resized(size: int) -> None:
    """The middle third of a picture is one colour: it fills the square that is cut out, but for borders that blend."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (200, 100, 50)
    result = decode_image(encoded(pixels), size)
    assert result.shape == (size, size, 3)
    assert (result[:, size // 4 : -size // 4] == (200, 100, 50)).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_a_picture_of_any_shape_becomes_a_square(height: int, width: int) -> None:
    assert (decode_image(encoded(np.full((height, width), 77, np.uint8)), 8) == 77).all()


def test_shrinking_averages() -> None:
    """A chequerboard of single pixels would alias to black or white; its mean is grey."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(decode_image(encoded(board), 8).astype(int) - 127.5).max() < 4


def test_the_golden_pixels_of_a_resized_picture() -> None:
    """Of a ramp: halved with anti-aliasing, doubled with overshoot that is clipped. A new resampling must not pass."""
    ramp = np.tile(np.array([0, 0, 60, 120, 180, 240, 255, 255], np.uint8), (8, 1))
    assert decode_image(encoded(ramp), 4)[0, :, 0].tolist() == [1, 86, 211, 255]
    doubled = [0, 0, 0, 11, 44, 75, 105, 135, 165, 196, 228, 247, 253, 255, 255, 255]
    assert decode_image(encoded(ramp), 16)[0, :, 0].tolist() == doubled


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [b"iCCP", b"tEXt", b"zTXt", b"iTXt"])
def test_large_texts_and_profiles_in_a_png_do_not_stop_it(kind: bytes, place: str) -> None:
    text = bytes(3_000_000) if kind != b"tEXt" else b"x" * 70_000_000  # over Pillow's limits
    head = {b"iCCP": b"icc\0\0", b"tEXt": b"Comment\0", b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0"}[kind]
    contents = head + (text if kind == b"tEXt" else zlib.compress(text))
    chunk = struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))
    payload = encoded(noise(8, 8))
    cut = 33 if place == "before" else len(payload) - 12  # behind the header, or before the end
    with pytest.raises(ValueError, match=r"MAX_TEXT|too large|Too much memory"):
        Image.open(io.BytesIO(payload[:cut] + chunk + payload[cut:])).load()
    np.testing.assert_array_equal(decode_image(payload[:cut] + chunk + payload[cut:], 8), noise(8, 8))


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"PPM"}))
def test_the_first_bytes_tell_an_image(name: str) -> None:
    assert has_image_signature(encoded(noise(8, 8), name)[:SIGNATURE_BYTES])


@pytest.mark.parametrize("head", [b"", b"BMW is a maker", b"P6 is a text", b"#!/bin/sh", b"PK\3\4", b"\0" * 16])
def test_other_first_bytes_are_those_of_no_image(head: bytes) -> None:
    assert not has_image_signature(head)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda payload: b"this is no image" * 20,
    "zero bytes": lambda payload: b"",
    "one byte": lambda payload: payload[:1],
    "header only": lambda payload: payload[:33],
    "truncated": lambda payload: payload[:-400],
    "zeros": lambda payload: bytes(len(payload)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_raises_one_of_the_listed_errors_with_the_same_text_each_time(damage: str, name: str) -> None:
    payload = DAMAGE[damage](encoded(noise(24, 24), name))
    with pytest.raises(DECODER_ERRORS) as first:
        decode_image(payload, 24)
    with pytest.raises(DECODER_ERRORS) as second:
        decode_image(payload, 24)
    assert str(first.value) == str(second.value)
    assert len(str(first.value)) > 10
    assert " 0x" not in str(first.value)  # an address in memory


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"BMP", "PPM"}))
@pytest.mark.filterwarnings("ignore")  # Pillow's, of odd TIFF tags and large sizes
def test_a_flipped_byte_raises_nothing_but_the_listed_errors(name: str) -> None:
    payload = bytearray(encoded(noise(8, 8), name))
    for place in range(min(len(payload), 400)):
        payload[place] ^= 0xFF
        with contextlib.suppress(*DECODER_ERRORS):
            decode_image(bytes(payload), 8)
        payload[place] ^= 0xFF


def test_the_limit_of_pixels_is_told_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 64)
    with pytest.raises(ValueError, match="13x5 pixels, over the limit of 64"):
        decode_image(png_of_size(13, 5), 8)  # no pixels: to decode it would be another error
    assert decode_image(encoded(noise(8, 8)), 8).any()


@pytest.mark.parametrize("side", [10_001, 100_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_of_a_forged_size_is_refused(side: int) -> None:
    with pytest.raises(DECODER_ERRORS, match=r"pixels|limit"):
        decode_image(png_of_size(side, side), 8)
