"""Draw contact sheets and preview strips, with class names in any writing system."""

from __future__ import annotations

import functools
import io
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category, normalize

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data.storage import publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP = 2
_MIN_TILE = 64  # smaller images are enlarged by an integer factor
_MARGIN = 240  # width for class names, in pixels; longer names are cut off
_NO_CHARACTER = "\U0010ffff"  # fonts draw their missing-glyph symbol for it
_Run = tuple[ImageFont.FreeTypeFont, str]  # part of a line, in one font


def contact_sheet(
    images: NDArray[np.uint8], labels: Sequence[int], names: Sequence[str] | Mapping[int, str]
) -> Image.Image:
    """Draw one row per class, with its name on the left; `images` are `N H W 3`, `labels` index `names`."""
    tile = _tile(images.shape[1])
    shown = sorted(set(labels))
    rows = [[i for i, label in enumerate(labels) if label == kind] for kind in shown]
    captions = draw_texts([names[kind] for kind in shown], size=13, width=_MARGIN)
    margin = 12 + max(caption.width for caption in captions)
    width = margin + max(map(len, rows)) * (tile + _GAP)
    sheet = Image.new("RGB", (width, len(rows) * (tile + _GAP) + _GAP), "white")
    for y, (caption, row) in enumerate(zip(captions, rows, strict=True)):
        top = _GAP + y * (tile + _GAP)
        sheet.paste(caption, (margin - 6 - caption.width, top + (tile - caption.height) // 2))
        for x, index in enumerate(row):
            image = Image.fromarray(images[index]).resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + x * (tile + _GAP), top))
    return sheet


