"""What may change when a run goes on, which is said, and what may not, which is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.cache.manifest import MANIFEST, Manifest
from pipeline.config import Train
from pipeline.config_file import load_config
from pipeline.latents import Normalization
from pipeline.optim import lr_breakpoints
from pipeline.training.checkpoint import newest_checkpoint
from tests.helpers.world import BROKEN, World, make_images, run_stage, state_of, succeed, tree

SHORT = "train.images=16"


def begin(world: World, run: Path, *overrides: str) -> None:
    succeed("train", world.config, run, *overrides, SHORT)


@pytest.fixture(scope="module")
def begun(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at 16 images, to copy."""
    run = tmp_path_factory.mktemp("begun") / "run"
    begin(world, run)
    return run


def lines_of(printed: str, start: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith(start)]


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("train.lr=5e-4", "lr 0.001 -> 0.0005"),
        ("train.schedule=cosine", "schedule trapezoid -> cosine"),
        ("train.warmup=2", "warmup 4 -> 2"),
        ("train.decay=0.2", "decay 0.4 -> 0.2"),
        ("train.weight_decay=0.1", "weight_decay 0.01 -> 0.1"),
        ("train.betas=[0.8, 0.9]", "betas [0.9, 0.95] -> [0.8, 0.9]"),
        ("train.grad_clip=2", "grad_clip 1.0 -> 2.0"),
        ("train.label_dropout=0.2", "label_dropout 0.1 -> 0.2"),
        ("train.ema_halflife=20", "ema_halflife 16 -> 20"),
        ("train.accumulate=2", "accumulate 1 -> 2"),
        ("train.gradient_checkpointing=true", "gradient_checkpointing False -> True"),
        ("train.access=mapped", "access resident -> mapped"),
        ("train.images=24", "images 16 -> 24"),
    ],
)
def test_a_setting_that_changes_is_said_with_both_values(
    world: World, begun: Path, tmp_path: Path, override: str, change: str
) -> None:
    run = shutil.copytree(begun, tmp_path / "run")
    expected = {change, "images 16 -> 20"} if "images" not in override else {change}
    longer = () if "images" in override else ("train.images=20",)
    said = lines_of(succeed("train", world.config, run, *longer, override), "train: changed")
    assert [set(re.split(r", (?![\d.])", line.split(": ", 2)[2])) for line in said] == [expected]


def test_a_run_that_goes_on_as_it_was_says_nothing_of_changes(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world.run, run)
    shutil.rmtree(run / "checkpoints" / "000000048")
    printed = succeed("train", world.config, run, "train.keep=5", "train.tracker=tensorboard")
    assert "at 32 images" in printed
    assert "->" not in printed
    assert "learning rate" not in printed
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")


def test_another_machine_or_version_is_said_with_both_values(
    world: World, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(begun, tmp_path / "run")
    known = state_of(run, 16)["computer"]
    assert known.keys() >= {"torch", "numpy", "diffusers", "accelerate", "processes", "threads", "device"}
    monkeypatch.setattr("numpy.__version__", "9.9")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "Z80")
    monkeypatch.setattr("pipeline.training.distributed.version", lambda name: f"{name} of tomorrow")
    (line,) = lines_of(succeed("train", world.config, run, "train.images=20"), "train: instructions")
    assert line == (
        f"train: instructions {known['instructions']} -> Z80, numpy {known['numpy']} -> 9.9,"
        f" diffusers {known['diffusers']} -> diffusers of tomorrow,"
        f" accelerate {known['accelerate']} -> accelerate of tomorrow:"
        " same images in the same order, but bits may differ"
    )


