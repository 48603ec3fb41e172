"""Draw contact sheets and preview strips, with class names in any writing system."""

from __future__ import annotations

import functools
import io
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
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
_LINE = 22  # height of a line of text of 13 pixels
_MAX_TITLE = 1000  # width in pixels
_NO_CHARACTER = "\U0010ffff"  # fonts draw their missing-glyph symbol for it
_Run = tuple[ImageFont.FreeTypeFont, str]  # part of a line, in one font


def contact_sheet(
    images: NDArray[np.uint8], labels: Sequence[int], names: Sequence[str] | Mapping[int, str]
) -> Image.Image:
    """Draw one row per class, with its name on the left; `images` are `N H W 3`, `labels` index `names`."""
    shown = sorted(set(labels))
    rows = [[Image.fromarray(images[i]) for i, label in enumerate(labels) if label == kind] for kind in shown]
    return grid(rows, [names[kind] for kind in shown])


def strip(rows: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Draw rows of square images, each row with a caption on the left."""
    size = rows[0].height
    return grid([[row.crop((x, 0, x + size, size)) for x in range(0, row.width, size)] for row in rows], captions)


def grid(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    above: Sequence[str] = (),
    *,
    title: str = "",
    smallest: int = _MIN_TILE,
) -> Image.Image:
    """Draw rows of square images of one size, with the captions of rows on the left and those of columns `above`.

    Images are enlarged by an integer factor to at least `smallest` pixels.
    """
    tile = _tile(rows[0][0].height, smallest)
    left, top = (draw_texts(texts, size=13, width=_MARGIN) for texts in (captions, above))
    heading = draw_texts([title] if title else [], size=13, width=_MAX_TITLE)
    margin = 12 + max(caption.width for caption in left)
    column = max([tile, *(caption.width + 4 * _GAP for caption in top)]) + _GAP
    width = max([margin + max(map(len, rows)) * column, *(line.width + 12 for line in heading)])
    first = _GAP + (len(heading) + bool(top)) * _LINE
    image = Image.new("RGB", (width, first + len(rows) * (tile + _GAP)), "white")
    for line in heading:
        image.paste(line, (6, _GAP))
    for x, caption in enumerate(top):
        image.paste(caption, (margin + x * column + (column - _GAP - caption.width) // 2, first - _LINE))
    for y, (caption, row) in enumerate(zip(left, rows, strict=True)):
        start = first + y * (tile + _GAP)
        image.paste(caption, (margin - 6 - caption.width, start + (tile - caption.height) // 2))
        for x, each in enumerate(row):
            enlarged = each.resize((tile, tile), Image.Resampling.NEAREST)
            image.paste(enlarged, (margin + x * column + (column - _GAP - tile) // 2, start))
    return image


def captioned(
    images: NDArray[np.uint8], names: Sequence[str], title: str, *, columns: int = 5, smallest: int = _MIN_TILE
) -> Image.Image:
    """Draw images `N H W 3` in lines of `columns`, each with its name below if there are names, and a title above.

    The size of the picture depends only on the number and the size of the images. Images are enlarged by an integer
    factor to at least `smallest` pixels.
    """
    tile = _tile(images.shape[1], smallest)
    columns = min(columns, len(images))
    width, height = columns * (tile + _GAP) + _GAP, tile + (_LINE if any(names) else _GAP)
    image = Image.new("RGB", (width, _LINE + math.ceil(len(images) / columns) * height), "white")
    image.paste(draw_texts([title], size=13, width=width - 2 * _GAP)[0], (_GAP, 0))
    for number, name in enumerate(draw_texts(names, size=13, width=tile)):
        x, y = _GAP + number % columns * (tile + _GAP), _LINE + number // columns * height
        enlarged = Image.fromarray(images[number]).resize((tile, tile), Image.Resampling.NEAREST)
        image.paste(enlarged, (x, y))
        image.paste(name, (x + (tile - name.width) // 2, y + tile))
    return image


def pairs_sheet(
    above: NDArray[np.uint8], below: NDArray[np.uint8], names: Sequence[str], figures: Sequence[str]
) -> Image.Image:
    """Draw pairs of images, eight per line: one above the other, with a name and a number below; both are `N H W 3`."""
    tile = _tile(above.shape[1], 2 * _MIN_TILE)
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


def _tile(size: int, smallest: int = _MIN_TILE) -> int:
    """Return the width, at least `smallest`, at which an image of `size` is drawn."""
    return size * max(1, -(-smallest // size))


def save_figure(figure: Figure, path: Path, *, dpi: int = 100) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    publish(path, buffer.getvalue())


def save_animation(frames: Sequence[Image.Image], path: Path, *, fps: int = 10, hold: float = 1.5) -> None:
    """Write frames of one size as an endless animation, atomically, as the suffix of `path` says: .webp or .gif.

    Each frame is shown for 1 / `fps` seconds, the first and the last one for `hold` seconds. WebP keeps every pixel;
    GIF has 256 colours for each frame.
    """
    times = [1000 // fps] * len(frames)
    times[0] = times[-1] = round(1000 * hold)
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    if path.suffix == ".webp":
        options |= {"format": "WEBP", "lossless": True}
    else:
        options |= {"format": "GIF"}
    buffer = io.BytesIO()
    frames[0].save(buffer, **options)
    publish(path, buffer.getvalue())


def save_png(image: Image.Image, path: Path) -> None:
    """Write `image` as PNG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    publish(path, buffer.getvalue())
