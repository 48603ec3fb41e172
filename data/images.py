"""The one policy by which image files become pixels (docs/data.md)."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # for others, Pillow may start programs: Ghostscript
MAX_PIXELS = 100_000_000  # larger pictures are refused by their header, before any memory is taken
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
_TURNS = {  # EXIF's orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image(name: str) -> bool:
    """Whether a file's name ends as that of an image does."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def decode_image(payload: bytes, size: int, matte: str = "white") -> NDArray[np.uint8]:
    """The pixels of one image file's bytes: uint8 RGB of shape `size size 3`.

    EXIF rotation is applied, 16-bit and float greys are scaled by their format's range, alpha is composited over the
    colour `matte`, the first frame of an animation is taken; then the shorter side is resized to `size` (bicubic, with
    anti-aliasing) and the centre is cut out. Raises one of `DECODER_ERRORS` with the reason.
    """
    with _open(payload) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width}x{file.height} pixels, over the limit of {MAX_PIXELS}")
        image = _upright(_to_rgb(file, matte), file.getexif().get(ExifTags.Base.Orientation))
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def _open(payload: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(payload), formats=FORMATS)
    except UnidentifiedImageError:  # its own text holds an address in memory, another one in each run
        raise ValueError("of no image format that is read here, or damaged in its first bytes") from None


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    """Turn by EXIF's orientation alone: ImageOps.exif_transpose also rewrites the other tags, and fails on odd ones."""
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
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
    """16-bit greys span 0..65535, floats 0..1: Pillow's own conversion saturates the former and blackens the latter."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a pixel is NaN or infinite")
    top = 1.0 if image.mode == "F" else 65535.0
    return Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
