"""Pictures of what a model has learnt so far: a contact sheet at a time, and a strip of all times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from data.manifest import Manifest
from pipeline.checkpoint import full
from pipeline.ema import Average
from pipeline.noise import NoiseProcess
from pipeline.objective import Normalization
from pipeline.sampling import draw, guided, image_generators, make_scheduler
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae, to_images
from stages.config import Config, Sample
from stages.pictures import contact_sheet, save_png, strip
from stages.start import build_model

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
            weights[name] = whole.cpu()
    if not accelerator.is_main_process:
        return None
    model = build_model(config, manifest).to(accelerator.device, memory_format=torch.channels_last)
    model.load_state_dict(weights)
    return model.eval()


@torch.inference_mode()
def draw_preview(
    file: Path,
    model: LatentUNet,
    *,
    noise: NoiseProcess,
    normalization: Normalization,
    vae: FrozenVae,
    classes: Mapping[int, str],
    settings: Sample,
) -> None:
    """Publish a contact sheet of samples of `classes`, index to name, at fixed seeds, with the sampler and the guidance
    of `settings`."""
    labels = torch.tensor(list(classes), device=vae.device).repeat(PER_CLASS)
    size = model.config["sample_size"]
    latents = draw(
        guided(model, labels, settings.guidance),
        make_scheduler(settings.scheduler, noise, settings.steps),
        shape=(model.config["in_channels"], size, size),
        generators=image_generators(settings.seed, list(range(len(labels)))),
        device=vae.device,
    )
    parts = normalization.denormalize(latents).split(len(classes))  # a larger VAE has no room for all at once
    images = torch.cat([to_images(vae.decode(part)) for part in parts]).cpu().numpy()
    save_png(contact_sheet(images, labels.tolist(), classes), file)


def draw_strip(run: Path, *, size: int, classes: int) -> None:
    """Publish previews.png: one image a class of every preview of a run or, of many, of some at equal distances."""
    files = sorted((run / "previews").glob("*.png"))
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