def strip(rows: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Draw rows of square images, each row with a caption on the left."""
    size = rows[0].height
    tile, written = _tile(size), draw_texts(captions, size=13, width=_MARGIN)
    margin = 12 + max(caption.width for caption in written)
    columns = max(row.width // row.height for row in rows)
    image = Image.new("RGB", (margin + columns * (tile + _GAP), len(rows) * (tile + _GAP) + _GAP), "white")
    for y, (row, caption) in enumerate(zip(rows, written, strict=True)):
        top = _GAP + y * (tile + _GAP)
        image.paste(caption, (margin - 6 - caption.width, top + (tile - caption.height) // 2))
        for x in range(row.width // row.height):
            each = row.crop((x * row.height, 0, (x + 1) * row.height, row.height))
            image.paste(each.resize((tile, tile), Image.Resampling.NEAREST), (margin + x * (tile + _GAP), top))
    return image


def pairs_sheet(
    above: NDArray[np.uint8], below: NDArray[np.uint8], names: Sequence[str], figures: Sequence[str]
) -> Image.Image:
    """Draw pairs of images, eight per line: one above the other, with a name and a number below; both are `N H W 3`."""
    scale = max(1, -(-2 * _MIN_TILE // above.shape[1]))
    tile = above.shape[1] * scale
    width, height = tile + 3 * _GAP, 2 * tile + 24
    columns = min(8, len(above))
    sheet = Image.new("RGB", (columns * width, -(-len(above) // columns) * height), "white")
    right = draw_texts(figures, size=12, width=tile)
    left = draw_texts(names, size=12, width=tile - 8 - max(figure.width for figure in right))
    for number in range(len(above)):
        x, y = number % columns * width, number // columns * height
        for line, image in enumerate((above[number], below[number])):
            enlarged = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x, y + line * tile))
        sheet.paste(left[number], (x + 2, y + 2 * tile + 1))
        sheet.paste(right[number], (x + 6 + left[number].width, y + 2 * tile + 1))
    return sheet


def draw_texts(texts: Sequence[str], *, size: int, width: int) -> list[Image.Image]:
    """Draw each text as one line on white, `size` pixels high and cut off at `width`; line breaks become spaces.

    A character without a font is drawn as its code, such as U+732B, and a line about it is printed.
    """
    missing: dict[str, None] = {}
    drawn = [_draw_runs(_fit(text, size, width, missing), size) for text in texts]
    if missing:
        _report_missing(tuple(missing))
    return drawn


def _fit(text: str, size: int, width: int, missing: dict[str, None]) -> list[_Run]:
    """Split `text` into runs; if it is wider than `width`, cut it and add an ellipsis."""
    text = normalize("NFC", text)[:width]  # every visible character is at least one pixel wide
    runs = _runs(text, size, missing)
    if _length(runs, size) <= width:
        return runs
    cuts = [text[:end] + "\u2026" for end in range(len(text))]
    fitting = bisect_right(cuts, width, key=lambda cut: _length(_runs(cut, size, missing), size))
    return _runs(cuts[max(fitting - 1, 0)], size, missing)


def _runs(text: str, size: int, missing: dict[str, None]) -> list[_Run]:
    """Split `text` into parts of one font each; add characters without a font to `missing`."""
    plain = _font(_dejavu(), size)
    assert plain
    runs: list[_Run] = []
    for character in text:
        kind = category(character)
        if kind == "Cf" or "\ufe00" <= character <= "\ufe0f":  # joiners and variation selectors
            continue
        if kind in ("Cc", "Zl", "Zp", "Zs"):
            character = " "
        last = runs[-1][0] if runs else plain
        font = last if kind in ("Mn", "Me") and _draws(last, character) else _font_for(character, size)
        if not font:
            missing[character] = None
            font, character = plain, f"U+{ord(character):04X}"
        if runs and font is last:
            character = runs.pop()[1] + character
        runs.append((font, character))
    return runs


def _draw_runs(runs: list[_Run], size: int) -> Image.Image:
    line = Image.new("RGB", (_length(runs, size), 2 * size - 4), "white")
    pen, baseline, left = ImageDraw.Draw(line), line.height - size // 2, 0
    for font, text in runs:
        width = _length([(font, text)], size)
        if font.size == size:
            pen.text((left, baseline), text, fill="black", font=font, anchor="ls", embedded_color=True)
        else:  # a colour font of fixed size
            large = Image.new("RGB", (round(width * font.size / size), round(font.size)), "white")
            ImageDraw.Draw(large).text((0, font.size), text, font=font, anchor="ld", embedded_color=True)
            line.paste(large.resize((width, size), Image.Resampling.BOX), (left, baseline - size + 2))
        left += width
    return line


def _length(runs: list[_Run], size: int) -> int:
    return sum(math.ceil(font.getlength(text) * size / font.size) for font, text in runs)


@functools.cache
def _font_for(character: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Return matplotlib's DejaVu Sans if it has `character`, else the first system font that has it, or None."""
    plain = _font(_dejavu(), size)
    if plain and (character.isascii() or _draws(plain, character)):
        return plain
    fonts = (_font(file, size) for file in _system_fonts())
    return next((font for font in fonts if font and _draws(font, character)), None)


@functools.cache
def _draws(font: ImageFont.FreeTypeFont, character: str) -> bool:
    if category(character) == "Cs":  # an undecodable byte of a file name
        return False
    font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)  # Raqm draws a circle below a single accent
    side = round(font.size)
    tiles = [Image.new("RGB", (2 * side, 2 * side), "white") for _ in range(2)]
    for tile, each in zip(tiles, (character, _NO_CHARACTER), strict=True):
        ImageDraw.Draw(tile).text((side // 2, side // 2), each, font=font, fill="black", embedded_color=True)
    return tiles[0].tobytes() != tiles[1].tobytes()


@functools.cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Open the font in `file` at `size` or, for emoji, at the fixed size of NotoColorEmoji or Apple's; else None."""
    for each in (size, 109, 160):
        try:
            return ImageFont.truetype(file, each)
        except OSError:
            continue
    return None


def _dejavu() -> str:
    matplotlib = find_spec("matplotlib")  # importing it would take longer than drawing the sheet
    assert matplotlib
    assert matplotlib.origin
    return str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _system_fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts

    files = [file for file in findSystemFonts() if "LastResort" not in file]  # it has a box for every character
    return sorted(files, key=lambda file: ("Regular" not in file, file))


@functools.cache
def _report_missing(characters: tuple[str, ...]) -> None:
    """Print the characters without a font, once per process because previews are drawn many times."""
    codes = [f"U+{ord(character):04X}" for character in characters]
    more = f" and {len(codes) - 5} more" if len(codes) > 5 else ""
    print(f"no font was found for {', '.join(codes[:5])}{more}: pictures show these codes instead", flush=True)


def _tile(size: int) -> int:
    """Return the width at which an image of `size` is drawn."""
    return size * max(1, -(-_MIN_TILE // size))


def save_figure(figure: Figure, path: Path, *, dpi: int = 100) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    publish(path, buffer.getvalue())


def save_png(image: Image.Image, path: Path) -> None:
    """Write `image` as PNG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    publish(path, buffer.getvalue())
