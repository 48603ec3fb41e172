"""Pictures that people look at: contact sheets with the names of the classes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data.storage import publish

_GAP = 2
_MIN_TILE = 64  # smaller images are shown enlarged by a whole factor


def contact_sheet(
    images: NDArray[np.uint8], labels: Sequence[int], names: Sequence[str] | Mapping[int, str]
) -> Image.Image:
    """One row a class, its name on the left; `images` are `N H W 3`, `labels` index `names`."""
    tile = _tile(images.shape[1])
    shown = sorted(set(labels))
    rows = [[i for i, label in enumerate(labels) if label == kind] for kind in shown]
    font = ImageFont.load_default(size=13)
    margin = 12 + max(int(font.getlength(names[kind])) for kind in shown)
    width = margin + max(map(len, rows)) * (tile + _GAP)
    sheet = Image.new("RGB", (width, len(rows) * (tile + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (kind, row) in enumerate(zip(shown, rows, strict=True)):
        top = _GAP + y * (tile + _GAP)
        pen.text((margin - 6, top + tile // 2), names[kind], fill="black", font=font, anchor="rm")
        for x, index in enumerate(row):
            image = Image.fromarray(images[index]).resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + x * (tile + _GAP), top))
    return sheet


def strip(sheets: Sequence[Image.Image], captions: Sequence[str], *, size: int, classes: int) -> Image.Image:
    """The last image of each of `classes` rows of contact sheets, whose images are `size` wide: one line a sheet."""
    tile, font = _tile(size), ImageFont.load_default(size=13)
    margin = 12 + max(int(font.getlength(caption)) for caption in captions)
    image = Image.new("RGB", (margin + classes * (tile + _GAP), len(sheets) * (tile + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(image)
    for y, (sheet, caption) in enumerate(zip(sheets, captions, strict=True)):
        top = _GAP + y * (tile + _GAP)
        pen.text((margin - 6, top + tile // 2), caption, fill="black", font=font, anchor="rm")
        for x in range(classes):
            left, upper = sheet.width - _GAP - tile, _GAP + x * (tile + _GAP)
            image.paste(sheet.crop((left, upper, left + tile, upper + tile)), (margin + x * (tile + _GAP), top))
    return image


def pairs_sheet(above: NDArray[np.uint8], below: NDArray[np.uint8], captions: Sequence[str]) -> Image.Image:
    """Two images in each place, one above the other with a caption beneath, eight places a line; both are `N H W 3`."""
    scale = max(1, -(-2 * _MIN_TILE // above.shape[1]))
    tile = above.shape[1] * scale
    width, height = tile + 3 * _GAP, 2 * tile + 24
    columns = min(8, len(above))
    sheet = Image.new("RGB", (columns * width, -(-len(above) // columns) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (pair, caption) in enumerate(zip(zip(above, below, strict=True), captions, strict=True)):
        left, top = number % columns * width, number // columns * height
        for line, image in enumerate(pair):
            enlarged = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, top + line * tile))
        while font.getlength(caption) > tile and " " in caption:  # a long name of a class gives way to the figure
            caption = caption.split(" ", 1)[1]
        pen.text((left + 2, top + 2 * tile + 3), caption, fill="black", font=font)
    return sheet


def _tile(size: int) -> int:
    """The width at which an image of `size` is shown."""
    return size * max(1, -(-_MIN_TILE // size))


def save_png(image: Image.Image, path: Path) -> None:
    """Publish `image` as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    publish(path, buffer.getvalue())