def test_another_kind_of_gpu_draws_other_noise_which_is_said(
    world: World, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(begun, tmp_path / "run")
    monkeypatch.setattr("pipeline.training.distributed._device_name", lambda accelerator: "NVIDIA H100")
    (line,) = lines_of(succeed("train", world.config, run, "train.images=20"), "train: device")
    assert line == "train: device cpu -> NVIDIA H100: same images in the same order, other noise, but bits may differ"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size=8", "its train.batch_size is 4, this run has 8"),
        ("train.seed=1", "its train.seed is 0, this run has 1"),
        ("train.optimizer=muon", "its train.optimizer is 'adamw', this run has 'muon'"),
        ("train.weighting=min_snr", "its train.weighting is 'plain', this run has 'min_snr'"),
        ("train.ema=power", "its train.ema and ema_widths is [], this run has [0.05, 0.1]"),
        ("noise.timesteps=uniform", "its noise.timesteps is 'logit_normal', this run has 'uniform'"),
        ("model.depth=2", "its model.depth is 1, this run has 2"),
    ],
)
def test_what_a_run_keeps_to_its_end_is_refused(world: World, override: str, words: str) -> None:
    result = run_stage("train", world.config, world.run, override, "train.images=96")
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_checkpoint_records_the_whole_recipe(world: World) -> None:
    recorded = state_of(world.run, 48)["train"]
    settings = load_config(world.config).train.model_dump(mode="json")
    left_out = settings.keys() - recorded.keys()
    assert left_out == {"tracker", "keep", "keep_every", "preview_every", "eval_every", "precision"}
    assert recorded == {name: value for name, value in settings.items() if name not in left_out} | {
        "access": "resident"
    }


# The latents that a run goes on with.


def other_views(world: World, root: Path) -> tuple[str, ...]:
    return ("cache.flip=false",)


def other_store(world: World, root: Path) -> tuple[str, ...]:
    return ("cache.store=mean",)


def other_dtype(world: World, root: Path) -> tuple[str, ...]:
    return ("cache.dtype=float32",)


def other_preprocessing(world: World, root: Path) -> tuple[str, ...]:
    return ("data.matte=black",)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (other_views, "views is ['identity', 'flip'], this run has ['identity']"),
        (other_store, "store is 'moments', this run has 'mean'"),
        (other_dtype, "dtype is 'float16', this run has 'float32'"),
        (other_preprocessing, "preprocessing is "),
    ],
)
def test_a_run_does_not_go_on_with_other_latents_of_the_same_images(
    world: World, tmp_path: Path, change: Callable[[World, Path], tuple[str, ...]], field: str
) -> None:
    """Where the normalisation does not tell: it is the VAE's."""
    fixed = "train.normalization=vae"
    begin(world, tmp_path / "run", fixed)
    overrides = (*change(world, tmp_path), f"cache.path={tmp_path / 'cache'}", fixed)
    succeed("encode", world.config, tmp_path, *overrides)
    result = run_stage("train", world.config, tmp_path / "run", *overrides)
    assert result.exit_code == 2
    assert f"its cache's {field}" in result.stderr
    assert f"train.init={tmp_path / 'run'}" in result.stderr


def test_latents_whose_values_alone_differ_are_told_by_the_manifest(world: World, tmp_path: Path) -> None:
    """As those of an encode on another machine."""
    fixed = "train.normalization=vae"
    begin(world, tmp_path / "run", fixed)
    shutil.copytree(world.cache, tmp_path / "cache")
    manifest = Manifest.load(world.cache)
    manifest.changed(mean=tuple(value + 1e-9 for value in manifest.mean)).save(tmp_path / "cache")
    result = run_stage("train", world.config, tmp_path / "run", f"cache.path={tmp_path / 'cache'}", fixed)
    assert result.exit_code == 2
    assert f"its cache's manifest is '{manifest.sha256()}'" in result.stderr


def test_the_hash_of_a_manifest_is_the_one_that_it_ends_with(world: World) -> None:
    end = (world.cache / MANIFEST).read_bytes().splitlines()[-2]
    assert end == f'  "sha256": "{Manifest.load(world.cache).sha256()}"'.encode()


