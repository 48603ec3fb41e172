"""Runs that begin with the weights of another, and averages of other widths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from stages.cli import main
from tests.helpers.checkpoints import flip_a_byte
from tests.helpers.world import CLASSES, World, make_images, run_stage, state_of, succeed, tree, weights_of


def test_fine_tuning_begins_with_the_average_of_another_run(world: World, tmp_path: Path) -> None:
    """At a learning rate of nearly 0 the weights stay where they began."""
    printed = succeed(
        "train", world.config, tmp_path, f"train.init={world.run}", "train.images=4", "train.lr=1e-12", "train.seed=5",
        "model.dropout=0",
    )  # fmt: skip
    assert (
        f"starting from the averaged weights and the normalisation of {world.run / 'checkpoints' / '000000048'}"
        in printed
    )
    assert "class embeddings" not in printed
    expected = weights_of(world.run, 48)
    assert all(torch.allclose(value, expected[name], atol=1e-9) for name, value in weights_of(tmp_path, 4).items())


def test_fine_tuning_on_other_classes_has_a_new_table_and_the_rest_of_the_weights(world: World, tmp_path: Path) -> None:
    make_images(tmp_path / "images", (*CLASSES, "owl"))
    overrides = (f"data.source={tmp_path / 'images'}", f"cache.path={tmp_path / 'cache'}")
    succeed("encode", world.config, tmp_path, *overrides)
    more = (f"train.init={world.run}", "train.images=4", "train.lr=1e-12")
    printed = succeed("train", world.config, tmp_path / "run", *overrides, *more)
    assert "3 classes, not its 2: new class embeddings" in printed
    ours, theirs = weights_of(tmp_path / "run", 4), weights_of(world.run, 48)
    table = "classes.weight"
    assert ours[table].shape[0] == 4
    assert torch.allclose(ours[table][-1], theirs[table][-1], atol=1e-9)  # the null class
    assert not torch.allclose(ours[table][0], theirs[table][0], atol=1e-3)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-9) for name in ours if name != table)
    succeed("sample", world.config, tmp_path / "run", *overrides)


def test_fine_tuning_keeps_the_normalisation_that_its_weights_know(world: World, tmp_path: Path) -> None:
    """The latents of other images have another mean; the model has learnt what the first ones mean."""
    make_images(tmp_path / "images", (*CLASSES, "owl"))
    overrides = (f"data.source={tmp_path / 'images'}", f"cache.path={tmp_path / 'cache'}", f"train.init={world.run}")
    succeed("encode", world.config, tmp_path, *overrides)
    expected = state_of(world.run, 48)["normalization"]
    for images in (16, 24):  # the second time it goes on
        succeed("train", world.config, tmp_path / "run", *overrides, f"train.images={images}")
        assert state_of(tmp_path / "run", images)["normalization"] == expected
    succeed("train", world.config, tmp_path / "anew", *overrides[:2], "train.images=16")
    assert state_of(tmp_path / "anew", 16)["normalization"] != expected


def test_fine_tuning_passes_over_a_damaged_checkpoint_aloud(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.run, tmp_path / "copy")
    flip_a_byte(tmp_path / "copy" / "checkpoints" / "000000048")
    printed = succeed("train", world.config, tmp_path / "run", f"train.init={tmp_path / 'copy'}", "train.images=4")
    assert "skipped" in printed
    assert "checkpoints/000000032" in printed


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.blocks=2", "model.blocks is 1, this run has 2"),
        ("noise.prediction=v", "noise.schedule is flow, this run has cosine"),
        ("train.init=nowhere", "no intact checkpoint in nowhere"),
    ],
)
def test_fine_tuning_from_another_kind_of_model_is_refused(
    world: World, tmp_path: Path, override: str, field: str
) -> None:
    more = ("noise.schedule=cosine", "sample.scheduler=ddpm") if "noise" in override else ()
    result = run_stage("train", world.config, tmp_path, f"train.init={world.run}", override, *more)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: train.init: ")
    assert field in result.stderr


# Averages of other widths.


def test_an_average_of_another_width_can_be_sampled_and_fine_tuned_but_not_continued(
    world: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.ema=power", "train.checkpoint_every=8", "train.keep=1")
    assert len(list((run / "averages").iterdir())) == 6
    result = CliRunner().invoke(main, ["ema", str(run), "--width", "0.05"])
    assert result.exit_code == 0, result.output
    made = tmp_path / "run-ema0.05"
    for name, value in weights_of(run, 48).items():  # the first of the two that are tracked
        assert torch.allclose(weights_of(made, 48)[name], value, atol=1e-5)
    succeed("sample", world.config, made)
    succeed("decode", world.config, made)
    succeed("train", world.config, tmp_path / "tuned", f"train.init={made}", "train.images=4")
    result = run_stage("train", world.config, made, "train.ema=power", "train.images=96")
    assert result.exit_code == 2
    assert "holds averaged weights only" in result.stderr


def test_an_average_is_never_written_over_a_run_or_hidden_by_a_later_one(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.ema=power", "train.checkpoint_every=16")
    before = tree(run)

    def ema(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["ema", str(run), "--width", "0.1", *arguments])

    assert "a run was trained there" in ema("--to", str(run)).stderr
    assert tree(run) == before
    assert ema().exit_code == 0
    assert "it holds an average at 48 images" in ema("--images", "32", "--to", str(tmp_path / "run-ema0.1")).stderr
    assert ema("--images", "32").exit_code == 0
    assert (tmp_path / "run-ema0.1-32" / "checkpoints" / "000000032").is_dir()
    (run / "averages" / "000000016" / "state.json").write_text("{}", encoding="utf-8")
    assert "skipped" in ema("--to", str(tmp_path / "without the first")).stdout
    (run / "averages" / "000000048" / "state.json").write_text("{}", encoding="utf-8")
    assert ema("--to", str(tmp_path / "without the last")).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--width", "0.05"], "train.ema=power"), (["--width", "0.5"], "width = 0.5: ")],
)
def test_an_average_that_cannot_be_made_is_refused(world: World, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["ema", str(world.run), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
