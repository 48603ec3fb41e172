"""What a model has learnt so far: a contact sheet at a time, a strip of all times, and a quick score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image

from data.heldout import Subset
from data.manifest import Manifest
from data.source import NO_CLASS
from pipeline.checkpoint import full
from pipeline.ema import Average
from pipeline.evaluation.features import compute_features
from pipeline.evaluation.kernel import kernel_distance, mean_similarity
from pipeline.evaluation.networks import open_network
from pipeline.noise import NoiseProcess
from pipeline.objective import Normalization
from pipeline.sampling import draw, guided, image_generators, make_scheduler
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae, to_images
from stages.config import Config, Sample, features_path
from stages.datasets import open_config_sources
from stages.device import process_count
from stages.pictures import save_png, strip
from stages.start import build_model

PER_CLASS = 4
PREVIEWED = 10  # classes of a preview: the first ones with images
STRIP = "previews.png"
_STRIP_ROWS = 12
SCORED = 500  # samples of a quick score
_REFERENCE = 2000  # images that they are compared with


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
            guided(model, part, settings.guidance),
            make_scheduler(settings.scheduler, noise, settings.steps),
            shape=(model.config["in_channels"], size, size),
            generators=image_generators(settings.seed, list(range(start, start + len(part)))),
            device=vae.device,
        )
        images += [to_images(vae.decode(each)) for each in normalization.denormalize(latents).split(decoded)]
    return torch.cat(images).cpu().numpy()


class QuickScore:
    """A kernel distance of some samples, to see a run's trend; `latentmill evaluate` makes figures for tables."""

    def __init__(self, config: Config, classes: NDArray[np.int64], device: torch.device) -> None:
        """Samples of `classes` in turn against some held-out images or, where there are none, images of training."""
        self._network = open_network(config.evaluate.network, config.evaluate.weights, device)
        source = open_config_sources(config)[-1]
        chosen = np.unique(np.linspace(0, len(source.keys) - 1, _REFERENCE).astype(np.int64))
        self._reference = compute_features(
            Subset(source, chosen, source.name),
            self._network,
            features_path(config),
            workers=process_count(config.cache.workers),
            name="quick score",
        )
        against = f"{len(self._reference):,} images, of {source.name}"
        print(f"train: a quick score of {SCORED} samples against {against}", flush=True)
        self._similarity = mean_similarity(self._reference, device)
        self.labels = np.resize(classes, SCORED)

    def measure(self, images: NDArray[np.uint8]) -> dict[str, Any]:
        """For the log: the distance of samples of `labels`, uint8 `SCORED S S 3`, and its interval."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # classes take turns in theirs
        features = InMemory(self._network.features(torch.from_numpy(images)[order]).numpy())
        distance = kernel_distance(features, self._reference, self._similarity, self._network.device)
        return {
            f"KD-{self._network.name}": distance.value,
            "score_interval": distance.interval,
            "score_reference": self._reference.contents(),
        }


@dataclass(frozen=True)
class InMemory:
    """A few feature vectors, `vectors` float32 `N D` (see `pipeline.evaluation.figures.Features`)."""

    vectors: NDArray[np.float32]

    @property
    def dimension(self) -> int:
        return self.vectors.shape[1]

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.full(len(self.vectors), NO_CLASS, np.int64)

    def __len__(self) -> int:
        return len(self.vectors)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self.vectors[rows]


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