@pytest.mark.parametrize("change", ["--extend", "--retry-failed"])
def test_a_run_whose_cache_was_extended_or_retried_is_shown_the_way_by_train_init(
    world: World, begun: Path, tmp_path: Path, change: str
) -> None:
    run, cache = (
        shutil.copytree(begun, tmp_path / "run"),
        f"cache.path={shutil.copytree(world.cache, tmp_path / 'cache')}",
    )
    source = f"data.source={shutil.copytree(world.images, tmp_path / 'images')}"
    make_images(tmp_path / "more")
    new = "cat/6.png" if change == "--extend" else BROKEN
    shutil.copy(tmp_path / "more" / "cat" / "0.png", tmp_path / "images" / new)
    succeed("encode", world.config, run, cache, source, more=(change,))
    result = run_stage("train", world.config, run, cache, source)
    assert result.exit_code == 2
    assert "its cache's " in result.stderr
    assert f"with train.init={run} to start from the weights of this one" in result.stderr
    succeed("train", world.config, tmp_path / "tuned", cache, source, f"train.init={run}", SHORT)


def test_latents_are_normalised_by_the_mean_and_std_of_the_vae_as_diffusers_does(world: World, tmp_path: Path) -> None:
    """(x - latents_mean) * scaling_factor / latents_std, in training and back in sampling."""
    vae = Path(shutil.copytree(world.config.parent / "vae", tmp_path / "vae"))
    values = json.loads((vae / "config.json").read_text(encoding="utf-8"))
    values |= {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 3.0, 0.25], "scaling_factor": 0.5}
    (vae / "config.json").write_text(json.dumps(values), encoding="utf-8")
    overrides = (f"vae.source={vae}", f"cache.path={tmp_path / 'cache'}", "train.normalization=vae", SHORT)
    succeed("encode", world.config, tmp_path, *overrides)
    succeed("train", world.config, tmp_path / "run", *overrides)
    checkpoint, _ = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.normalization == Normalization((0.5, -1.0, 0.0, 2.0), (2.0, 4.0, 6.0, 0.5))
    latents = torch.tensor([2.5, 3.0, -6.0, 2.5])[None, :, None, None]
    expected = torch.tensor([1.0, 1.0, -1.0, 1.0])[None, :, None, None]
    assert torch.equal(checkpoint.normalization.normalize(latents), expected)
    assert torch.equal(checkpoint.normalization.denormalize(expected), latents)


def test_sampling_needs_no_cache(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.run / "checkpoints", tmp_path / "run" / "checkpoints")
    succeed("sample", world.config, tmp_path / "run", f"cache.path={tmp_path / 'nowhere'}")
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1


# The learning rate of a run that has become longer.


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("trapezoid", "it was 0.00063, rises to 0.001 at 16, stays there until 28, falls to 0 at 48 images"),
        ("cosine", "it was 0.00025, rises to 0.00083 at 16, falls to 0 at 48 images"),
        ("constant", "it was 0.001, stays there until 48 images"),
    ],
)
def test_a_finished_run_that_grows_says_what_the_learning_rate_does_now(
    world: World, tmp_path: Path, schedule: str, words: str
) -> None:
    begin(world, tmp_path, f"train.schedule={schedule}")
    printed = succeed("train", world.config, tmp_path, f"train.schedule={schedule}")
    assert lines_of(printed, "train: learning rate") == [f"train: learning rate ({schedule}): {words}"]


def test_the_course_of_the_learning_rate_has_its_ends_and_bends() -> None:
    options = {"peak": 1.0, "images": 1000, "warmup": 100, "decay": 0.4}
    assert lr_breakpoints(0, schedule="trapezoid", **options) == [(0, 0.01), (100, 1), (600, 1), (1000, 0)]
    assert lr_breakpoints(800, schedule="trapezoid", **options) == [(800, 0.5), (1000, 0)]
    assert lr_breakpoints(500, schedule="constant", **options) == [(500, 1), (1000, 1)]
    assert lr_breakpoints(550, schedule="cosine", **options)[0] == (550, pytest.approx(0.5))


def test_a_warm_up_that_is_longer_than_the_run_is_refused(world: World, tmp_path: Path) -> None:
    result = run_stage("train", world.config, tmp_path, "train.warmup=49")
    assert result.exit_code == 2
    assert "train: warmup = 49 is longer than the run, images = 48" in result.stderr
    assert Train(warmup=48, images=48).warmup == 48
