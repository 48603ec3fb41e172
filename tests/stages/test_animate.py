"""Animations: their ends are the samples that `sample` draws, they appear whole, and mistakes are one line."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from stages.animate import add_classes_between
from tests.helpers.checkpoints import scrambled_run
from tests.helpers.models import CLASSES, normals, scrambled
from tests.helpers.world import CLASSES as NAMES
from tests.helpers.world import IMAGE_SIZE, World, refuse, run_stage, sampled, succeed

SCALE = -(-96 // IMAGE_SIZE)
TILE = SCALE * IMAGE_SIZE


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    return scrambled_run(world.run, tmp_path / "run")


def animated(run: Path) -> Path:
    (path,) = (run / "animations").glob("*.webp")
    return path


def frames_of(path: Path, count: int) -> NDArray[np.int16]:
    """The first `count` images, at most five, of every frame, at their own size: `F N H W 3`."""
    frames = []
    with Image.open(path) as film:
        for number in range(film.n_frames):
            film.seek(number)
            pixels = np.asarray(film.convert("RGB")).astype(np.int16)
            tiles = [pixels[22 : 22 + TILE, 2 + x : 2 + x + TILE] for x in range(0, count * (TILE + 2), TILE + 2)]
            frames.append(np.stack([tile[::SCALE, ::SCALE] for tile in tiles]))
    return np.stack(frames)


@pytest.mark.parametrize(
    ("overrides", "evaluations"),
    [
        (("sample.steps=7",), 7),
        (("sample.steps=7", "sample.batch_size=1"), 7),
        (("sample.scheduler=heun", "sample.steps=3"), 5),
        (("sample.scheduler=unipc", "sample.steps=4"), 4),
        (("sample.scheduler=euler_ancestral", "sample.steps=4"), 4),
    ],
)
def test_denoising_ends_in_the_samples(world: World, run: Path, overrides: tuple[str, ...], evaluations: int) -> None:
    printed = succeed("animate", world.config, run, *overrides)
    path = animated(run)
    assert printed.splitlines()[-1].startswith(f"animate: {evaluations} frames in {path}, ")
    frames = frames_of(path, 2)
    assert len(frames) == evaluations
    assert np.abs(frames[-1] - sampled(world, run, *overrides, "sample.per_class=1")).max() <= 1
    changes = [np.abs(frame - frames[-1]).mean() for frame in frames]
    assert changes[0] > changes[-2] > 0


def test_of_many_steps_some_are_shown_the_first_and_the_last_among_them(world: World, run: Path) -> None:
    succeed("animate", world.config, run, "sample.steps=9")
    every = frames_of(animated(run), 2)
    shutil.rmtree(run / "animations")
    succeed("animate", world.config, run, "sample.steps=9", more=("--frames", "3"))
    assert np.array_equal(frames_of(animated(run), 2), every[[0, 4, 8]])


@pytest.mark.parametrize(
    "settings", [("scheduler=euler",), ("scheduler=euler_ancestral",), ("start=0.9", "start_from")]
)
def test_between_two_seeds_the_ends_are_their_samples(world: World, run: Path, settings: tuple[str, ...]) -> None:
    given = ("sample.batch_size=3", *(f"sample.{each}".replace("_from", f"_from={world.cache}") for each in settings))
    succeed("animate", world.config, run, *given, more=("--between-seeds", "3", "8", "--frames", "5"))
    frames = frames_of(animated(run), 2)
    assert len(frames) == 5
    for frame, seed in ((0, 3), (-1, 8)):
        expected = sampled(world, run, *given, f"sample.seed={seed}", "sample.per_class=1")
        assert np.abs(frames[frame] - expected).max() <= 1
    way = [np.abs(frame - frames[0]).mean() for frame in frames]
    assert way == sorted(way)


def test_between_two_classes_the_ends_are_their_samples(world: World, run: Path) -> None:
    given = ("sample.steps=3", "sample.guidance_by_class={cat: 6}")
    succeed("animate", world.config, run, *given, more=("--between-classes", *NAMES, "--frames", "4"))
    frames = frames_of(animated(run), 5)
    assert len(frames) == 4
    for frame, kind in ((0, 0), (-1, 1)):
        expected = sampled(world, run, *given, f"sample.classes={kind}", "sample.per_class=5")
        assert np.abs(frames[frame] - expected).max() <= 1
    assert np.abs(frames[0] - frames[1]).max() > 1


def test_a_class_between_two_is_added_to_a_model_that_stays_the_same() -> None:
    model, x = scrambled(), normals(4, 4, 4, 4)
    timestep = torch.tensor(300.0)
    labels = torch.tensor([0, 1, 2, CLASSES])
    with torch.no_grad():
        before = model(x, timestep, labels).sample
        middle = (model.classes.weight[0] + model.classes.weight[2]) / 2
        add_classes_between(model, (0, 2), torch.tensor([0.0, 0.5, 1.0]))
        assert torch.equal(model(x, timestep, labels).sample, before)
        assert model.null_class == CLASSES
        added = model(x[:1].expand(3, -1, -1, -1), timestep, CLASSES + 1 + torch.arange(3)).sample
        ends = model(x[:1].expand(2, -1, -1, -1), timestep, torch.tensor([0, 2])).sample
        torch.testing.assert_close(added[[0, 2]], ends)
        model.classes.weight[1] = middle
        torch.testing.assert_close(added[1:2], model(x[:1], timestep, torch.tensor([1])).sample)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_the_first_and_the_last_frame_are_held_and_it_never_ends(world: World, run: Path, suffix: str) -> None:
    path = run / f"film{suffix}"
    succeed("animate", world.config, run, "sample.steps=4", more=("--to", str(path)))
    with Image.open(path) as film:
        assert (film.n_frames, film.info["loop"]) == (4, 0)
        times = []
        for number in range(4):
            film.seek(number)
            film.load()
            times.append(film.info["duration"])
    assert times == [1500, 100, 100, 1500]
    assert Image.open(run / "film.png").width > 4 * TILE
    assert not (run / "animations").exists()


def test_a_finished_animation_stays_and_another_one_lies_beside_it(world: World, run: Path) -> None:
    options = ("--between-seeds", "0", "1", "--frames", "3")
    succeed("animate", world.config, run, more=options)
    path = animated(run)
    before = path.stat().st_mtime_ns
    for given in ((), ("sample.batch_size=3", "sample.per_class=2")):
        assert succeed("animate", world.config, run, *given, more=options) == f"animate: all done: {path}\n"
    assert path.stat().st_mtime_ns == before
    succeed("animate", world.config, run, more=("--between-seeds", "0", "2", "--frames", "3"))
    succeed("animate", world.config, run, "sample.guidance=1", more=options)
    assert sorted(file.suffix for file in (run / "animations").iterdir()) == [".png"] * 3 + [".webp"] * 3


def test_an_animation_that_is_not_complete_does_not_replace_the_last_one(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--to", str(run / "new" / "film.gif"))
    succeed("animate", world.config, run, more=options)
    before = {file.name: file.read_bytes() for file in (run / "new").iterdir()}
    assert sorted(before) == ["film.gif", "film.png"]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert run_stage("animate", world.config, run, "sample.seed=1", more=options).exit_code == 1
    assert {file.name: file.read_bytes() for file in (run / "new").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--between-seeds", "1", "1"), "--between-seeds 1 1: give two different seeds"),
        (("--between-classes", "cat", "cow"), "--between-classes: no class 'cow': choose from 'cat', "),
        (("--between-classes", "cat", "0"), "--between-classes: both are 'cat': give two different classes"),
        (("--between-classes", "0", "1", "--between-seeds", "0", "1"), "--between-classes: give one of them"),
        (("--to", "film.mp4"), "--to = film.mp4: give a name that ends in .webp or .gif"),
        (("--set", "sample.scheduler=ddim"), "sample.scheduler: ddim cannot sample a model trained on the flow"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_draws_nothing(world: World, run: Path, options: tuple[str, ...], said: str) -> None:
    refuse(run_stage("animate", world.config, run, more=options), said, alone=True)
    assert not (run / "animations").exists()


def test_between_classes_there_are_no_images_to_start_from(world: World, run: Path) -> None:
    given = (f"sample.start_from={world.cache}", "sample.start=0.5")
    result = run_stage("animate", world.config, run, *given, more=("--between-classes", "0", "1"))
    refuse(result, "between two classes there are no images: set sample.start_from to null", alone=True)
