"""A sweep: its cells are the samples that `sample` draws, its picture appears whole, and mistakes are one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config_file import load_config
from stages import sample as sample_stage
from stages.sample import require_checkpoint
from stages.sweep import draw_cells, make_cells, read_axes
from tests.helpers.checkpoints import scrambled_run
from tests.helpers.world import IMAGE_SIZE, World, refuse, run_stage, sampled, succeed, train_on

TILE = -(-96 // IMAGE_SIZE) * IMAGE_SIZE


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    return scrambled_run(world.run, tmp_path / "run")


@pytest.mark.parametrize(
    ("rows", "columns", "overrides"),
    [
        ("guidance=0,1,3", "steps=1,3", ()),
        ("class=all", "seed=0,5", ()),
        ("scheduler=heun,euler_ancestral", "classes=1,cat", ()),
        ("guidance_form=cfg,apg,cfg_zero", "guidance=0,2", ()),
        ("guidance_interval=null,[0.2,3]", "eta=0,1", ("sample.scheduler=euler",)),
        ("class=all", "shift=1,3", ("sample.guidance_by_class={cat: 4}",)),
    ],
)
def test_a_cell_is_the_first_sample_of_these_settings(
    world: World, run: Path, rows: str, columns: str, overrides: tuple[str, ...]
) -> None:
    checkpoint, config = require_checkpoint(run), load_config(world.config, overrides)
    axes = read_axes(checkpoint, rows, columns)
    cells = draw_cells(config, checkpoint, make_cells(config, checkpoint, axes, 0)).astype(np.int16)
    pairs = [(row, column) for row in axes[0].values for column in axes[1].values]
    assert len(cells) == len(pairs)
    for cell, (row, column) in zip(cells, pairs, strict=True):
        given = {"classes": "0", "per_class": "1"} | {
            {"class": "classes"}.get(axis.key, axis.key): value for axis, value in zip(axes, (row, column), strict=True)
        }
        settings = [f"sample.{key}={value}" for key, value in given.items()]
        (image,) = sampled(world, run, *overrides, *settings)
        assert np.abs(cell - image).max() <= 1, settings
    assert len({cell.tobytes() for cell in cells}) >= len(cells) / 2


def test_images_to_start_from_are_those_of_sample(world: World, run: Path) -> None:
    overrides = (f"sample.start_from={world.cache}", "sample.start=0.5")
    checkpoint, config = require_checkpoint(run), load_config(world.config, overrides)
    axes = read_axes(checkpoint, "class=all", "start=0.2,0.5")
    cells = draw_cells(config, checkpoint, make_cells(config, checkpoint, axes, 0)).astype(np.int16)
    for cell, kind in ((cells[1], 0), (cells[3], 1)):
        (image,) = sampled(world, run, *overrides, f"sample.classes={kind}", "sample.per_class=1")
        assert np.abs(cell - image).max() <= 1


def test_the_picture_has_the_cells_in_their_places_and_enlarged(world: World, run: Path) -> None:
    printed = succeed("sweep", world.config, run, more=("--rows", "class=all", "--columns", "steps=1,2,4,5,6"))
    (path,) = (run / "sweeps").iterdir()
    assert printed.splitlines()[-1] == f"sweep: 10 samples in {path}"
    picture = np.asarray(Image.open(path)).astype(np.int16)
    for row in range(2):
        for column, steps in enumerate((1, 2, 4, 5, 6)):
            bottom = len(picture) - 2 - (1 - row) * (TILE + 2)
            right = picture.shape[1] - 2 - (4 - column) * (TILE + 2)
            cell = picture[bottom - TILE : bottom, right - TILE : right]
            given = (f"sample.classes={row}", f"sample.steps={steps}", "sample.per_class=1")
            enlarged = sampled(world, run, *given)[0].repeat(TILE // IMAGE_SIZE, 0).repeat(TILE // IMAGE_SIZE, 1)
            assert np.abs(cell - enlarged).max() <= 1


def test_cells_that_share_the_other_settings_are_drawn_in_one_batch(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    original = sample_stage.draw_samples

    def counting(*args: object, **options: object) -> object:
        drawn.append(len(options["scales"]))
        return original(*args, **options)

    monkeypatch.setattr(sample_stage, "draw_samples", counting)
    succeed(
        "sweep",
        world.config,
        run,
        "sample.batch_size=50",
        more=("--rows", "guidance=1,2,3,4", "--columns", "steps=1,2"),
    )
    assert drawn == [4, 4]


def test_without_options_guidance_is_compared_with_steps(world: World, run: Path) -> None:
    succeed("sweep", world.config, run)
    (path,) = (run / "sweeps").iterdir()
    assert path.name.startswith("48-guidance-steps-")
    checkpoint = require_checkpoint(run)
    keys = [
        [axis.key for axis in read_axes(checkpoint, *given)]
        for given in ((None, "guidance=1"), ("steps=1", None), (None, "class=all"), ("seed=1", None))
    ]
    assert keys == [["steps", "guidance"], ["steps", "guidance"], ["guidance", "class"], ["seed", "steps"]]


def test_where_guidance_has_no_effect_seeds_are_compared(world: World, tmp_path: Path) -> None:
    given = train_on(world, tmp_path, ("cat",))
    succeed("sweep", world.config, tmp_path / "run", *given)
    (path,) = (tmp_path / "run" / "sweeps").iterdir()
    assert path.name.startswith("8-seed-steps-")
    result = run_stage("sweep", world.config, tmp_path / "run", *given, more=("--rows", "guidance=1,2"))
    refuse(result, "guidance=2 steps=5: there is only one class, so guidance has no effect: give another key")


def test_an_axis_does_not_bring_in_a_null_class_that_was_never_trained(world: World, tmp_path: Path) -> None:
    given = train_on(world, tmp_path, ("cat", "dog"), "train.label_dropout=0")
    axes = ("--rows", "guidance_form=cfg,cfg++", "--columns", "scheduler=euler")
    result = run_stage("sweep", world.config, tmp_path / "run", *given, more=axes)
    refuse(result, "sample.guidance_form = cfg++ needs the null class, which was never trained")


def test_guidance_on_an_axis_is_that_of_every_class(world: World, run: Path) -> None:
    checkpoint = require_checkpoint(run)
    config = load_config(world.config, ["sample.guidance_by_class={cat: 4}"])

    def scales(rows: str) -> list[float]:
        axes = read_axes(checkpoint, rows, "class=all")
        return [cell.scale for cell in make_cells(config, checkpoint, axes, 0)]

    assert scales("guidance=1,3") == [1, 1, 3, 3]
    assert scales("seed=1,3") == [4, 2, 4, 2]


def test_a_finished_picture_stays_and_other_settings_have_another(world: World, run: Path) -> None:
    options = ("--columns", "steps=1,2")
    succeed("sweep", world.config, run, more=options)
    (path,) = (run / "sweeps").iterdir()
    before = path.stat().st_mtime_ns
    for given in ((), ("sample.batch_size=3", "sample.per_class=2")):
        assert succeed("sweep", world.config, run, *given, more=options) == f"sweep: all done: {path}\n"
    assert path.stat().st_mtime_ns == before
    for overrides, more in ((("sample.seed=1",), options), ((), ("--columns", "steps=1,3"))):
        succeed("sweep", world.config, run, *overrides, more=more)
    assert len(list((run / "sweeps").iterdir())) == 3


def test_a_picture_that_is_not_complete_does_not_replace_the_last_one(
    world: World, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--columns", "steps=1", "--to", str(tmp_path / "new" / "sweep.png"))
    succeed("sweep", world.config, run, more=options)
    (path,) = (tmp_path / "new").iterdir()
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert run_stage("sweep", world.config, run, "sample.seed=1", more=options).exit_code == 1
    assert path.read_bytes() == before
    assert list((tmp_path / "new").iterdir()) == [path]
    succeed("sweep", world.config, run, "sample.seed=1", more=options)
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rows", "guidnce=1,2"), "guidnce=1 steps=5: unknown key sample.guidnce: did you mean sample.guidance?"),
        (("--rows", "guidance=1,-2"), "guidance=-2 steps=5: sample.guidance = -2: Input should be"),
        (("--columns", "steps=2,many"), "guidance=1 steps=many: sample.steps = 'many': Input should be"),
        (("--rows", "class=cat,cow"), "--rows: no class 'cow': choose from 'cat', "),
        (("--columns", "class=7"), "--columns: no class '7': choose from 'cat', "),
        (("--rows", "scheduler=euler,ddim"), "sample.scheduler: ddim cannot sample a model trained on the flow"),
        (("--rows", "scheduler=heun", "--columns", "eta=0,1"), "scheduler=heun eta=1: sample: eta = 1 is only"),
        (("--rows", "guidance=1", "--columns", "sample.guidance=2"), "guidance is also the key of the rows"),
        (("--rows", "guidance"), "--rows guidance: give KEY=V1,V2,..., such as guidance=1,2,3"),
        (("--rows", "guidance="), "--rows guidance=: give KEY=V1,V2,..., such as guidance=1,2,3"),
        (("--rows", "=1,2"), "--rows =1,2: give KEY=V1,V2,..., such as guidance=1,2,3"),
        (("--rows", "guidance=[1,2"), "--rows guidance=[1,2: "),
        (("--rows", "per_class=1,2"), "--rows per_class=1,2: per_class does not change a sample"),
        (("--rows", "seed=" + ",".join(["1"] * 101)), "--rows: 101 values: give at most 100"),
        (("--to", "picture.jpg"), "--to = picture.jpg: give a name that ends in .png"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_draws_nothing(world: World, run: Path, options: tuple[str, ...], said: str) -> None:
    refuse(run_stage("sweep", world.config, run, more=options), said, alone=True)
    assert not (run / "sweeps").exists()


def test_a_run_that_is_not_trained_has_no_sweep(world: World, tmp_path: Path) -> None:
    refuse(run_stage("sweep", world.config, tmp_path), "no checkpoint in", "run train first", alone=True)
