"""Runs that are interrupted, damaged, signalled, or go on in another way than they began."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from data.cache.reader import LatentCache
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.training.checkpoint import checkpoint_folders
from pipeline.training.distributed import in_background
from pipeline.training.trainer import Trainer
from stages.train import train
from tests.helpers.checkpoints import flip_a_byte, lose_the_state
from tests.helpers.training import interrupt, poison
from tests.helpers.world import World, log_of, make_vae, run_stage, succeed, tree


@pytest.fixture
def config(world: World) -> Config:
    config = load_config(world.config)
    assert config.model.dropout > 0  # the one draw that takes torch's global generator
    return config


@pytest.mark.parametrize("at_step", [2, 7, 11])  # before any checkpoint; after a log line; in the last steps
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    world: World, config: Config, tmp_path: Path, at_step: int
) -> None:
    run = tmp_path / "run"
    interrupt(config, run, at_step=at_step)
    torch.manual_seed(99)  # a new process has another state
    train(config, run)
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")
    assert tree(run / "previews") == tree(world.run / "previews")
    assert log_of(run) == log_of(world.run)
    assert len(log_of(run)) == 6


@pytest.mark.parametrize("damage", [flip_a_byte, lose_the_state])
def test_a_run_goes_on_from_an_older_checkpoint_where_the_newest_is_damaged(
    world: World,
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    run = tmp_path / "run"
    interrupt(config, run, at_step=9)
    damaged = run / "checkpoints" / "000000032"
    damage(damaged)
    before = tree(damaged)
    capsys.readouterr()
    train(config, run)
    printed = capsys.readouterr().out
    assert f"train: skipped {damaged}" in printed
    assert "at 16 images" in printed
    assert f"train: renamed to {damaged}.1: damaged" in printed
    assert tree(Path(f"{damaged}.1").rename(tmp_path / "aside")) == before
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")
    assert log_of(run) == log_of(world.run)


def test_a_run_without_dropout_can_be_interrupted_too(world: World, config: Config, tmp_path: Path) -> None:
    plain = config.changed(model=config.model.changed(dropout=0.0))
    train(plain, tmp_path / "straight")
    interrupt(plain, tmp_path / "broken", at_step=6)
    train(plain, tmp_path / "broken")
    straight = tree(tmp_path / "straight" / "checkpoints")
    assert straight == tree(tmp_path / "broken" / "checkpoints")
    assert straight != tree(world.run / "checkpoints")


def test_the_seed_changes_the_run(world: World, config: Config, tmp_path: Path) -> None:
    other = config.changed(train=config.train.changed(seed=1, images=8))
    same = config.changed(train=config.train.changed(images=8))
    train(other, tmp_path / "other")
    train(same, tmp_path / "same")
    assert log_of(tmp_path / "other")[0]["loss"] != log_of(tmp_path / "same")[0]["loss"]


def test_a_run_does_not_go_on_in_the_order_of_another_seed(world: World, tmp_path: Path) -> None:
    succeed("train", world.config, tmp_path, "train.images=16")
    result = run_stage("train", world.config, tmp_path, "train.seed=1")
    assert result.exit_code == 2
    assert "its train.seed is 0, this run has 1" in result.stderr


def test_a_longer_run_continues_a_finished_one(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.images=16")
    assert "continuing" in succeed("train", world.config, run, "train.images=24")
    assert [line["images_seen"] for line in log_of(run)] == [8, 16, 24]


def test_what_a_killed_save_left_behind_is_swept_away(world: World, tmp_path: Path) -> None:
    """That of a save on a signal is not overwritten by a later one, whose name is another."""
    for kind in ("checkpoints", "averages"):
        (tmp_path / kind / ".staged-000000007" / "ema").mkdir(parents=True)
        (tmp_path / kind / ".staged-000000007" / "ema" / "half.safetensors").write_bytes(b"half")
    succeed("train", world.config, tmp_path, "train.images=16")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000016"]
    assert not list((tmp_path / "averages").iterdir())


def test_a_log_line_that_a_crash_cut_off_is_dropped(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.images=16")
    with open(run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 5, "lo')
    succeed("train", world.config, run, "train.images=24")
    assert [line["images_seen"] for line in log_of(run)] == [8, 16, 24]


def test_a_streamed_run_goes_on_in_its_order_where_there_is_room_for_more(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.loader.WINDOW_ROWS", 20)
    steady = "train.decay=0"  # or the learning rate would depend on the end that is planned
    succeed("train", world.config, tmp_path / "straight", steady, "train.access=streamed")
    succeed("train", world.config, tmp_path / "broken", steady, "train.access=streamed", "train.images=16")
    succeed("train", world.config, tmp_path / "broken", steady)
    assert tree(tmp_path / "broken" / "checkpoints") == tree(tmp_path / "straight" / "checkpoints")
    result = run_stage("train", world.config, tmp_path / "broken", "train.images=96", "train.access=resident")
    assert result.exit_code == 2
    assert "started with another order of images: use train.access=streamed" in result.stderr


def change_the_vae(root: Path) -> tuple[str, ...]:
    make_vae(root / "another", seed=1)
    return (f"vae.source={root / 'another'}", f"cache.path={root / 'cache'}")


def change_the_size(root: Path) -> tuple[str, ...]:
    return ("data.image_size=32", "model.bottleneck=resnet", f"cache.path={root / 'cache'}")


@pytest.mark.parametrize("change", [change_the_vae, change_the_size])
def test_a_run_does_not_go_on_with_latents_of_another_kind(
    world: World, tmp_path: Path, change: Callable[[Path], tuple[str, ...]]
) -> None:
    """The pictures are the same, so their fingerprint is; the latents are not."""
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.images=16", "model.bottleneck=resnet")
    before = tree(run / "checkpoints")
    overrides = ("model.bottleneck=resnet", *change(tmp_path))
    succeed("encode", world.config, run, *overrides)
    result = run_stage("train", world.config, run, *overrides)
    assert result.exit_code == 2, result.output
    assert tree(run / "checkpoints") == before


@pytest.mark.parametrize("deferred", [False, True])
def test_a_loss_that_is_not_a_number_stops_the_run_before_the_update_and_names_the_image(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deferred: bool
) -> None:
    """Step 6 of a run that logs each second step: deferred, it is noticed at the line after step 6."""
    run = tmp_path / "run"
    trainers: list[Trainer] = []
    update = Trainer.train_step

    def watched(self: Trainer) -> None:
        trainers[:] = [self]
        update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", watched)
        patch.setattr(Trainer, "can_defer", lambda self: deferred)
        interrupt(config, tmp_path / "until", at_step=5)
        expected = {name: value.clone() for name, value in trainers[0].model.state_dict().items()}
        poison(patch, step=5, place=1)
        result = run_stage("train", world.config, run)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    cache = LatentCache(world.cache)
    image = trainers[0].loader.indices(5)[1]
    assert last.startswith("error: FloatingPointError: train: step 6: ")
    assert f"1 of the 4 images of process 0 ({cache.keys()[image]} of {cache.shard_of(image).file})" in last
    assert all(torch.equal(value, expected[name]) for name, value in trainers[0].model.state_dict().items())
    assert [folder.name for folder in checkpoint_folders(run)] == ["000000016"]
    assert "at 16 images" in succeed("train", world.config, run)
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")
    assert log_of(run) == log_of(world.run)


def test_a_signal_while_the_cache_is_still_verified_saves_nothing_and_waits_for_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = threading.Event()
    update = Trainer.train_step

    def signalled(self: Trainer) -> None:
        update(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    monkeypatch.setattr(LatentCache, "verify", lambda self: verified.wait(60))
    monkeypatch.setattr("pipeline.training.trainer._GRACE", 0.1)
    result = run_stage("train", world.config, tmp_path)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "SIGTERM: the cache is not verified yet, so nothing new is saved" in result.stdout
    assert checkpoint_folders(tmp_path) == []
    workers = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert all(thread.daemon for thread in workers if not thread.name.startswith("ThreadPoolExecutor"))
    verified.set()


@pytest.mark.parametrize("kind", [OSError, ValueError, MemoryError])
def test_whoever_waits_for_work_in_the_background_has_its_error(kind: type[Exception]) -> None:
    def fail() -> None:
        raise kind("in the background")

    with pytest.raises(kind, match="in the background"):
        in_background(fail).result(timeout=10)


def test_machines_that_would_read_in_different_orders_are_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = Accelerator.gather

    def of_two(self: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, ~tensor]) if tensor.dtype == torch.bool else gather(self, tensor)

    monkeypatch.setattr(Accelerator, "gather", of_two)
    result = run_stage("train", world.config, tmp_path)
    assert result.exit_code == 2
    assert "train.access = auto: " in result.stderr
