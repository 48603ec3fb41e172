"""Draw an animation: how noise becomes images, or samples on the way from one seed or class to another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data.storage import probe
from data.text import digest
from pipeline.config import Config, Sample
from pipeline.device import halving, pick_device
from pipeline.pictures import captioned, grid, save_animation, save_png
from pipeline.training.checkpoint import Checkpoint
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae
from stages.sample import (
    NOT_DRAWN,
    Drawing,
    choose_classes,
    require_checkpoint,
    resolve_sample_settings,
    sources_of,
    summary,
)

SUFFIXES = (".webp", ".gif")
SMALLEST = 96  # pixels of an image in a frame
MAX_CLASSES = 10  # in a frame
SAMPLES = 5  # of each class between two classes
_IN_STRIP = 9  # frames


@dataclass(frozen=True)
class Film:
    """What an animation shows: N images in each of F frames, as latents `F N C h w` that the VAE decodes."""

    latents: Tensor
    names: list[str]  # of the images
    titles: list[str]  # of the frames
    short_titles: list[str]  # for the strip


def animate(
    config: Config,
    run: Path,
    *,
    frames: int = 25,
    between_seeds: tuple[int, int] | None = None,
    between_classes: tuple[str, str] | None = None,
    to: Path | None = None,
) -> Path:
    """Write an animation of at most `frames` frames, and a PNG file beside it with some of them side by side.

    By default, a frame shows the images that the model expects at a step of sampling, one of each class; in the last
    frame they are the samples. Between two seeds or two classes, all frames show samples. Those of the first and the
    last frame are the ones that `sample` draws. Return the path of the animation: `to`, or one in the run's folder.
    """
    if to and to.suffix not in SUFFIXES:
        raise ValueError(f"--to = {to}: give a name that ends in {' or '.join(SUFFIXES)}")
    checkpoint = require_checkpoint(run)
    config, chosen = resolve_sample_settings(config, checkpoint)
    ends = _check_ends(config.sample, checkpoint, between_seeds, between_classes)
    kind = "seeds" if between_seeds else "classes" if between_classes else "denoising"
    settings = config.sample.model_dump_json(exclude={"per_class", *NOT_DRAWN})
    sources = sources_of(config.sample, checkpoint).values()
    described = [checkpoint.ema_sha256, f"{kind} {ends} {frames} {chosen}", settings, *sources]
    path = to or run / "animations" / f"{checkpoint.images_seen}-{kind}-{digest(described)[:8]}.webp"
    if path.exists() and not to:
        print(f"animate: all done: {path}")
        return path
    probe(path.parent, "--to" if to else "--run")
    vae = FrozenVae(config.vae.source, pick_device())
    vae.check(checkpoint.state.vae, checkpoint.path)
    labels = np.array(chosen[:MAX_CLASSES])
    if between_seeds:
        film = seed_film(config.sample, checkpoint, labels, between_seeds, frames)
    elif between_classes:
        film = class_film(config.sample, checkpoint, ends, frames)
    else:
        film = denoising_film(config.sample, checkpoint, labels, frames)
    _publish(film, vae, path, ", ".join(summary(config.sample, without={"seed"} if between_seeds else set())))
    print(f"animate: {len(film.titles)} frames in {path}, some of them side by side in {path.with_suffix('.png')}")
    return path


def _check_ends(
    settings: Sample, checkpoint: Checkpoint, seeds: tuple[int, int] | None, classes: tuple[str, str] | None
) -> tuple[int, int]:
    """Return the two seeds, or the indices of the two classes; ValueError if they are no way between two ends."""
    if seeds and classes:
        raise ValueError("--between-seeds and --between-classes: give one of them")
    if seeds and seeds[0] == seeds[1]:
        raise ValueError(f"--between-seeds {seeds[0]} {seeds[1]}: give two different seeds")
    if not classes:
        return seeds or (0, 0)
    state = checkpoint.state
    ends = choose_classes(classes, state.classes, state.class_counts, "--between-classes")
    if len(ends) < 2:
        raise ValueError(f"--between-classes: both are {state.classes[ends[0]]!r}: give two different classes")
    if settings.start_from:
        raise ValueError("--between-classes: between two classes there are no images: set sample.start_from to null")
    return ends[0], ends[1]


def denoising_film(settings: Sample, checkpoint: Checkpoint, labels: NDArray[np.int64], frames: int) -> Film:
    """Show what the model expects x_0 to be, in at most `frames` of its evaluations, for a sample of each class."""
    drawing = Drawing(settings, checkpoint, labels)

    def draw(batch: NDArray[np.int64]) -> Tensor:
        estimates: list[Tensor] = []
        drawing(batch, on_clean=estimates.append)
        return torch.stack(estimates)

    clean = torch.cat([*halving(draw, np.arange(len(labels)), drawing.batch_size, "animate")], dim=1)
    shown = _evenly(len(clean), frames)
    latents = checkpoint.normalization.denormalize(clean[shown])
    unit = "step" if len(clean) == settings.steps else "evaluation"  # heun evaluates the model twice in a step
    titles = [f"{unit} {i + 1}" for i in shown]
    return Film(latents, _names(checkpoint, labels), [f"{title} of {len(clean)}" for title in titles], titles)


def seed_film(
    settings: Sample, checkpoint: Checkpoint, labels: NDArray[np.int64], seeds: tuple[int, int], frames: int
) -> Film:
    """Show a sample of each class that is drawn from noise between that of two seeds.

    The noise is cos(a) e_1 + sin(a) e_2 for a = 0..pi / 2: spherical interpolation between independent e_1 and e_2. It
    is standard normal for each a, because the squares of the factors add up to 1.
    """
    drawing, count = Drawing(settings, checkpoint, labels), len(labels)
    angles = torch.linspace(0, math.pi / 2, frames, dtype=torch.float64)
    cosines, sines = (f(angles).float()[:, None, None, None] for f in (torch.cos, torch.sin))

    def draw(frame: NDArray[np.int64], image: NDArray[np.int64]) -> Tensor:
        return drawing(
            image,
            indices=[*range(count)] * 2,
            seeds=np.repeat(seeds, count).tolist(),
            mix=lambda noise: cosines[frame] * noise[image] + sines[frame] * noise[count + image],
        )

    latents = _draw_frames(drawing.batch_size, frames, count, draw)
    return Film(latents, _names(checkpoint, labels), *_on_the_way(f"seed {seeds[0]}", f"seed {seeds[1]}", frames))


def class_film(settings: Sample, checkpoint: Checkpoint, ends: tuple[int, int], frames: int) -> Film:
    """Show samples of which the class embedding and the guidance scale are on the line between those of two classes."""
    first, second = (checkpoint.state.classes[kind] for kind in ends)
    shares = torch.linspace(0, 1, frames)
    drawing = Drawing(settings, checkpoint, len(checkpoint.state.classes) + 1 + np.arange(frames))
    for model in filter(None, (drawing.model, drawing.guide)):
        add_classes_between(model, ends, shares)
    low, high = (settings.guidance_by_class.get(name, settings.guidance) for name in (first, second))

    def draw(frame: NDArray[np.int64], image: NDArray[np.int64]) -> Tensor:
        scales = ((1 - shares) * low + shares * high)[frame].tolist()
        return drawing(frame, indices=image.tolist(), scales=scales)

    latents = _draw_frames(drawing.batch_size, frames, SAMPLES, draw)
    return Film(latents, [""] * SAMPLES, *_on_the_way(first, second, frames))


def add_classes_between(model: LatentUNet, ends: tuple[int, int], shares: Tensor) -> None:
    """Add classes to a model, after the null class: with the embeddings (1 - s) c_1 + s c_2 for the `shares` s.

    A class enters the model only by its embedding, which is added to that of the time. So nothing else changes.
    """
    table, weights = model.classes.weight, shares[:, None].to(model.classes.weight.device)
    between = (1 - weights) * table[ends[0]] + weights * table[ends[1]]
    model.classes = nn.Embedding.from_pretrained(torch.cat([table, between]))


def _draw_frames(
    batch_size: int, frames: int, count: int, draw: Callable[[NDArray[np.int64], NDArray[np.int64]], Tensor]
) -> Tensor:
    """Return latents `F N C h w` that `draw` returns, batch by batch, for the numbers of frames and images in them."""
    frame, image = np.divmod(np.arange(frames * count), count)
    drawn = []
    with tqdm(total=len(frame), unit=" images", desc="animate", mininterval=1) as bar:
        every = np.arange(len(frame))
        for latents in halving(lambda part: draw(frame[part], image[part]), every, batch_size, "animate"):
            drawn.append(latents)
            bar.update(len(latents))
    return torch.cat(drawn).unflatten(0, (frames, count))


def _on_the_way(first: str, second: str, frames: int) -> tuple[list[str], list[str]]:
    """Return titles of the frames between two ends, in full and in short."""
    shares = [f"{share:.0f} %" for share in np.linspace(0, 100, frames)]
    return [f"{first} \u2192 {second}: {share}" for share in shares], [first, *shares[1:-1], second]


def _names(checkpoint: Checkpoint, labels: NDArray[np.int64]) -> list[str]:
    return [checkpoint.state.classes[label] for label in labels]


def _evenly(count: int, at_most: int) -> list[int]:
    """Return at most so many of the numbers below `count`, the first and the last among them, evenly spaced."""
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(int).tolist()


def _publish(film: Film, vae: FrozenVae, path: Path, settings: str) -> None:
    """Write the strip, which has a row for each image and says the `settings`, and then the animation."""
    decoded = vae.decode_images(film.latents.flatten(0, 1))
    images = decoded.reshape(*film.latents.shape[:2], *decoded.shape[1:])
    shown = _evenly(len(images), _IN_STRIP)
    rows = [[Image.fromarray(images[frame, number]) for frame in shown] for number in range(images.shape[1])]
    above = [film.short_titles[frame] for frame in shown]
    save_png(grid(rows, film.names, above, title=settings, smallest=SMALLEST), path.with_suffix(".png"))
    drawn = [
        captioned(each, film.names, title, smallest=SMALLEST) for each, title in zip(images, film.titles, strict=True)
    ]
    save_animation(drawn, path)
