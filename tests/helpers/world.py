"""The small world in which the stages run in tests: a dozen pictures, a tiny VAE, a config, and all four stages."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from data.cache.reader import LatentCache
from pipeline.vae_init import anchored_autoencoder
from stages.cli import main

CLASSES = ("cat", "dog & <fox>")  # the second has to be escaped in a page and in a file's name
IMAGE_SIZE = 16
BROKEN = "cat/3.png"
MEASURED = {"images_per_second", "teraflops_per_second", "core_share", "data_wait", "memory_gb"}


@dataclass(frozen=True)
class World:
    """Where things are after all four stages. Tests read it and change nothing."""

    config: Path
    images: Path
    cache: Path
    run: Path
    printed: dict[str, str]  # by stage

    @property
    def samples(self) -> Path:
        return next((self.run / "samples").iterdir())


def build_world(root: Path) -> World:
    """Encode, train, sample and decode, once."""
    make_images(root / "images")
    (root / "images" / BROKEN).write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    make_vae(root / "vae", seed=0)
    config = write_config(root)
    printed = {stage: succeed(stage, config, root / "run") for stage in ("encode", "train", "sample", "decode")}
    return World(config, root / "images", root / "cache", root / "run", printed)


def make_images(folder: Path, classes: tuple[str, ...] = CLASSES) -> None:
    """Six pictures a class: each of one colour on the left and another on the right."""
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(6):
            halves = Image.fromarray(random.integers(0, 256, (1, 2, 3), dtype=np.uint8))
            halves.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST).save(folder / name / f"{i}.png")


def make_vae(folder: Path, seed: int) -> Path:
    """A tiny AutoencoderKL, 4x4 pixels a latent position, that makes something of colours without any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        anchored_autoencoder((8, 8, 16), latent_channels=4).save_pretrained(folder)
    return folder


def write_config(root: Path) -> Path:
    """A config in `root`, beside the folders `images`, `vae` and `cache`; a run takes about a second."""
    values: dict[str, Any] = {
        "data": {"source": str(root / "images"), "image_size": IMAGE_SIZE},
        "vae": {"source": str(root / "vae")},
        "cache": {"path": str(root / "cache"), "batch_size": 4, "workers": 0},
        "model": {"channels": [8, 16], "blocks": 1, "depth": 1, "head_width": 8, "dropout": 0.1},
        "train": {
            "images": 48,
            "batch_size": 4,
            "precision": "fp32",
            "warmup": 4,
            "ema_halflife": 16,
            "log_every": 8,
            "preview_every": 1000,
            "checkpoint_every": 16,
        },
        "sample": {"steps": 2, "per_class": 3, "batch_size": 4},
    }
    file = root / "config.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def run_stage(stage: str, config: Path, run: Path, *overrides: str, more: tuple[str, ...] = ()) -> Result:
    """`latentmill STAGE` with overrides of the form `key=value` and `more` options, in this process."""
    arguments = [stage, "--config", str(config), "--run", str(run), *more]
    for override in overrides:
        arguments += ["--set", override]
    return CliRunner().invoke(main, arguments)


def succeed(stage: str, config: Path, run: Path, *overrides: str, more: tuple[str, ...] = ()) -> str:
    """What a stage that ends well prints."""
    result = run_stage(stage, config, run, *overrides, more=more)
    assert result.exit_code == 0, result.output
    return result.stdout


def sampled(world: World, run: Path, *overrides: str) -> NDArray[np.int16]:
    """The images that `latentmill sample` writes."""
    shutil.rmtree(run / "samples", ignore_errors=True)
    succeed("sample", world.config, run, *overrides)
    files = sorted(run.glob("samples/*/images/*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(np.int16)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def page_data(page: Path) -> dict[str, Any]:
    """What the page of decoded images has in its script."""
    (text,) = re.findall(r'<script id="data" type="application/json">(.*)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text)


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a log without what was measured on this machine."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def weights_of(run: Path, images: int) -> dict[str, torch.Tensor]:
    """Of the average of a checkpoint, by name."""
    return load_file(run / "checkpoints" / f"{images:09d}" / "ema" / "diffusion_pytorch_model.safetensors")


def state_of(run: Path, images: int) -> dict[str, Any]:
    """What state.json of a checkpoint says."""
    return json.loads((run / "checkpoints" / f"{images:09d}" / "state.json").read_text(encoding="utf-8"))


def refuse(result: Result, *parts: str, alone: bool = False) -> None:
    """Exit status 2, and a last line on stderr that says `parts`; with `alone`, there is no other."""
    assert result.exit_code == 2, result.output
    *others, last = result.stderr.splitlines()
    assert not (alone and others)
    assert last.startswith("error: ")
    for part in parts:
        assert part in last


def add_image(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(file)


def drawn(run: Path) -> LatentCache:
    (folder,) = (run / "samples").iterdir()
    return LatentCache(folder)


def train_on(world: World, folder: Path, classes: tuple[str, ...], *overrides: str) -> tuple[str, ...]:
    """Two steps of a run in the folder `run` of `folder`, on pictures of `classes`; the overrides that name them."""
    if not (folder / "images").exists():
        make_images(folder / "images", classes)
    given = (f"data.source={folder / 'images'}", f"cache.path={folder / 'cache'}", "train.images=8", *overrides)
    succeed("encode", world.config, folder, *given)
    succeed("train", world.config, folder / "run", *given)
    return given
