"""Pictures of what a model has learnt so far: samples at a time, and a strip of all times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image

from data.cache.manifest import Manifest
from pipeline.config import Config, Sample
from pipeline.device import sampling_dtype
from pipeline.ema import Average
from pipeline.latents import Normalization
from pipeline.noise import NoiseProcess
from pipeline.pictures import save_png, strip
from pipeline.sampling import draw, guided, image_generators, make_scheduler
from pipeline.training.checkpoint import full
from pipeline.training.setup import build_model
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae, to_images

PER_CLASS = 4
PREVIEWED = 10  # classes of a preview: the first ones with images
STRIP = "previews.png"
_STRIP_ROWS = 12


def averaged_model(average: Average, config: Config, manifest: Manifest, accelerator: Accelerator) -> LatentUNet | None:
    """The model with the weights of `average`, in the main process; in others None, but all of them must ask."""
    weights = {}
    for name, value in average.tensors.items():
        whole = full(value)
        if accelerator.is_main_process:
            weights[name] = whole
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):  # no weights are drawn that would be replaced at once
        model = build_model(config, manifest)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def draw_images(
    model: LatentUNet,
    labels: NDArray[np.int64],
    *,
    noise: NoiseProcess,
    normalization: Normalization,
    vae: FrozenVae,
    settings: Sample,
    decoded: int,
) -> NDArray[np.uint8]:
    """Samples of the classes `labels` `N` at fixed seeds, with the sampler and the guidance of `settings`: uint8
    `N H W 3`, of which `decoded` are decoded at a time, since a larger VAE has no room for all."""
    size, images = model.config["sample_size"], []
    for start in range(0, len(labels), settings.batch_size):
        part = torch.from_numpy(labels[start : start + settings.batch_size]).to(vae.device)
        latents = draw(
            guided(model, part, settings.guidance, sampling_dtype(settings.precision, vae.device)),
            make_scheduler(settings.scheduler, noise, settings.steps),
            shape=(model.config["in_channels"], size, size),
            generators=image_generators(settings.seed, list(range(start, start + len(part)))),
            device=vae.device,
        )
        images += [to_images(vae.decode(each)) for each in normalization.denormalize(latents).split(decoded)]
    return torch.cat(images).cpu().numpy()


def draw_strip(run: Path, *, size: int, classes: int) -> None:
    """Publish previews.png: one image a class of every preview of a run or, of many, of some at equal distances."""
    files = sorted(file for file in (run / "previews").glob("*.png") if file.stem.isdecimal())  # not of somebody else
    last = len(files) - 1
    rows = min(len(files), _STRIP_ROWS)
    sheets, captions = [], []
    for file in (files[round(i * last / max(rows - 1, 1))] for i in range(rows)):
        try:
            sheets.append(Image.open(file).convert("RGB"))
        except (OSError, SyntaxError) as error:  # of a picture that is damaged, for which no run has to end
            print(f"train: passed over {file}: {error}", flush=True)
        else:
            captions.append(f"{int(file.stem):,}")
    if not sheets:
        return
    save_png(strip(sheets, captions, size=size, classes=classes), run / STRIP)
