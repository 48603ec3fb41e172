"""The page that draws images: what it draws is what sample draws, and only this machine is answered."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from pipeline.compatibility import SAMPLERS
from stages.cli import main
from stages.demo import MOST_IMAGES, Demo, Server
from tests.helpers.browser import PROGRAM, Browser
from tests.helpers.world import CLASSES, IMAGE_SIZE, World, refuse, train_on

SETTINGS = {"class": CLASSES[0], "count": 3, "seed": 7, "sampler": "euler", "steps": 5, "guidance": 1.5}


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, and things that are none."""
    folder = tmp_path_factory.mktemp("demo") / "runs"
    for name in ("first", "second"):
        shutil.copytree(world.run, folder / name, ignore=shutil.ignore_patterns("samples"))
    (folder / "untrained" / "checkpoints").mkdir(parents=True)
    (folder / "notes.txt").write_text("no run")
    return folder


def request(runs: Path, **changes: Any) -> dict[str, Any]:
    return {"run": str(runs / "first"), **SETTINGS, **changes}


def drawn(demo: Demo, request: dict[str, Any]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    demo.draw(request, events.append)
    return events


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))), dtype=int)


def test_runs_are_folders_with_a_checkpoint_and_the_given_one_is_first(runs: Path, world: World) -> None:
    assert Demo(folder=runs).runs() == [str(runs / "first"), str(runs / "second")]
    assert Demo(runs / "second", runs).runs() == [str(runs / "second"), str(runs / "first")]
    assert Demo(world.run, runs).runs() == [str(world.run), str(runs / "first"), str(runs / "second")]


def test_a_run_offers_its_classes_its_settings_and_the_samplers_that_work_with_it(runs: Path) -> None:
    offer = Demo(folder=runs).describe(str(runs / "first"))
    assert offer["classes"] == list(CLASSES)
    assert offer["samplers"] == [name for name in SAMPLERS if name not in ("ddpm", "ddim")]
    assert (offer["sampler"], offer["steps"], offer["guidance"], offer["seed"]) == ("unipc", 2, 2.0, 0)
    assert offer["facts"][0] == "48 images seen"


@pytest.mark.parametrize("kind", range(len(CLASSES)))
@pytest.mark.parametrize("sampler", ["heun", "euler_ancestral"])
def test_the_command_draws_the_images_that_the_page_shows(runs: Path, kind: int, sampler: str) -> None:
    end = drawn(Demo(folder=runs), request(runs, **{"class": CLASSES[kind], "sampler": sampler}))[-1]
    program, *arguments = shlex.split(end["command"])
    assert program == "latentmill"
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    folder = Path(done.stdout.split("contact sheet ")[1].split(",")[0]).parent
    expected = [np.asarray(Image.open(file), dtype=int) for file in sorted((folder / "images").iterdir())]
    assert len(expected) == SETTINGS["count"]
    # another size of the batch may round otherwise
    assert np.abs(np.stack([pixels(png) for png in end["images"]]) - np.stack(expected)).max() <= 1
    assert end["note"] == ""


@pytest.mark.parametrize(("sampler", "steps", "evaluations"), [("euler", 20, 20), ("heun", 3, 5), ("euler", 1, 1)])
def test_every_step_is_reported_and_some_with_images(runs: Path, sampler: str, steps: int, evaluations: int) -> None:
    *progress, end = drawn(Demo(folder=runs), request(runs, sampler=sampler, steps=steps, count=20))
    assert [(event["step"], event["steps"]) for event in progress] == [
        (step, evaluations) for step in range(1, evaluations + 1)
    ]
    estimates = [event["images"] for event in progress if "images" in event]
    assert len(estimates) == min(7, evaluations - 1)
    assert {len(images) for images in estimates} <= {16}
    assert len(end["images"]) == 20
    if estimates:  # they come closer to the image
        first, last, image = (pixels(images[0]) for images in (estimates[0], estimates[-1], end["images"]))
        assert np.abs(last - image).mean() < np.abs(first - image).mean()


