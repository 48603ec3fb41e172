"""Pictures that people look at: contact sheets with the names of the classes, in every script."""

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
_MIN_TILE = 64  # smaller images are shown enlarged by a whole factor
_MARGIN = 240  # pixels for names of classes; longer ones are cut off
_NOWHERE = "\U0010ffff"  # no character: what a font draws for it stands for all that it lacks
_Run = tuple[ImageFont.FreeTypeFont, str]  # a part of a line, in one font


def contact_sheet(
    images: NDArray[np.uint8], labels: Sequence[int], names: Sequence[str] | Mapping[int, str]
) -> Image.Image:
    """One row a class, its name on the left; `images` are `N H W 3`, `labels` index `names`."""
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
    """Rows of square images side by side, each with a caption on the left."""
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
    """Two images in each place, one above the other with a name and a figure beneath, eight places a line; both are
    `N H W 3`."""
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
    """Each of `texts` as a line on white, `size` pixels high and cut off at `width`; line breaks become spaces.

    A character for which no font is found is drawn as its code, such as U+732B, and a line says so.
    """
    missing: dict[str, None] = {}
    drawn = [_draw_runs(_fit(text, size, width, missing), size) for text in texts]
    if missing:
        _say_missing(tuple(missing))
    return drawn


def _fit(text: str, size: int, width: int, missing: dict[str, None]) -> list[_Run]:
    """The runs of `text`, or of its beginning and an ellipsis where it would be wider than `width`."""
    text = normalize("NFC", text)[:width]  # no character that counts is narrower than a pixel
    runs = _runs(text, size, missing)
    if _length(runs, size) <= width:
        return runs
    cuts = [text[:end] + "\u2026" for end in range(len(text))]
    fitting = bisect_right(cuts, width, key=lambda cut: _length(_runs(cut, size, missing), size))
    return _runs(cuts[max(fitting - 1, 0)], size, missing)


def _runs(text: str, size: int, missing: dict[str, None]) -> list[_Run]:
    """`text` in parts of one font each; characters that none has are added to `missing`."""
    plain = _font(_dejavu(), size)
    assert plain
    runs: list[_Run] = []
    for character in text:
        kind = category(character)
        if kind == "Cf" or "\ufe00" <= character <= "\ufe0f":  # joiners and variants say how others look
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
        else:  # pictures of one size
            large = Image.new("RGB", (round(width * font.size / size), round(font.size)), "white")
            ImageDraw.Draw(large).text((0, font.size), text, font=font, anchor="ld", embedded_color=True)
            line.paste(large.resize((width, size), Image.Resampling.BOX), (left, baseline - size + 2))
        left += width
    return line


def _length(runs: list[_Run], size: int) -> int:
    return sum(math.ceil(font.getlength(text) * size / font.size) for font, text in runs)


@functools.cache
def _font_for(character: str, size: int) -> ImageFont.FreeTypeFont | None:
    """matplotlib's DejaVu Sans where it has `character`, else the first font of the system that does."""
    plain = _font(_dejavu(), size)
    if plain and (character.isascii() or _draws(plain, character)):
        return plain
    fonts = (_font(file, size) for file in _system_fonts())
    return next((font for font in fonts if font and _draws(font, character)), None)


@functools.cache
def _draws(font: ImageFont.FreeTypeFont, character: str) -> bool:
    if category(character) == "Cs":  # a byte of a file's name that is no text
        return False
    font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)  # the other puts a circle beneath a lone accent
    side = round(font.size)
    tiles = [Image.new("RGB", (2 * side, 2 * side), "white") for _ in range(2)]
    for tile, each in zip(tiles, (character, _NOWHERE), strict=True):
        ImageDraw.Draw(tile).text((side // 2, side // 2), each, font=font, fill="black", embedded_color=True)
    return tiles[0].tobytes() != tiles[1].tobytes()


@functools.cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The font in `file` at `size` or, of pictures, at the size that NotoColorEmoji or Apple's has; None for others."""
    for each in (size, 109, 160):
        try:
            return ImageFont.truetype(file, each)
        except OSError:
            continue
    return None


def _dejavu() -> str:
    matplotlib = find_spec("matplotlib")  # whose import would take longer than the sheet
    assert matplotlib
    assert matplotlib.origin
    return str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _system_fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts

    files = [file for file in findSystemFonts() if "LastResort" not in file]  # which has a box for every character
    return sorted(files, key=lambda file: ("Regular" not in file, file))


@functools.cache
def _say_missing(characters: tuple[str, ...]) -> None:
    """Once a process: previews are drawn again and again."""
    codes = [f"U+{ord(character):04X}" for character in characters]
    more = f" and {len(codes) - 5} more" if len(codes) > 5 else ""
    print(f"no font was found for {', '.join(codes[:5])}{more}: pictures show these codes instead", flush=True)


def _tile(size: int) -> int:
    """The width at which an image of `size` is shown."""
    return size * max(1, -(-_MIN_TILE // size))


def save_figure(figure: Figure, path: Path, *, dpi: int = 100) -> None:
    """Publish a figure of matplotlib as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    publish(path, buffer.getvalue())


def save_png(image: Image.Image, path: Path) -> None:
    """Publish `image` as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    publish(path, buffer.getvalue())
