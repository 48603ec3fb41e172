"""Images/s and memory of training at ImageNet's size, on a cache of noise: it needs no images.

    python -m benchmarks.train_large --config configs/imagenet256.yaml --set train.accumulate=8 --steps 20

Trains the model of a config for a few steps as `latentmill train` does, in its batch size and precision, on random
latents of 4 x S/8 x S/8 for images of S pixels. Prints images/s, the share of the GPU's peak, and the most memory held.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch

from benchmarks.loader import noise_plan, write_cache
from benchmarks.scaling import DOWNSAMPLING, LATENT_CHANNELS, SETS
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.flops import peak_flops
from pipeline.training.distributed import connect, describe
from pipeline.training.metrics import peak_memory
from pipeline.training.trainer import Trainer
from stages.cli import LocalPath

WARM = 5  # steps that are not measured: they compile the model


@click.command(help=__doc__)
@click.option("--config", "file", type=LocalPath(), default=Path("configs/imagenet100-128.yaml"), show_default=True)
@click.option("--set", "overrides", multiple=True, help="Override a key of the config: key=value.")
@click.option("--rows", default=4096, show_default=True, help="Images in the cache.")
@click.option("--steps", default=30, show_default=True, help="Steps that are measured.")
def main(file: Path, overrides: tuple[str, ...], rows: int, steps: int) -> None:
    config = load_config(file, overrides)
    with tempfile.TemporaryDirectory() as folder:
        config = noise_config(config, Path(folder) / "cache", rows)
        accelerator = connect(config.train.precision)
        with mock.patch("pipeline.training.trainer.Previews"):  # they need the VAE, which needs a download
            trainer = Trainer(config, Path(folder) / "run", accelerator, None)
        started = time.perf_counter()
        for _ in range(WARM):
            trainer.train_step()
        waited(trainer.device)
        print(f"the first {WARM} steps took {time.perf_counter() - started:.0f} s")
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            trainer.train_step()
            waited(trainer.device)
            seconds.append(time.perf_counter() - started)
        rate = trainer.batch_size / statistics.median(seconds)
        flops = rate * trainer.window.flops
        line = f"{file.stem} on {describe(accelerator)}: {rate:,.0f} images/s, {flops / 1e12:,.1f} TFLOP/s"
        if accelerator.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(), half=accelerator.mixed_precision != "no")
            line += f", {flops / peak:.2f} of the peak" if peak else ""
        print(f"{line}, {peak_memory(trainer.device) / 1e9:.1f} GB at most", flush=True)


def noise_config(config: Config, path: Path, rows: int) -> Config:
    """Return `config` with a cache of `rows` random latents at `path`, with as many classes as its data set has."""
    classes = next((count for name, _, count in SETS if name == config.name), 10)
    size = config.data.image_size // DOWNSAMPLING
    plan = noise_plan(rows).changed(
        shape=(LATENT_CHANNELS, size, size),
        classes=tuple(f"{kind:04d}" for kind in range(classes)),
        image_size=config.data.image_size,
    )

    def values(numbers: np.ndarray) -> np.ndarray:
        shape = (len(numbers), *plan.row_shape)
        return np.random.default_rng(int(numbers[0])).standard_normal(shape, np.float32).astype(np.float16)

    write_cache(path, plan, [str(i) for i in range(rows)], np.arange(rows) % classes, values)
    return config.changed(
        cache=config.cache.changed(path=path, store="mean", flip=False), data=config.data.changed(heldout=None)
    )


def waited(device: torch.device) -> None:
    """Wait for a GPU, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
