"""Names of classes in pictures, in files' names and in the page, whatever they are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from data.text import printable
from pipeline import pictures
from pipeline.pictures import contact_sheet, draw_texts, pairs_sheet
from stages.decode import _file_name
from tests.helpers.world import World, drawn, make_images, page_data, succeed, train_on

NAMES = ("a\nb", "café", "q'uote\"", "x" * 250, "é" * 120, "кот", "猫", "🐶", "#x?%41", "$\\alpha$")
PRIVATE = "\ue000"  # which STIXNonUni has and DejaVu Sans has not


@pytest.fixture(autouse=True)
def _no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pictures, "_system_fonts", list)
    caches = (pictures._font_for, pictures._report_missing)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def drawn_text(text: str, width: int = 500) -> Image.Image:
    return draw_texts([text], size=13, width=width)[0]


def same(a: str, b: str) -> bool:
    return drawn_text(a).tobytes() == drawn_text(b).tobytes()


@pytest.mark.parametrize("text", ["é", "кот", "ß", "Ω", "ש", "é\u0323"])
def test_scripts_of_dejavu_are_drawn_and_not_as_boxes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    font = pictures._font(pictures._dejavu(), 13)
    assert font is not None
    assert all(pictures._draws(font, character) for character in text)
    assert not pictures._draws(font, "猫")
    assert not same(text, "?" * len(text))
    assert not capsys.readouterr().out


def test_both_forms_of_unicode_are_drawn_alike() -> None:
    assert same(normalize("NFD", "café й"), normalize("NFC", "café й"))


def test_without_a_font_a_character_is_drawn_as_its_code_and_one_line_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert same("猫 a 🐶\u094d", "U+732B a U+1F436U+094D")
    draw_texts(["猫", "狗"], size=13, width=500)
    draw_texts(["猫", "狗"], size=13, width=500)
    assert capsys.readouterr().out.splitlines() == [
        "no font was found for U+732B, U+1F436, U+094D: pictures show these codes instead",
        "no font was found for U+732B, U+72D7: pictures show these codes instead",
    ]


def test_a_font_of_the_system_draws_what_dejavu_cannot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    other = Path(pictures._dejavu()).with_name("STIXNonUni.ttf")
    monkeypatch.setattr(pictures, "_system_fonts", lambda: [str(tmp_path / "broken.ttf"), str(other)])
    assert drawn_text(f"a{PRIVATE}b").width < drawn_text("aU+E000b").width
    assert not same(PRIVATE, "\ue001")
    assert not capsys.readouterr().out


def test_line_breaks_are_spaces_and_what_joins_is_left_out() -> None:
    assert same("a\nb\tc\u2028d\x00e\x7f", "a b c d e ")
    assert same("a\u200db\ufe0f\u202e", "ab")
    assert same("\udc80", "U+DC80")
    assert drawn_text("").width == 0


@pytest.mark.parametrize("text", ["x" * 10_000, "long name " * 50, "ж" * 300, "猫" * 300])
def test_a_long_text_is_cut_off_with_an_ellipsis(text: str) -> None:
    image = drawn_text(text, width=100)
    assert 60 < image.width <= 100
    assert any(drawn_text(text[:end] + "\u2026").tobytes() == image.tobytes() for end in range(40))
    sheet = contact_sheet(np.zeros((2, 64, 64, 3), np.uint8), [0, 1], [text, "b"])
    assert sheet.width < 64 + 300


def test_a_pairs_sheet_keeps_its_figures_where_a_name_is_long() -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    sheets = [pairs_sheet(images, images, ["x" * 100] * 2, [figure] * 2) for figure in ("27.1 dB", "31.9 dB")]
    assert sheets[0].size == pairs_sheet(images, images, ["x"] * 2, ["27.1 dB"] * 2).size
    assert sheets[0].tobytes() != sheets[1].tobytes()


@pytest.mark.parametrize("name", [*NAMES, "", ".", "..", "a/b", "CON", "x" * 5000, "猫" * 99, "हिन्दी"])
def test_the_name_of_any_class_is_part_of_a_file_name(name: str) -> None:
    safe = _file_name(name)
    assert 1 <= len(safe.encode()) <= 100
    assert re.fullmatch(r"[\w.-]+", safe)
    assert safe == normalize("NFC", safe) == _file_name(normalize("NFD", name))


def test_classes_of_any_name_go_all_the_way_to_images_and_a_page(world: World, tmp_path: Path) -> None:
    make_images(tmp_path / "images", NAMES)
    given = train_on(world, tmp_path / "$run's", (), f"data.source={tmp_path / 'images'}")
    printed = succeed("sample", world.config, tmp_path / "$run's" / "run", *given, "sample.per_class=1")
    assert all(line.startswith(("sample: ", "decode: ", "no font ")) for line in printed.splitlines())
    cache = drawn(tmp_path / "$run's" / "run")
    keys = cache.keys()
    names = [printable(name) for name in NAMES]  # a line ends in one of them
    assert sorted(key.split("/")[0] for key in keys) == sorted(names)
    assert [json.loads(line)["row"] for line in (cache.path / "rows.jsonl").read_text().splitlines()] == [*range(10)]
    data = page_data(cache.path / "index.html")
    assert sorted({data["classes"][kind][0] for _, kind in data["images"]}) == sorted(names)
    files = [f"{index:06d}{data['classes'][kind][1]}" for index, kind in data["images"]]
    assert sorted(files) == sorted(file.name for file in (cache.path / "images").iterdir())
    Image.open(cache.path / "grid.png").load()


def test_classes_whose_file_names_are_alike_do_not_collide(world: World, tmp_path: Path) -> None:
    make_images(tmp_path / "images", ("a b", "a?b", "a_b", "A_b"))
    given = (f"data.source={tmp_path / 'images'}", f"cache.path={tmp_path / 'cache'}")
    succeed("encode", world.config, tmp_path, *given)
    succeed("decode", world.config, tmp_path, *given, more=("--cache", str(tmp_path / "cache")))
    files = list((tmp_path / "cache" / "decoded" / "images").iterdir())
    assert len({file.name.lower() for file in files}) == 4 * 3