def test_an_image_does_not_depend_on_how_many_are_drawn(runs: Path) -> None:
    demo = Demo(folder=runs)
    few, many = (drawn(demo, request(runs, count=count))[-1]["images"] for count in (1, 5))
    assert np.abs(pixels(few[0]) - pixels(many[0])).max() <= 1
    assert len(set(many)) == 5


def test_what_the_page_does_not_offer_to_guide_with_is_left_out(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "first", tmp_path / "first")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sample"] |= {
        "guidance_by_class": {CLASSES[0]: 9.0},
        "start": 0.5,
        "start_from": "nowhere",
        "guide": "nowhere",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    plain, end = (drawn(Demo(path, runs), request(runs, run=str(path)))[-1] for path in (runs / "first", run))
    assert end["images"] == plain["images"]
    words = set(shlex.split(end["command"])) - set(shlex.split(plain["command"]))
    left_out = {"guide=null", "start=1.0", "start_from=null", "guidance_by_class={}"}
    assert words == {f"sample.{each}" for each in left_out} | {str(run), str(run / "config.yaml")}


def test_a_guidance_that_the_model_does_not_support_is_noted(world: World, tmp_path: Path) -> None:
    train_on(world, tmp_path, ("cat",))
    end = drawn(Demo(tmp_path / "run"), request(tmp_path, run=str(tmp_path / "run")))[-1]
    assert end["note"].startswith("sample.guidance = 1, not 1.5: there is only one class")


def test_one_model_is_kept_until_another_or_a_newer_one_is_asked_for(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(runs, tmp_path / "runs")
    opened: list[Path] = []
    monkeypatch.setattr("stages.demo.require_checkpoint", lambda run: opened.append(run) or require(run))
    from stages.sample import require_checkpoint as require

    demo = Demo(folder=copy)
    for name in ("first", "first", "second", "second", "first"):
        demo.describe(str(copy / name))
    assert [run.name for run in opened] == ["first", "second", "first"]
    newest = sorted((copy / "first" / "checkpoints").iterdir())[-1]
    newest.rename(newest.with_name("000000099"))
    demo.describe(str(copy / "first"))
    assert len(opened) == 4


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"class": "cow"}, ("class = cow",)),
        ({"run": "/etc"}, ("run = /etc", "no such run")),
        ({"steps": 0}, ("sample.steps = 0",)),
        ({"guidance": -1}, ("sample.guidance = -1",)),
        ({"count": MOST_IMAGES + 1}, (f"= {MOST_IMAGES + 1}", f"at most {MOST_IMAGES}")),
        ({"sampler": "ddim"}, ("sample.scheduler", "use euler")),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    runs: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        drawn(Demo(folder=runs), request(runs, **changes))
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


