"""All four stages by the command line, on a dozen pictures."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL
from PIL import Image

from data.cache.reader import LatentCache
from data.storage import sha256_file
from pipeline.training.checkpoint import newest_checkpoint
from pipeline.vae import to_images, to_pixels
from stages.cli import main
from tests.helpers import world as helpers
from tests.helpers.imports import ROOT
from tests.helpers.world import (
    BROKEN,
    CLASSES,
    IMAGE_SIZE,
    World,
    make_images,
    make_vae,
    page_data,
    run_stage,
    succeed,
    tree,
)

refuse = functools.partial(helpers.refuse, alone=True)

STAGES = ("encode", "train", "sample", "decode")


def copy(world: World, tmp_path: Path) -> Path:
    """A copy of the run, for a test to change."""
    return Path(shutil.copytree(world.run, tmp_path / "run"))


def test_the_cache_holds_every_image_but_the_broken_one(world: World) -> None:
    cache = LatentCache(world.cache)
    assert cache.keys() == [f"{name}/{i}.png" for name in CLASSES for i in range(6) if f"{name}/{i}.png" != BROKEN]
    assert cache.labels.tolist() == [0] * 5 + [1] * 6
    assert [failure["key"] for failure in cache.lines("failures.jsonl")] == [BROKEN]
    assert "1 image could not be read" in world.printed["encode"]
    assert BROKEN in world.printed["encode"]


def test_two_encodes_write_the_same_bytes(world: World, tmp_path: Path) -> None:
    succeed("encode", world.config, tmp_path, f"cache.path={tmp_path / 'again'}")
    assert tree(tmp_path / "again") == tree(world.cache)


def test_a_number_of_workers_changes_no_byte(world: World, tmp_path: Path) -> None:
    succeed("encode", world.config, tmp_path, f"cache.path={tmp_path / 'again'}", "cache.workers=2")
    assert tree(tmp_path / "again") == tree(world.cache)


def test_the_second_view_is_the_mirrored_image(world: World) -> None:
    vae = AutoencoderKL.from_pretrained(world.config.parent / "vae")
    image = to_pixels(torch.from_numpy(np.array(Image.open(world.images / "cat" / "0.png")))[None])
    moments = torch.from_numpy(LatentCache(world.cache).read(np.array([0])))[0].float()
    with torch.inference_mode():
        for view, pixels in enumerate((image, image.flip(-1))):
            posterior = vae.encode(pixels).latent_dist
            expected = torch.cat([posterior.mean, posterior.std], dim=1)[0]
            assert torch.allclose(moments[view], expected, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(moments[0], moments[1], atol=0.1)


def test_training_leaves_checkpoints_a_log_a_preview_and_its_config(world: World) -> None:
    assert sorted(path.name for path in (world.run / "checkpoints").iterdir()) == ["000000032", "000000048"]
    log = [json.loads(line) for line in (world.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["images_seen"] for line in log] == [8, 16, 24, 32, 40, 48]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["lr"] > 0 for line in log)
    Image.open(world.run / "previews" / "000000048.png").verify()
    assert succeed("train", world.run / "config.yaml", world.run).startswith("train: all done")


def test_samples_are_a_cache_of_means_in_the_latent_space_of_the_vae(world: World) -> None:
    cache = LatentCache(world.samples)
    assert cache.labels.tolist() == [0, 1] * 3
    assert cache.manifest.shape == (4, IMAGE_SIZE // 4, IMAGE_SIZE // 4)
    assert cache.manifest.vae == LatentCache(world.cache).manifest.vae
    latents = cache.read(np.arange(6))
    assert len(np.unique(latents.reshape(6, -1), axis=0)) == 6


def test_samples_json_says_all_that_is_needed_to_draw_again(world: World) -> None:
    checkpoint, _ = newest_checkpoint(world.run)
    assert checkpoint is not None
    said: dict[str, Any] = json.loads((world.samples / "samples.json").read_text(encoding="utf-8"))
    assert said["images"] == [{"index": i, "label": i % 2, "class": CLASSES[i % 2]} for i in range(6)]
    assert said["images_seen"] == 48
    assert said["ema_sha256"] == sha256_file(checkpoint.path / "ema" / "diffusion_pytorch_model.safetensors")
    assert said["noise"] == asdict(checkpoint.state.noise)
    assert said["vae"]["weights_sha256"] == LatentCache(world.cache).manifest.vae.weights_sha256
    assert said["sample"].items() >= {"steps": 2, "per_class": 3, "seed": 0, "scheduler": "unipc"}.items()
    assert said["versions"]["torch"] == torch.__version__


def test_decoding_makes_an_image_a_sample_a_sheet_and_a_page(world: World) -> None:
    images = sorted((world.samples / "images").iterdir())
    assert len(images) == 6
    for file in images:
        assert Image.open(file).size == (IMAGE_SIZE, IMAGE_SIZE)
    assert [file.name for file in images][:2] == ["000000-cat.png", "000001-dog_fox_.png"]
    sheet = Image.open(world.samples / "grid.png")
    sheet.load()
    assert sheet.height >= 2 * IMAGE_SIZE
    data = page_data(world.samples / "index.html")
    endings = dict(data["classes"])
    assert tuple(endings) == (*CLASSES, "no class")
    assert [f"{index:06d}{[*endings.values()][kind]}" for index, kind in data["images"]] == [f.name for f in images]
    assert "<fox>" not in (world.samples / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_done_says_so_and_changes_nothing(world: World, stage: str) -> None:
    before = tree(world.config.parent)
    assert succeed(stage, world.config, world.run).startswith(f"{stage}: all done")
    assert tree(world.config.parent) == before


@pytest.mark.parametrize("lost", ["images/000003-dog_fox_.png", "grid.png", "index.html"])
def test_decode_makes_again_what_was_lost(world: World, tmp_path: Path, lost: str) -> None:
    run = copy(world, tmp_path)
    folder = run / "samples" / world.samples.name
    (folder / lost).unlink()
    succeed("decode", world.config, run)
    assert tree(folder) == tree(world.samples)


def test_a_run_may_be_named_by_another_path(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.run.parent)
    for stage in ("train", "sample", "decode"):
        assert succeed(stage, world.config, Path(world.run.name)).startswith(f"{stage}: all done")


def test_a_tilde_is_the_home_of_the_user_in_every_path(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.run, tmp_path / "run")
    shutil.copytree(world.cache, tmp_path / "cache")
    shutil.copy(world.config, tmp_path / "config.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    config, run = Path("~/config.yaml"), Path("~/run")
    for stage in ("train", "sample", "decode"):
        assert succeed(stage, config, run).startswith(f"{stage}: all done")
    succeed("decode", config, run, more=("--cache", "~/cache"))
    assert (tmp_path / "cache" / "decoded" / "grid.png").exists()
    succeed("verify", config, run, more=("--cache", "~/cache"))
    assert CliRunner().invoke(main, ["convert", "~/cache", "~/other"]).exit_code == 0
    assert (tmp_path / "other" / "manifest.json").exists()
    result = CliRunner().invoke(main, ["ema", "~/run", "--width", "0.1", "--to", "~/average"])
    refuse(result, f"error: {tmp_path}/run/averages")


def test_more_samples_begin_with_the_same_ones(world: World, tmp_path: Path) -> None:
    run = copy(world, tmp_path)
    shutil.rmtree(run / "samples")
    succeed("sample", world.config, run, "sample.per_class=5", "sample.batch_size=3")
    more = LatentCache(next((run / "samples").iterdir()))
    fewer = LatentCache(world.samples).read(np.arange(6)).astype(np.float32)
    assert np.allclose(more.read(np.arange(6)).astype(np.float32), fewer, rtol=2e-3, atol=2e-3)


def test_classes_may_be_chosen_by_name_and_number(world: World, tmp_path: Path) -> None:
    run = copy(world, tmp_path)
    for choice in (f"['{CLASSES[1]}']", "['1']"):
        shutil.rmtree(run / "samples")
        succeed("sample", world.config, run, f"sample.classes={choice}", "sample.per_class=2")
        assert LatentCache(next((run / "samples").iterdir())).labels.tolist() == [1, 1]


def test_an_image_on_disk_comes_back_as_the_vae_reconstructs_it(world: World, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world.cache, tmp_path / "cache"))
    succeed("decode", world.config, tmp_path, "sample.per_class=6", more=("--cache", str(cache)))
    vae = AutoencoderKL.from_pretrained(world.config.parent / "vae")
    decoded: list[np.ndarray[Any, Any]] = []
    originals = [file for name in CLASSES for file in sorted((world.images / name).iterdir())]
    for row, file in enumerate(originals):
        results = list((cache / "decoded" / "images").glob(f"{row:06d}-*.png"))
        if f"{file.parent.name}/{file.name}" == BROKEN:
            assert not results
            continue
        pixels = to_pixels(torch.from_numpy(np.array(Image.open(file)))[None])
        with torch.inference_mode():
            expected = to_images(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)[0].numpy().astype(int)
        decoded.append(np.array(Image.open(results[0])).astype(int))
        assert abs(decoded[-1] - expected).max() <= 2
    apart = [abs(a - b).max() for i, a in enumerate(decoded) for b in decoded[:i]]
    assert min(apart) > 10  # or one image could stand for another


def test_decoding_a_cache_takes_the_first_images_of_every_class(world: World, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world.cache, tmp_path / "cache"))
    succeed("decode", world.config, tmp_path, "sample.per_class=2", more=("--cache", str(cache)))
    names = sorted(file.name[:6] for file in (cache / "decoded" / "images").iterdir())
    assert names == ["000000", "000001", "000006", "000007"]


# What goes wrong. Each is one line that names the cause.


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_key_of_the_config_is_refused(world: World, stage: str) -> None:
    refuse(run_stage(stage, world.config, world.run, "train.lrr=1"), "unknown key train.lrr", "train.lr?")


@pytest.mark.parametrize("stage", STAGES)
def test_a_config_that_is_not_there_is_refused(world: World, stage: str) -> None:
    refuse(run_stage(stage, world.config.parent / "none.yaml", world.run), "none.yaml")


def test_a_folder_without_images_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    result = run_stage("encode", world.config, tmp_path, f"data.source={tmp_path}", f"cache.path={tmp_path / 'cache'}")
    refuse(result, "data.source", str(tmp_path))
    assert not (tmp_path / "cache").exists()


def test_an_image_size_that_the_vae_cannot_divide_is_refused(world: World, tmp_path: Path) -> None:
    result = run_stage("encode", world.config, tmp_path, "data.image_size=18", f"cache.path={tmp_path / 'cache'}")
    refuse(result, "data.image_size = 18", "multiple of 4")


@pytest.mark.parametrize(
    "override",
    [
        "model.channels=[8,8,8,8]",
        "model.head_width=5",
        "train.batch_size=8",
        "noise.timesteps=uniform",
        "model.depth=2",
    ],
)
def test_a_model_or_clock_that_does_not_fit_the_run_is_refused(world: World, override: str) -> None:
    before = tree(world.run)
    refuse(run_stage("train", world.config, world.run, override), override.split("=")[0])
    assert tree(world.run) == before


def test_latents_that_no_level_can_halve_are_refused(world: World, tmp_path: Path) -> None:
    refuse(run_stage("train", world.config, tmp_path, "model.channels=[8,8,8,8]"), "model.channels")


def test_a_stage_before_its_turn_names_what_is_missing(world: World, tmp_path: Path) -> None:
    no_cache = f"cache.path={tmp_path / 'cache'}"
    refuse(run_stage("train", world.config, tmp_path, no_cache), "run encode first")
    refuse(run_stage("sample", world.config, tmp_path), "run train first")
    refuse(run_stage("decode", world.config, tmp_path), "run train first")
    run = tmp_path / "run"
    shutil.copytree(world.run / "checkpoints", run / "checkpoints")
    refuse(run_stage("decode", world.config, run), "run sample first")


def test_a_cache_of_another_vae_is_refused(world: World, tmp_path: Path) -> None:
    other = f"vae.source={make_vae(tmp_path / 'vae', seed=1)}"
    before = tree(world.config.parent)
    refuse(run_stage("encode", world.config, world.run, other), str(world.cache), "vae")
    refuse(run_stage("train", world.config, tmp_path / "run", other), "vae.source", str(world.cache))
    refuse(run_stage("decode", world.config, world.run, other), "vae.source", str(world.samples))
    more = ("--cache", str(world.cache))
    refuse(run_stage("decode", world.config, world.run, other, more=more), "vae.source", str(world.cache))
    assert tree(world.config.parent) == before


def test_a_run_with_another_number_of_classes_is_refused(world: World, tmp_path: Path) -> None:
    make_images(tmp_path / "images", (*CLASSES, "owl"))
    overrides = (f"data.source={tmp_path / 'images'}", f"cache.path={tmp_path / 'cache'}")
    succeed("encode", world.config, tmp_path, *overrides)
    before = tree(world.run)
    refuse(run_stage("train", world.config, world.run, *overrides), "classes", "owl", "--run")
    assert tree(world.run) == before


@pytest.mark.parametrize(
    ("schedule", "prediction", "scheduler"), [("linear", "epsilon", "ddpm"), ("cosine", "v", "ddim")]
)
def test_the_discrete_schedules_go_all_the_way_to_images(
    world: World, tmp_path: Path, schedule: str, prediction: str, scheduler: str
) -> None:
    overrides = (
        f"noise.schedule={schedule}",
        f"noise.prediction={prediction}",
        f"sample.scheduler={scheduler}",
        "model.bottleneck=resnet",
    )
    for stage in ("train", "sample", "decode"):
        succeed(stage, world.config, tmp_path, *overrides)
    (folder,) = (tmp_path / "samples").iterdir()
    said = json.loads((folder / "samples.json").read_text())
    assert (said["noise"]["schedule"], said["sample"]["scheduler"]) == (schedule, scheduler)
    assert len(list((folder / "images").glob("*.png"))) == len(said["images"])


def test_a_run_without_a_whole_checkpoint_is_not_started_anew(world: World, tmp_path: Path) -> None:
    run = copy(world, tmp_path)
    for folder in (run / "checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"")
    before = tree(run)
    refuse(run_stage("train", world.config, run), str(run / "checkpoints"), "move the folder away")
    assert tree(run) == before


def test_a_class_that_is_not_there_is_refused(world: World) -> None:
    refuse(run_stage("sample", world.config, world.run, "sample.classes=[cow]"), "sample.classes", "'cow'", *CLASSES)
    refuse(run_stage("sample", world.config, world.run, "sample.classes=['2']"), "sample.classes", "'2'")


def test_with_debug_an_error_shows_its_trace(world: World) -> None:
    result = run_stage("train", world.config, world.run, "train.lrr=1", more=("--debug",))
    assert isinstance(result.exception, ValueError)


def test_help_lists_every_stage() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages", "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert all(f"\n  {stage} " in done.stdout for stage in STAGES)
    assert done.stdout.startswith("Usage: latentmill ")


def test_wandb_without_a_key_is_offline_and_asks_nothing(world: World, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from pipeline.config_file import load_config
from pipeline.training.tracker import Tracker
config = load_config(Path({str(world.config)!r}))
with Tracker("wandb", Path({str(tmp_path)!r}), config, images_seen=0, active=True) as tracker:
    tracker.log({{"images_seen": 8, "loss": 1.0, "loss_by_noise": [0.5, None]}})
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**environment, "HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("wandb takes more than 20 s to start on this machine")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
