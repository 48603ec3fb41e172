"""Turns image files into pixels, by one policy for all sources (docs/data.md)."""

from __future__ import annotations

import io
import os
import re
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

# For other formats Pillow may start programs, such as Ghostscript, or accept any bytes as an image, as for TGA.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# fmt: off
SUFFIXES = {
    ".apng", ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tif", ".tiff", ".webp",
}
# fmt: on
SIGNATURE_BYTES = 16  # of a file: enough to recognise its format
_SIGNATURES = re.compile(  # first bytes of each format except PPM: a text may begin with its two letters, too
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM.{4}\0\0\0\0|II\*\0|MM\0\*|II\+\0|MM\0\+"
    rb"|....ftyp(avif|avis|mif1)|\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n|qoif",
    re.DOTALL,
)
MAX_PIXELS = 100_000_000  # larger images are refused from their header, before memory is allocated
MAX_SCANS = 200  # of a JPEG file; a progressive one has about ten
_SCAN = b"\xff\xda"  # marker that begins a scan; never in the data of one
_PIXELS_AT_A_TIME = 2**20
PREPROCESSING = "v1: EXIF rotation, RGB over {matte}, shorter side resized (bicubic), centre crop"
DECODER_ERRORS = (  # what Pillow's decoders raise for damaged files; each is recorded with the image's key
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AssertionError,
    MemoryError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")  # may hold one
_UNDO_ORIENTATION = {  # EXIF orientation -> transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image(name: str) -> bool:
    """Return whether a file's name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def has_image_signature(head: bytes) -> bool:
    """Return whether the first `SIGNATURE_BYTES` of a file are those of an image."""
    return _SIGNATURES.match(head) is not None


def decode_image(payload: bytes, size: int, matte: str = "white") -> NDArray[np.uint8]:
    """Decode the bytes of one image file to uint8 RGB pixels of shape `size size 3`.

    EXIF rotation is applied, 16-bit and float greys are scaled by their format's range, alpha is composited over the
    colour `matte`, and only the first frame of an animation is used; then the shorter side is resized to `size`
    (bicubic, with anti-aliasing) and the centre is cropped. Raises one of `DECODER_ERRORS` with the reason.
    """
    image = decode_rgb(payload, matte)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def decode_rgb(payload: bytes, matte: str = "white") -> Image.Image:
    """Decode the bytes of one image file to an RGB image of its own size: `decode_image` before resize and crop."""
    with _open(payload) as file:
        if file.format == "JPEG" and (scans := payload.count(_SCAN)) > MAX_SCANS:
            raise ValueError(f"{scans} scans, over the limit of {MAX_SCANS}: each scan decodes all pixels")
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width}x{file.height} pixels, over the limit of {MAX_PIXELS}")
        return _upright(_to_rgb(file, matte), file.getexif().get(ExifTags.Base.Orientation))


def _open(payload: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(_without_texts(payload)), formats=FORMATS)
    except UnidentifiedImageError:  # Pillow's text has a memory address, which differs in each run
        raise ValueError("not a supported image format, or damaged in its first bytes") from None


def _without_texts(payload: bytes) -> bytes:
    """Remove from a PNG file its colour profile and all texts but those with an orientation: they change no pixel, and
    Pillow refuses a file in which they are large."""
    if not payload.startswith(_PNG):
        return payload
    kept, place = [_PNG], len(_PNG)
    while place < len(payload):
        end = place + 12 + int.from_bytes(payload[place : place + 4], "big")  # length, type, contents, CRC
        kind, keyword = payload[place + 4 : place + 8], payload[place + 8 : place + 8 + 32]
        if kind != b"iCCP" and (kind not in (b"tEXt", b"zTXt", b"iTXt") or keyword.startswith(_ORIENTATION_TEXTS)):
            kept.append(payload[place:end])
        place = end
    return b"".join(kept)


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    """Apply EXIF's orientation alone: ImageOps.exif_transpose also rewrites the other tags, and fails on odd ones."""
    turn = _UNDO_ORIENTATION.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, matte: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scale_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, ImageColor.getrgb(matte))
        return Image.alpha_composite(below, image).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit greys from 0..65535, floats from 0..1: Pillow's conversion saturates or blackens them."""
    scaled = np.empty((image.height, image.width), np.uint8)
    top = 1.0 if image.mode == "F" else 65535.0
    rows = max(_PIXELS_AT_A_TIME // image.width, 1)  # float64 of all pixels would take eight times the memory
    for start in range(0, image.height, rows):
        strip = image.crop((0, start, image.width, min(start + rows, image.height)))
        values = np.asarray(strip, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("a pixel is NaN or infinite")
        scaled[start : start + rows] = np.rint(np.clip(values / top, 0, 1) * 255)
    return Image.fromarray(scaled)
