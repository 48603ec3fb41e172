"""Images/s of `latentmill sample` against the bare network, and against diffusers' DDIM pipeline.

    python -m benchmarks.sample_speed --config configs/cifar10.yaml --run runs/cifar10

In turn, on the same machine: (1) what `latentmill sample` does, writing included, for `--images` samples with the
sampler, steps and guidance of the config; (2) a loop that calls the same network as often, on tensors in memory, and
does nothing else; (3) as (1) without guidance; (4) diffusers' DDIMPipeline with a UNet2DModel of the same FLOPs, which
has no guidance, in the same number of steps. Prints medians over rounds.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from benchmarks.peers import RECIPES, matching
from data.cache.manifest import Manifest
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.device import pick_device
from pipeline.training.checkpoint import Checkpoint, checkpoint_at
from stages.cli import LocalPath
from stages.sample import sample

BARE_BATCH = 64


@click.command(help=__doc__)
@click.option("--config", "file", type=LocalPath(), default=Path("configs/cifar10.yaml"), show_default=True)
@click.option("--set", "overrides", multiple=True, help="Override a key of the config: key=value.")
@click.option("--run", type=LocalPath(), required=True)
@click.option("--images", default=640, show_default=True, help="A multiple of 64 and of the number of classes.")
@click.option("--rounds", default=5, show_default=True)
def main(file: Path, overrides: tuple[str, ...], run: Path, images: int, rounds: int) -> None:
    config = load_config(file, overrides)
    checkpoint, _ = checkpoint_at(run, "--run")
    steps = config.sample.steps
    unguided = config.changed(sample=config.sample.changed(guidance=1.0))
    ways: dict[str, Callable[[], None]] = {
        "latentmill sample": lambda: ours(config, checkpoint, images),
        "bare network": bare(checkpoint, 2 * images * steps),
        "latentmill sample, guidance 1": lambda: ours(unguided, checkpoint, images),
        "diffusers' DDIMPipeline": ddim(checkpoint, Manifest.load(config.cache.path), images, steps),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first one warms up
        for name, draw in ways.items():
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                draw()
            if number:
                rates[name].append(images / (time.perf_counter() - started))
    for name, each in rates.items():
        print(f"{name:32} {statistics.median(each):7.1f} images/s   ({min(each):.1f} to {max(each):.1f})")
    for one, other in (list(ways)[:2], list(ways)[2:]):
        ratios = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
        print(f"{one} / {other}: {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


def ours(config: Config, checkpoint: Checkpoint, images: int) -> None:
    """Draw samples into a folder that is deleted."""
    per_class = -(-images // len(checkpoint.state.classes))
    config = config.changed(sample=config.sample.changed(per_class=per_class))
    with tempfile.TemporaryDirectory() as folder:
        sample(config, checkpoint.path.parents[1], checkpoint=checkpoint, to=Path(folder) / "samples")


def bare(checkpoint: Checkpoint, evaluations: int) -> Callable[[], None]:
    """Return a function that calls the network for `evaluations` images, `BARE_BATCH` at a time."""
    model, device = checkpoint.ema_model().to(pick_device()), pick_device()
    shape = (BARE_BATCH, model.config["in_channels"], model.config["sample_size"], model.config["sample_size"])
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    time_, labels = torch.tensor(500.0, device=device), torch.zeros(BARE_BATCH, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def draw() -> None:
        for _ in range(evaluations // BARE_BATCH):
            model(x, time_, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return draw


def ddim(checkpoint: Checkpoint, manifest: Manifest, images: int, steps: int) -> Callable[[], None]:
    """Return a function that draws with diffusers' pipeline and an untrained UNet2DModel without classes."""
    options = matching(RECIPES[0], checkpoint.ema_model(), manifest) | {"num_class_embeds": None}
    network = UNet2DModel(**options).to(memory_format=torch.channels_last).eval()
    pipe = DDIMPipeline(unet=network, scheduler=DDIMScheduler()).to(pick_device())
    pipe.set_progress_bar_config(disable=True)

    def draw() -> None:
        for _ in range(images // BARE_BATCH):
            pipe(batch_size=BARE_BATCH, num_inference_steps=steps, output_type="np")

    return draw


if __name__ == "__main__":
    main()
