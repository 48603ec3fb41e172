"""The page of decoded images, in a real browser."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cache.listing import Rows
from data.cache.manifest import Plan
from data.cache.writer import CacheWriter, EncodedShard
from data.storage import publish_checked
from pipeline.config_file import load_config
from pipeline.vae import FrozenVae
from stages.decode import decode
from tests.helpers.browser import PROGRAM, Browser
from tests.helpers.world import CLASSES, IMAGE_SIZE, World

pytestmark = pytest.mark.skipif(not PROGRAM, reason="no Chromium is installed")

MANY = 3_000
NAMES = ("cat", "</script><b>bold", "wild cat", "owl")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """The page of three thousand images."""
    folder = tmp_path_factory.mktemp("many") / "samples"
    vae = FrozenVae(str(world.config.parent / "vae"))
    labels = np.arange(MANY) % len(NAMES)
    keys = [f"{i}" for i in range(MANY)]
    plan = Plan(
        store="mean",
        dtype="float16",
        views=("identity",),
        shape=(4, 4, 4),
        rows=MANY,
        shard_rows=4096,
        batch_size=64,
        classes=NAMES,
        data_source="samples of many",
        data_fingerprint="f" * 64,
        data_bytes=0,
        image_size=IMAGE_SIZE,
        preprocessing="none",
        vae=vae.identity(),
    )
    writer = CacheWriter(folder, plan, Rows(keys, labels, NAMES, [""] * MANY, np.arange(MANY)))
    moments = np.random.default_rng(0).normal(size=(MANY, 1, 4, 4, 4)).astype(np.float16)
    with writer.claimed():
        writer.write(EncodedShard(0, np.arange(MANY), moments, {}))
        writer.finish()
    record = json.loads((world.samples / "samples.json").read_text())
    del record["sha256"]
    record["images"] = [{"index": i, "label": i % 4, "class": NAMES[i % 4]} for i in range(MANY)]
    publish_checked(folder / "samples.json", record)
    return decode(load_config(world.config), folder) / "index.html"


@pytest.fixture
def page(browser: Browser, many: Path) -> Iterator[Browser]:
    """That page, just opened; at the end, it has reported no error and asked for nothing but files."""
    browser.open(many)
    yield browser
    assert browser.errors == []
    assert browser.requests
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)


def captions(page: Browser) -> list[str]:
    return page.run("[...document.querySelectorAll('.thumb span')].map((each) => each.textContent)")


def headings(page: Browser) -> list[str]:
    return page.run("[...document.querySelectorAll('.line h2')].map((each) => each.firstChild.data)")


def count(page: Browser) -> str:
    return page.run("document.querySelector('#count').textContent")


def focused(page: Browser) -> str:
    """The caption of the image that has the focus, or the id of what has it."""
    return page.run("document.activeElement.querySelector('span')?.textContent ?? document.activeElement.id")


def in_sight(page: Browser) -> bool:
    """Whether what has the focus is below the header and inside of the window."""
    box = page.run("document.activeElement.getBoundingClientRect().toJSON()")
    return 50 < box["top"] < box["bottom"] <= page.run("innerHeight")


def choose(page: Browser, order: str) -> None:
    page.run(f"(sort.value = {json.dumps(order)}, sort.dispatchEvent(new Event('change')))")


def test_thousands_of_images_are_counted_but_only_those_in_sight_are_built(page: Browser) -> None:
    assert page.run("document.title") == "samples of many"
    assert count(page).startswith("3,000 images · 4 classes · unipc, 2 steps · guidance 2 · seed 0")
    assert headings(page) == ["cat"]
    assert captions(page)[:3] == ["0", "4", "8"]
    assert 20 < len(captions(page)) < 300
    page.run("scrollTo(0, document.documentElement.scrollHeight)")
    assert captions(page)[-1] == f"{MANY - 1}"
    assert headings(page) == []
    assert len(captions(page)) < 300
    thumbs = "[...document.querySelectorAll('.thumb img')]"
    loaded = f"Promise.all({thumbs}.map((each) => each.decode().then(() => each.naturalWidth)))"
    assert set(page.run(loaded)) == {IMAGE_SIZE}


def test_the_filter_keeps_the_classes_with_one_of_its_words(page: Browser) -> None:
    page.press("/", *"CAT")
    assert focused(page) == "filter"
    assert count(page).startswith("1,500 images of 3,000 · 2 classes")
    page.press(",", "o", "w")
    assert count(page).startswith("2,250 images of 3,000 · 3 classes")
    page.press("x")
    assert count(page).startswith("1,500 images of 3,000")
    page.run("filter.value = 'nothing', filter.dispatchEvent(new Event('input'))")
    assert count(page).startswith("0 images of 3,000 · 0 classes")
    assert page.run("document.querySelector('#nothing').checkVisibility()")
    assert captions(page) == []
    page.press("ArrowDown", "Enter")
    assert not page.run("dialog.open")


def test_images_are_sorted_by_class_or_by_index(page: Browser) -> None:
    choose(page, "index")
    assert captions(page)[:2] == ["0", "1"]
    assert headings(page) == []
    choose(page, "kind")
    assert captions(page)[:2] == ["0", "4"]


def test_the_name_of_a_class_is_text_wherever_it_stands(page: Browser) -> None:
    page.run("filter.value = 'bold', filter.dispatchEvent(new Event('input'))")
    assert headings(page) == [NAMES[1]]
    assert page.run("document.querySelectorAll('b').length") == 0
    page.click(".thumb")
    assert page.run("document.querySelector('#name').textContent") == NAMES[1]
    assert page.run("document.querySelector('#picture').alt") == f"{NAMES[1]}, image 1"
    page.press("Escape")


def test_the_keys_move_open_and_close(page: Browser) -> None:
    columns = page.run("document.querySelector('.line:has(.thumb)').children.length")
    assert columns > 3
    seen = []
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowLeft", "ArrowUp"):
        page.press(key)
        seen.append(int(focused(page).split()[0]) // 4)
    assert seen == [0, 1, columns + 1, columns, 0, 0, 0]
    page.press("Enter")
    assert page.run("dialog.open")
    page.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert page.run("document.querySelector('#picture').alt") == "cat, image 4"
    page.press("Escape")
    assert not page.run("dialog.open")
    assert focused(page) == "4"
    for _ in range(30):
        page.press("ArrowDown")
    assert in_sight(page)
    assert page.run("document.querySelectorAll('.thumb[tabindex=\"0\"]').length") == 1


@pytest.mark.parametrize("key", ["ArrowDown", "Tab"])  # Tab goes to the grid from what is before it
def test_far_from_the_current_image_the_keys_begin_with_what_is_seen(page: Browser, key: str) -> None:
    page.run("scrollTo(0, 5000)")
    if key == "Tab":
        page.run("sort.focus()")
    page.press(key)
    assert int(focused(page).split()[0]) > 400
    assert in_sight(page)
    assert page.run("Math.abs(scrollY - 5000) < 200")


def test_a_click_opens_the_image_with_its_settings_and_the_command(browser: Browser, world: World) -> None:
    browser.open(world.samples / "index.html")
    assert count(browser).startswith("6 images · 2 classes")
    assert browser.run("[...sort.options].map((each) => each.value)") == ["kind", "index"]
    browser.click('.thumb[data-number="4"]')
    facts: dict[str, Any] = dict(
        browser.run(
            "[...document.querySelectorAll('dt')].map((each) => [each.textContent, each.nextSibling.textContent])"
        )
    )
    expected = {"index": "3", "file": "000003-dog_fox_.png", "sampler": "unipc", "steps": "2", "seed": "0"}
    assert facts.items() >= expected.items()
    assert browser.run("document.querySelector('#name').textContent") == CLASSES[1]
    command = shlex.split(browser.run("document.querySelector('#command').textContent"))
    assert command[:2] == ["latentmill", "sample"]
    assert {"--config", "--run"} <= set(command)
    assert browser.run("document.querySelector('#picture').width") % IMAGE_SIZE == 0
    watched = "new MutationObserver(() => done(button.textContent)).observe(button, {childList: true})"
    browser.run(f"(window.copied = new Promise((done) => {{ const button = of('copy'); {watched}; }})) && 0")
    browser.click("#copy")
    assert browser.run("window.copied") == "Copied"
    browser.click("#close")
    assert not browser.run("dialog.open")
    assert browser.errors == []