def test_a_demo_without_a_checkpoint_says_what_to_do(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(CliRunner().invoke(main, ["demo"]), "runs: no run with a checkpoint: run train first", alone=True)
    given = CliRunner().invoke(main, ["demo", "--run", str(runs / "untrained")])
    refuse(given, f"--run: no checkpoint in {runs / 'untrained'}/checkpoints", alone=True)


def test_a_port_that_is_taken_is_refused(runs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port = {port}: .*in use"):
            Server(Demo(folder=runs), port)


@contextmanager
def served(demo: Demo) -> Iterator[Server]:
    with Server(demo, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Server]:
    with served(Demo(folder=runs)) as server:
        yield server


def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> HTTPResponse:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, json.dumps(body), headers)
    return connection.getresponse()


def test_only_this_machine_and_only_our_page_are_answered(server: Server, runs: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    ours = f"http://127.0.0.1:{server.server_port}"
    assert ask(server, "GET", "/").status == 200
    assert ask(server, "POST", "/runs", {}, Origin=ours).status == 200
    assert ask(server, "GET", "/", Host="localhost:1").status == 200  # a port that ssh forwards
    assert ask(server, "GET", "/", Host="elsewhere.example").status == 403
    assert ask(server, "POST", "/draw", request(runs), Origin="https://elsewhere.example").status == 403
    assert ask(server, "POST", "/draw", request(runs), Origin="null").status == 403
    for method, path in (("GET", "/../pyproject.toml"), ("GET", "/draw"), ("POST", "/"), ("POST", "/nothing")):
        assert ask(server, method, path).status == 404


def test_an_error_is_the_last_line_of_the_answer(server: Server, runs: Path) -> None:
    lines = ask(server, "POST", "/draw", request(runs, steps=0)).read().splitlines()
    assert "sample.steps = 0" in json.loads(lines[-1])["error"]


def test_drawing_ends_when_the_page_is_closed(server: Server, runs: Path) -> None:
    answer = ask(server, "POST", "/draw", request(runs, steps=100_000))
    assert json.loads(answer.readline())["step"] == 1
    answer.close()
    assert json.loads(ask(server, "POST", "/draw", request(runs)).read().splitlines()[-1])["command"]  # not after hours


@pytest.fixture
def page(server: Server, tmp_path: Path) -> Iterator[Browser]:
    """The page in Chromium, when it is ready to draw; at the end it has reported no error and asked only for itself."""
    if not PROGRAM:
        pytest.skip("no Chromium is installed")
    browser = Browser(tmp_path / "browser")
    ours = f"http://127.0.0.1:{server.server_port}/"
    browser.send("Page.navigate", url=ours)
    wait(browser, "!of('draw').disabled")
    yield browser
    assert browser.errors == []
    assert ours in browser.requests
    assert all(url.startswith((ours, "data:")) for url in browser.requests)
    browser.close()


def wait(page: Browser, condition: str) -> None:
    end = time.monotonic() + 60
    while not page.run(condition):
        assert time.monotonic() < end, (condition, status(page), page.errors)
        time.sleep(0.05)


def status(page: Browser) -> str:
    return page.run("of('status').textContent")


def texts(page: Browser, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.textContent)")


def test_the_page_draws_images_with_their_denoising_and_the_command(page: Browser, runs: Path) -> None:
    assert texts(page, "#run option") == [str(runs / "first"), str(runs / "second")]
    assert texts(page, "#class option") == list(CLASSES)
    assert page.run("of('steps').value") == "2"
    for name, value in {**SETTINGS, "class": CLASSES[1]}.items():
        page.run(f"of({json.dumps(name)}).value = {json.dumps(value)}")
    page.click("#draw")
    wait(page, "!of('again').hidden && !drawing")
    assert f"{CLASSES[1]} in " in status(page)
    loaded = "Promise.all([...document.querySelectorAll('#grid img')].map((each) => each.decode().then(() => each)))"
    assert page.run(f"{loaded}.then((all) => all.map((each) => each.naturalWidth))") == [IMAGE_SIZE] * 3
    assert texts(page, "#strip figcaption") == ["step 1", "step 2", "step 3", "step 4", "image"]
    end = drawn(Demo(folder=runs), request(runs, **{"class": CLASSES[1]}))[-1]
    assert texts(page, "#command") == [end["command"]]
    page.click('.thumb[data-number="1"]')
    assert page.run("of('dialog').open")
    assert texts(page, "#name") == [f"{CLASSES[1]} 1"]
    saved = page.run("of('save').getAttribute('href')").removeprefix("data:image/png;base64,")
    assert np.abs(pixels(saved) - pixels(end["images"][1])).max() <= 1
    assert page.run("of('save').download") == "first-dog_fox_-seed7-1.png"
    page.press("ArrowRight", "ArrowRight")
    assert texts(page, "#name") == [f"{CLASSES[1]} 2"]
    page.press("Escape")
    assert not page.run("of('dialog').open")


def test_the_page_stops_drawing_and_shows_errors(page: Browser) -> None:
    page.run("of('steps').value = 100000")
    page.click("#draw")
    wait(page, "of('progress').value > 0")
    page.click("#draw")
    wait(page, "!drawing")
    assert status(page) == "Stopped."
    page.run("(of('steps').value = 2, of('sampler').append(new Option('ddim')), of('sampler').value = 'ddim')")
    page.click("#draw")
    wait(page, "!drawing")
    assert "ddim cannot sample a model trained on the flow schedule: use euler" in status(page)
    assert page.run("of('status').className") == "wrong"
    assert texts(page, ".thumb") == []
    page.run("(of('run').selectedIndex = 1, of('run').dispatchEvent(new Event('change')))")
    wait(page, "!of('draw').disabled")
    assert page.run("of('sampler').value") == "unipc"
