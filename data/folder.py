"""A folder of class folders as a data set, and the one policy by which image files become pixels."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from data.source import Batch, digest, printable

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 100_000_000  # larger pictures are refused by their header, before any memory is taken
PREPROCESSING = "v1: EXIF rotation, RGB over white, shorter side resized (bicubic), centre crop"
_DECODER_ERRORS = (  # what Pillow's decoders raise for damaged files; each is recorded with the image's key
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
_MATTE = 255  # alpha is composited over white, as a browser shows it


class ImageFolder:
    """Images in one folder per class, nested folders included; classes are the top folders' names, sorted."""

    def __init__(self, root: Path, *, image_size: int) -> None:
        if not root.is_dir():
            raise ValueError(f"data.source: no such folder: {root}")
        self.name = printable(str(root))
        self.root = root
        self.image_size = image_size
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        found = [(f"{name}/{path}", name) for name in folders for path in sorted(_image_paths(root / name))]
        names = sorted({name for _, name in found})
        self.classes = tuple(map(printable, names))
        if not found:
            raise ValueError(
                f"data.source: no images under {root}: put them in one folder per class, such as {root}/cat/1.jpg"
                f" (formats: {' '.join(sorted(SUFFIXES))})"
            )
        self.keys: Sequence[str] = [key for key, _ in found]
        number = {name: i for i, name in enumerate(names)}
        self.labels = np.array([number[name] for _, name in found], dtype=np.int64)

    def fingerprint(self) -> str:
        """A digest over keys, sizes and modification times: cheap enough to take before every encode."""
        return digest(f"{key}\t{_stamp(self.root / key)}" for key in self.keys)

    def load(self, indices: Sequence[int]) -> Batch:
        batch = Batch(
            np.asarray(indices, np.int64), np.zeros((len(indices), self.image_size, self.image_size, 3), np.uint8)
        )
        for row, index in enumerate(indices):
            try:
                batch.pixels[row] = read_image(self.root / self.keys[index], self.image_size)
            except _DECODER_ERRORS as error:
                batch.failures[int(index)] = f"{type(error).__name__}: {error}"
        return batch


def _image_paths(folder: Path) -> Iterator[str]:
    for parent, inner, files in os.walk(folder):  # links to folders are not followed: they may form a loop
        inner[:] = [name for name in inner if not name.startswith(".")]
        for file in files:
            if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("."):
                yield os.path.relpath(os.path.join(parent, file), folder).replace(os.sep, "/")


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:  # a dangling link, or gone since it was listed: its load will say so
        return "unreadable"
    return f"{stat.st_size}\t{stat.st_mtime_ns}"


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """The pixels of one image file: uint8 RGB of shape `size size 3`.

    EXIF rotation is applied, 16-bit and float greys are scaled by their format's range, alpha is composited over
    white, the first frame of an animation is taken; then the shorter side is resized to `size` (bicubic, with
    anti-aliasing) and the centre is cut out. Raises ValueError or OSError with the reason.
    """
    with Image.open(path) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width}x{file.height} pixels, over the limit of {MAX_PIXELS}")
        image = _upright(_to_rgb(file), file.getexif().get(ExifTags.Base.Orientation))
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    """Turn by EXIF's orientation alone: ImageOps.exif_transpose also rewrites the other tags, and fails on odd ones."""
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scale_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        matte = Image.new("RGBA", image.size, (_MATTE, _MATTE, _MATTE, 255))
        return Image.alpha_composite(matte, image).convert("RGB")
    return image.convert("RGB")


def _scale_grey(image: Image.Image) -> Image.Image:
    """16-bit greys span 0..65535, floats 0..1: Pillow's own conversion saturates the former and blackens the latter."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a pixel is NaN or infinite")
    top = 1.0 if image.mode == "F" else 65535.0
    return Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
