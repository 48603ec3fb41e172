"""Draw the previews of a run: a sheet of samples for each preview, and a strip of all previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.cache.manifest import Manifest
from pipeline.compatibility import usable_guidance
from pipeline.config import Config
from pipeline.ema import Average
from pipeline.latents import Normalization
from pipeline.noise import NoiseProcess
from pipeline.pictures import contact_sheet, save_png, strip
from pipeline.sampling import draw_samples
from pipeline.training.checkpoint import Checkpoint, gather_full
from pipeline.training.metrics import optional
from pipeline.training.setup import build_model, open_heldout
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae, to_images

PER_CLASS = 4
PREVIEWED = 10  # classes in a preview: the first ones that have images
STRIP = "previews.png"
_STRIP_ROWS = 12
_ROWS = "rows"  # folder with one row of images, one per class, of every preview: the strip is made of them


def preview_file(run: Path, images_seen: int) -> Path:
    """Return the path of the preview at `images_seen`."""
    return run / "previews" / f"{images_seen:09d}.png"


def due(before: int, images_seen: int, every: int, images: int) -> bool:
    """Return whether the step from `before` to `images_seen` passed a multiple of `every` or ended a run of `images`;
    False if `every` is 0."""
    return every > 0 and (before // every != images_seen // every or images_seen >= images)


def preview_missing(run: Path, checkpoint: Checkpoint, config: Config, accelerator: Accelerator) -> bool:
    """Return whether `run` was killed after saving its newest checkpoint and before publishing the preview due then."""
    seen, settings = checkpoint.images_seen, config.train
    assert settings.batch_size != "auto"
    wanted = seen <= settings.images and due(seen - settings.batch_size, seen, settings.preview_every, settings.images)
    missing = accelerator.is_main_process and wanted and not preview_file(run, seen).exists()
    answer = torch.tensor(float(missing), device=accelerator.device)
    return bool(accelerator.reduce(answer, "sum"))  # the same answer in all processes


def gather_weights(average: Average, accelerator: Accelerator) -> dict[str, Tensor]:
    """Gather the weights of `average` in the main process; others must call it, too, and get an empty dict."""
    weights = {}
    for name, value in average.tensors.items():
        whole = gather_full(value)
        if accelerator.is_main_process:
            weights[name] = whole
    return weights


class Previews:
    """Evaluates averaged weights by samples, held-out loss and quick score; only the main process has one."""

    def __init__(
        self,
        config: Config,
        run: Path,
        manifest: Manifest,
        *,
        class_counts: NDArray[np.int64],
        without_class: float,
        noise: NoiseProcess,
        device: torch.device,
    ) -> None:
        """Take the images of each class, `class_counts`, and the share of images trained `without_class`.

        ValueError if the VAE of `config` is not the one that encoded the latents.
        """
        self._config, self._run, self._manifest, self._noise = config, run, manifest, noise
        self._vae = FrozenVae(config.vae.source, device)
        self._vae.check(manifest.vae, config.cache.path)
        asked, classes = config.sample, len(manifest.classes)
        guidance, line = usable_guidance(
            asked.guidance, asked.guidance_form, without_class=without_class, classes=classes
        )
        if line:
            print(f"train: previews: {line}")
        self._settings = asked.changed(guidance=guidance)
        trained = np.flatnonzero(class_counts)  # the model learns nothing of other classes
        self._shown = trained[:PREVIEWED]
        self._heldout = open_heldout(config, manifest, noise)
        self._score = None
        if config.train.eval_every:
            from pipeline.training.quick_score import QuickScore  # slow to import, so only when needed

            self._score = QuickScore(config, trained, device)

    def measure(self, model: LatentUNet, normalization: Normalization, *, heldout: bool, score: bool) -> dict[str, Any]:
        """Return the held-out loss and a quick score for the log, if they are requested and the run has them."""
        measured: dict[str, Any] = {}
        with optional("held-out loss and score"):
            if heldout and self._heldout:
                measured |= self._heldout.measure(model, normalization)
            if score and self._score:
                measured |= self._score.measure(self._draw(model, normalization, self._score.labels))
        return measured

    def publish(self, model: LatentUNet, normalization: Normalization, images_seen: int) -> None:
        """Publish a sheet of samples, and update the strip of all previews."""
        with optional("preview"):
            labels = np.tile(self._shown, PER_CLASS)
            images, file = self._draw(model, normalization, labels), preview_file(self._run, images_seen)
            save_png(contact_sheet(images, labels.tolist(), self._manifest.classes), file)
            row = np.concatenate(list(images[-len(self._shown) :]), axis=1)
            save_png(Image.fromarray(row), file.parent / _ROWS / file.name)
            draw_strip(self._run)

    def load(self, weights: dict[str, Tensor]) -> LatentUNet:
        """Return the model with `weights`, in evaluation mode."""
        with torch.device("meta"):  # do not initialise weights that are replaced at once
            model = build_model(self._config, self._manifest)
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False).eval()

    @torch.inference_mode()
    def _draw(self, model: LatentUNet, normalization: Normalization, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Draw samples of the classes `labels` `N` with fixed seeds: uint8 `N H W 3`. They are decoded `PREVIEWED` at a
        time, because a large VAE has no memory for all."""
        images: list[Tensor] = []
        for start in range(0, len(labels), self._settings.batch_size):
            part = labels[start : start + self._settings.batch_size]
            latents = draw_samples(
                model,
                self._noise,
                self._settings,
                torch.from_numpy(part),
                indices=range(start, start + len(part)),
                device=self._vae.device,
            )
            images += [
                to_images(self._vae.decode(each)) for each in normalization.denormalize(latents).split(PREVIEWED)
            ]
        return torch.cat(images).cpu().numpy()


def draw_strip(run: Path) -> None:
    """Publish previews.png: one image per class of every preview of a run, or of evenly spaced ones if it has many."""
    files = sorted(file for file in (run / "previews" / _ROWS).glob("*.png") if file.stem.isdecimal())
    last = len(files) - 1
    shown = min(len(files), _STRIP_ROWS)
    rows, captions = [], []
    for file in (files[round(i * last / max(shown - 1, 1))] for i in range(shown)):
        try:
            rows.append(Image.open(file).convert("RGB"))
        except (OSError, SyntaxError) as error:  # a damaged picture must not end a run
            print(f"train: skipped {file}: {error}", flush=True)
        else:
            captions.append(f"{int(file.stem):,}")
    if rows:
        save_png(strip(rows, captions), run / STRIP)
