"""Do samples show the class asked for? A classifier trained on rendered solids looks at them.

    python -m benchmarks.solids_accuracy --config configs/solids.yaml [--set KEY=VALUE]... [--run runs/solids]

Trains a small convolutional network on fresh renders (another seed than any cache), reports its accuracy on unseen
renders and on the VAE's reconstructions of those (the ceiling for samples), then on `PER_CLASS` samples of each class
from the newest checkpoint of the run. Writes runs/<name>/eval/solids_accuracy.json.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from data.cache.reader import LatentCache
from data.sources.solids import CLASSES, Solids
from data.storage import publish_json
from pipeline.config_file import load_config
from pipeline.vae import FrozenVae, to_images, to_pixels
from stages.cli import LocalPath
from stages.sample import require_checkpoint, sample

TRAINING, UNSEEN, PER_CLASS = 12_000, 2_000, 50
EPOCHS, BATCH = 5, 64
RENDER_SEED = 1_000_003


def classifier() -> nn.Module:
    """A network of four strided convolutions on pixels `B 3 H W`, of any size from 32 on."""
    widths = (3, 32, 64, 128, 128)
    layers: list[nn.Module] = []
    for width_in, width in pairwise(widths):
        layers += [nn.Conv2d(width_in, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], len(CLASSES)))


def fit(images: Tensor, labels: Tensor) -> nn.Module:
    """Train a classifier on uint8 `N H W 3` with random shifts and mirroring."""
    torch.manual_seed(0)
    model = classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = EPOCHS * len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        pixels = to_pixels(images[chosen])
        shift = torch.randint(-3, 4, (2,)).tolist()
        pixels = pixels.roll(shift, (-2, -1)).contiguous(memory_format=torch.channels_last)
        pixels = pixels.flip(-1) if torch.rand(()) < 0.5 else pixels
        pixels = pixels + 0.03 * torch.randn_like(pixels)
        loss = nn.functional.cross_entropy(model(pixels), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Classes of uint8 `N H W 3`: int64 `N`."""
    return torch.cat([model(to_pixels(chunk)).argmax(-1) for chunk in images.split(250)])


def load(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rendered solids and their classes."""
    solids = Solids(count=count, seed=seed, image_size=size)
    return torch.from_numpy(solids.load(range(count)).pixels), torch.from_numpy(solids.labels)


def decode_samples(folder: Path, vae: FrozenVae) -> tuple[Tensor, Tensor]:
    """The images of a sample cache and the classes that were asked for."""
    cache = LatentCache(folder)
    latents = torch.from_numpy(cache.read(np.arange(len(cache))))[:, 0].float()
    return torch.cat([to_images(vae.decode(chunk)) for chunk in latents.split(100)]), torch.from_numpy(cache.labels)


@click.command(help=__doc__)
@click.option("--config", "file", type=LocalPath(), default=Path("configs/solids.yaml"))
@click.option("--set", "overrides", multiple=True)
@click.option("--run", type=LocalPath())
def main(file: Path, overrides: tuple[str, ...], run: Path | None) -> None:
    config = load_config(file, [*overrides, f"sample.per_class={PER_CLASS}"])
    run = run or Path("runs") / config.name
    checkpoint = require_checkpoint(run)
    if checkpoint.state.classes != tuple(CLASSES):
        raise click.ClickException(f"{run} was not trained on solids")
    vae = FrozenVae(config.vae.source)
    folder = sample(config, run)
    started = time.monotonic()
    model = fit(*load(TRAINING, config.data.image_size, RENDER_SEED))
    unseen, labels = load(UNSEEN, config.data.image_size, RENDER_SEED + 1)
    decoded = torch.cat([to_images(vae.decode(vae.encode(to_pixels(c)).chunk(2, dim=1)[0])) for c in unseen.split(100)])
    samples, asked = decode_samples(folder, vae)
    said = predict(model, samples)
    figures = {
        "unseen_renders": (predict(model, unseen) == labels).float().mean().item(),
        "their_reconstructions": (predict(model, decoded) == labels).float().mean().item(),
        "samples": (said == asked).float().mean().item(),
    }
    by_class = {name: (said[asked == kind] == kind).float().mean().item() for kind, name in enumerate(CLASSES)}
    for name, value in (figures | by_class).items():
        print(f"{name:22} {value:7.1%}")
    seconds = time.monotonic() - started
    print(f"{len(samples)} samples, {checkpoint.images_seen:,} images seen; classifier in {seconds:.0f} s")
    result = {**figures, "by_class": by_class, "n": len(samples), "images_seen": checkpoint.images_seen}
    publish_json(run / "eval" / "solids_accuracy.json", result | {"sample": config.sample.model_dump(mode="json")})


if __name__ == "__main__":
    main()
