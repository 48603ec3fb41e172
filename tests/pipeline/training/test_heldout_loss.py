"""The loss on held-out images: its draws, what it comes to where that can be computed, and how a run logs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import pipeline.training.heldout_loss
from data.cache.manifest import Manifest
from pipeline.config import Config, heldout_path
from pipeline.config_file import load_config
from pipeline.latents import Normalization
from pipeline.noise import LEVELS, NoiseProcess, noise_level
from pipeline.training.checkpoint import newest_checkpoint
from pipeline.training.heldout_loss import DRAWS, HeldOut, drawn_images, heldout_draws
from pipeline.training.plots import draw_curves
from pipeline.training.setup import build_model, open_heldout
from stages.train import train
from tests.helpers.models import scrambled
from tests.helpers.training import interrupt
from tests.helpers.world import World, log_of, make_images, run_stage, succeed, tree

PROCESSES = [
    NoiseProcess("flow", "flow", "uniform"),
    NoiseProcess("flow", "flow", "logit_normal"),
    NoiseProcess("flow", "flow", "logit_normal", shift=3.0),
    NoiseProcess("cosine", "epsilon", "logit_normal"),
    NoiseProcess("linear", "v"),
    NoiseProcess("scaled_linear", "x0"),
]
AS_IT_IS = Normalization((0.0,) * 4, (1.0,) * 4)
SHAPE = (4, 8, 8)


class Known(nn.Module):
    """A stand-in for the model that predicts `predict(x, times)`."""

    null_class, device = 2, torch.device("cpu")

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._predict = predict

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self._predict(x, times))


def held_out(noise: NoiseProcess, *, mean: float, std: float, labels: Tensor | None = None) -> HeldOut:
    """Of images all of whose latents have one posterior."""
    moments = torch.tensor([mean] * 4 + [std] * 4)[:, None, None].expand(DRAWS, 2, 8, *SHAPE[1:])
    labels = torch.arange(DRAWS) % 2 if labels is None else labels
    return HeldOut(moments, labels, noise=noise, channels=4, cache="f" * 64)


def measure(held: HeldOut, model: Any, normalization: Normalization = AS_IT_IS) -> tuple[float, list[float]]:
    values = held.measure(model, normalization)
    return values["heldout_loss"], values["heldout_loss_by_noise"]


# The draws.


@pytest.mark.parametrize("noise", PROCESSES, ids=str)
def test_every_level_of_noise_has_its_share_of_draws_in_an_order_of_its_own(noise: NoiseProcess) -> None:
    times = heldout_draws(noise, SHAPE).times
    filled = noise_level(times).bincount()
    assert len(filled) == LEVELS
    assert filled.max() - filled.min() <= 1
    assert abs(np.corrcoef(times.numpy(), np.arange(DRAWS))[0, 1]) < 0.1
    if noise.schedule != "flow":
        assert torch.equal(times, times.floor())
        assert times.max() == 999


def test_draws_share_nothing_and_are_the_same_whatever_is_drawn_beside_them() -> None:
    one, other = (heldout_draws(PROCESSES[1], shape) for shape in (SHAPE, (4, 2, 2)))
    torch.manual_seed(1)
    again = heldout_draws(PROCESSES[2], SHAPE)
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.posterior, again.posterior)
    assert torch.equal(one.times, other.times)
    assert abs(np.corrcoef(one.noise.flatten().numpy(), one.posterior.flatten().numpy())[0, 1]) < 0.01
    assert not one.views.any()
    assert not one.dropped.any()


@pytest.mark.parametrize("count", [1, 3, 11, 1000, 1023, 1024, 1025, 3000, 50_000])
def test_all_images_are_drawn_alike_often_or_some_at_equal_distances(count: int) -> None:
    images = drawn_images(count)
    assert len(images) == DRAWS
    assert 0 <= images.min() <= images.max() < count
    drawn = np.bincount(images, minlength=count)
    assert drawn.max() <= -(-DRAWS // count)
    if count <= DRAWS:
        assert drawn.min() >= DRAWS // count
    else:
        gaps = np.diff(images)
        assert gaps.max() - gaps.min() <= 1
        assert images[-1] >= count - gaps.max() - 1


@pytest.mark.parametrize("noise", PROCESSES, ids=str)
def test_the_density_of_timesteps_is_that_of_the_draws(noise: NoiseProcess) -> None:
    drawn = noise.draw_timesteps(200_000, torch.Generator().manual_seed(0))
    shares = noise_level(drawn).bincount() / len(drawn)
    grid = noise.timesteps_at((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    density = noise_level(grid).bincount(noise.timestep_density(grid)) / len(grid)
    assert density.sum() == pytest.approx(1, abs=1e-4)
    assert density.tolist() == pytest.approx(shares.tolist(), abs=4e-3)
    assert noise.timestep_density(noise.timesteps_at(torch.tensor([0.0, 1.0]))).isfinite().all()


# The loss.


@pytest.mark.parametrize("noise", PROCESSES, ids=str)
def test_the_best_model_of_gaussian_latents_has_the_loss_that_can_be_computed(noise: NoiseProcess) -> None:
    """Of normalised latents N(0, 1), the prediction's part that is told by the noisy latents, and the rest."""

    def coefficients(times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x_t: alpha and sigma; and the best prediction's factor before it."""
        alpha, sigma = noise.coefficients(times)
        target = {"flow": sigma - alpha, "epsilon": sigma, "x0": alpha, "v": torch.zeros_like(alpha)}
        return alpha, sigma, target[noise.prediction] / (alpha**2 + sigma**2)

    model = Known(lambda x, times: coefficients(times)[2] * x)
    total, by_noise = measure(held_out(noise, mean=3, std=2), model, Normalization((3.0,) * 4, (2.0,) * 4))
    times = noise.draw_timesteps(400_000, torch.Generator().manual_seed(0))
    alpha, sigma, factor = (each.flatten() for each in coefficients(times))
    variance = 2 if noise.prediction == "flow" else 1
    expected = variance - factor**2 * (alpha**2 + sigma**2)
    level = noise_level(times)
    levels = level.bincount(expected) / level.bincount()
    assert total == pytest.approx(float(expected.mean()), rel=0.02)
    assert by_noise == pytest.approx(levels.tolist(), rel=0.05, abs=2e-3)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_the_loss_is_the_mean_over_the_timesteps_that_a_run_draws(timesteps: str) -> None:
    """Of latents 0, noise is told exactly: a prediction that is wrong by t has the error t squared."""
    noise = NoiseProcess("flow", "flow", timesteps)
    model = Known(lambda x, times: (x / (times / 1000)[:, None, None, None]) + (times / 1000)[:, None, None, None])
    total, by_noise = measure(held_out(noise, mean=0, std=0), model)
    share = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = share if timesteps == "uniform" else torch.special.ndtri(share).sigmoid()
    level = noise_level(t * 1000)
    assert total == pytest.approx(float(t.square().mean()), rel=1e-3)
    assert by_noise == pytest.approx((level.bincount(t.square()) / level.bincount()).tolist(), rel=0.01)


def test_two_measurements_are_equal_and_the_parts_that_a_model_takes_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, model = held_out(PROCESSES[1], mean=0.3, std=0.8), scrambled(sample_size=8)
    total, by_noise = measure(held, model)
    assert measure(held, model) == (total, by_noise)
    monkeypatch.setattr(pipeline.training.heldout_loss, "_ROWS", 100)
    cut = measure(held, model)
    assert cut[0] == pytest.approx(total, rel=1e-5)
    assert cut[1] == pytest.approx(by_noise, rel=1e-5)


def test_images_without_a_class_are_of_the_null_class() -> None:
    model = scrambled(sample_size=8)
    losses = [
        measure(held_out(PROCESSES[1], mean=0.3, std=0.8, labels=torch.full((DRAWS,), label)), model)
        for label in (-2, model.null_class, 0)
    ]
    assert losses[0] == losses[1] != losses[2]


# A run.


@pytest.fixture(scope="module")
def caches(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the world's cache, and the held-out one beside it."""
    root = tmp_path_factory.mktemp("caches")
    shutil.copytree(world.cache, root / "cache")
    make_images(root / "images")
    for number, file in enumerate(sorted((root / "images").rglob("*.png"))):
        Image.new("RGB", (16, 16), (20 * number, 255 - 20 * number, 128)).save(file)
    others = (f"data.source={root / 'images'}", f"cache.path={root / 'cache-heldout'}")
    succeed("encode", world.config, root / "run", *others)
    return root


def settings(caches: Path, *more: str) -> tuple[str, ...]:
    return (f"cache.path={caches / 'cache'}", "data.heldout=others", "train.preview_every=12", *more)


def config_of(world: World, caches: Path) -> Config:
    return load_config(world.config, settings(caches))


@pytest.fixture(scope="module")
def logged(world: World, caches: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing disturbs, and what it printed."""
    run = tmp_path_factory.mktemp("logged") / "run"
    return run, succeed("train", world.config, run, *settings(caches, "train.tracker=tensorboard"))


def test_a_run_logs_the_held_out_loss_at_every_preview_and_learns_the_same(
    world: World, caches: Path, logged: tuple[Path, str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, printed = logged
    log = log_of(run)
    held = [line for line in log if "heldout_loss" in line]
    assert [line["images_seen"] for line in held] == [12, 24, 36, 48]
    assert [line for line in log if line not in held] == log_of(world.run)
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")
    for line in held:
        assert line.keys() == {"step", "images_seen", "heldout_loss", "heldout_loss_by_noise", "heldout_cache"}
        assert line["heldout_cache"] == Manifest.load(caches / "cache-heldout").sha256()
        assert len(line["heldout_loss_by_noise"]) == LEVELS
        assert f"train: {line['images_seen']} of 48 images   held-out loss {line['heldout_loss']:.4f}\n" in printed
    assert held[-1]["heldout_loss"] < held[0]["heldout_loss"]
    assert "train: held-out loss on 1,024 fixed draws from 12 images, " in printed
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for name, key in (("heldout_loss", None), ("heldout_loss_by_noise/9", 9)):
        values = [line["heldout_loss"] if key is None else line["heldout_loss_by_noise"][key] for line in held]
        events = [(event.step, event.value) for event in board.Scalars(name)]
        assert events == list(zip([12, 24, 36, 48], map(pytest.approx, values), strict=True))


def test_the_last_line_is_what_the_exported_average_has(world: World, caches: Path, logged: tuple[Path, str]) -> None:
    """Computed anew from the checkpoint, whatever the seed of the run."""
    config = config_of(world, caches)
    checkpoint, _ = newest_checkpoint(logged[0])
    assert checkpoint
    manifest = Manifest.load(caches / "cache")
    model = build_model(config, manifest)
    model.load_state_dict(checkpoint.ema_weights())
    model.eval().to(memory_format=torch.channels_last)
    for seed in (0, 7):
        seeded = config.changed(train=config.train.changed(seed=seed))
        held = open_heldout(seeded, manifest, NoiseProcess(**config.noise.model_dump()))
        assert held
        measured = held.measure(model, checkpoint.normalization)
        assert measured == {key: value for key, value in log_of(logged[0])[-1].items() if key in measured}


def test_a_run_that_was_interrupted_logs_what_one_that_was_not_does(
    world: World, caches: Path, logged: tuple[Path, str], tmp_path: Path
) -> None:
    """It stops at 40 images, after a line at 36, and goes on from a checkpoint at 32."""
    interrupt(config_of(world, caches), tmp_path, at_step=10)
    assert log_of(tmp_path)[-2]["images_seen"] == 36
    train(config_of(world, caches), tmp_path)
    assert log_of(tmp_path) == log_of(logged[0])
    assert tree(tmp_path / "checkpoints") == tree(logged[0] / "checkpoints")


def test_a_log_that_lacks_lines_is_told_by_those_of_training(
    world: World, caches: Path, logged: tuple[Path, str], tmp_path: Path
) -> None:
    """Those of held-out images at the same place do not stand for them."""
    run = Path(shutil.copytree(logged[0], tmp_path / "run"))
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(line for line in lines if "heldout_loss" in line), encoding="utf-8")
    printed = succeed("train", world.config, run, *settings(caches, "train.images=56"))
    assert (
        f"train: {run / 'log.jsonl'}: lines are missing: that at 48 images, and perhaps others before it\n" in printed
    )


def test_other_held_out_images_are_told_by_the_lines(
    world: World, caches: Path, logged: tuple[Path, str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(logged[0], tmp_path / "run"))
    for name in ("cache", "cache-heldout"):
        shutil.copytree(world.cache, tmp_path / name)
    succeed("train", world.config, run, *settings(tmp_path, "train.images=56"))
    held = [line["heldout_cache"] for line in log_of(run) if "heldout_loss" in line]
    others = Manifest.load(world.cache).sha256()
    assert held == [held[0]] * 4 + [others]
    assert held[0] != others


def test_the_curves_show_it_beside_the_training_loss(logged: tuple[Path, str], tmp_path: Path) -> None:
    lines = (logged[0] / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    orange = []
    for kept in (lines, [line for line in lines if "heldout_loss" not in line]):
        (tmp_path / "log.jsonl").write_text("".join(kept), encoding="utf-8")
        draw_curves(tmp_path)
        picture = Image.open(tmp_path / "curves.png").convert("RGB")
        assert picture.size == (1200, 700)
        colors = {color: count for count, color in picture.crop((0, 0, 560, 350)).getcolors(2**20) or []}
        assert colors[31, 119, 180] > 100
        orange.append(colors.get((255, 127, 14), 0))
    assert orange[0] > 50
    assert orange[1] == 0


# What is refused.


def no_cache(root: Path) -> None:
    shutil.rmtree(root / "cache-heldout")


def other_vae(root: Path) -> None:
    manifest = Manifest.load(root / "cache-heldout")
    vae = manifest.vae.changed(weights_sha256="0" * 64)
    manifest.changed(vae=vae).save(root / "cache-heldout")


def other_classes(root: Path) -> None:
    manifest = Manifest.load(root / "cache-heldout")
    manifest.changed(classes=("cat", "owl")).save(root / "cache-heldout")


def damaged(root: Path) -> None:
    file = root / "cache-heldout" / Manifest.load(root / "cache-heldout").shards[0].file
    payload = bytearray(file.read_bytes())
    payload[len(payload) // 2] ^= 1
    file.write_bytes(payload)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_cache, "data.heldout = others: no finished cache of these images at {}: run encode first"),
        (other_vae, "{}/manifest.json: its vae is '000000"),
        (other_classes, "{}/manifest.json: its classes is ('cat', 'owl'), that of "),
        (damaged, "damaged: its SHA-256 is not the recorded one"),
    ],
)
def test_held_out_latents_that_are_not_there_or_of_another_kind_are_refused_in_one_line(
    world: World, caches: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    for name in ("cache", "cache-heldout"):
        shutil.copytree(caches / name, tmp_path / name)
    change(tmp_path)
    result = run_stage("train", world.config, tmp_path / "run", *settings(tmp_path))
    assert result.exit_code == 2
    assert words.format(tmp_path / "cache-heldout") in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_held_out_latents_of_another_shape_are_refused(world: World, caches: Path, tmp_path: Path) -> None:
    shutil.copytree(caches / "cache", tmp_path / "cache")
    succeed("encode", world.config, tmp_path, f"cache.path={tmp_path / 'cache-heldout'}", "cache.store=mean")
    result = run_stage("train", world.config, tmp_path / "run", *settings(tmp_path))
    assert result.exit_code == 2
    assert "its shape is (4, 4, 4), that of" in result.stderr
    assert f"is (8, 4, 4): delete {tmp_path / 'cache-heldout'} and run encode again\n" in result.stderr


def test_the_held_out_cache_lies_beside_that_of_training(world: World, caches: Path) -> None:
    assert heldout_path(config_of(world, caches)) == caches / "cache-heldout"
    assert heldout_path(load_config(world.config)) is None
