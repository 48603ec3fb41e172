"""Train the small autoencoder that is bundled with the repository, on solids and a folder of photographs.

Each step sees whole solids and whole photographs. The loss is the mean squared error plus `BETA` times the KL
divergence of the posterior from a unit Gaussian, in nats per latent dimension (Kingma and Welling 2014, equation 10).
The last part of the training adds a perceptual distance and a discriminator (`pipeline/perceptual.py`), for sharpness
that squared error cannot give. Latents that a diffusion model draws are never exact, so the decoder is trained on
latents with noise of a random level, about `NOISE` of their standard deviation (Zheng et al. 2025, "Diffusion
transformers with representation autoencoders", section 4.3).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from data.sources.base import Source
from data.sources.files import ImageFiles
from data.sources.heldout import split
from data.sources.solids import Solids
from data.storage import publish
from pipeline.ema import Average, halflife_weight
from pipeline.evaluation.kernel import kernel_distance, mean_similarity
from pipeline.evaluation.networks import open_network
from pipeline.optim import lr_at, make_optimizers, set_lr
from pipeline.perceptual import Backbone, Discriminator, perceptual_distance
from pipeline.seeds import coordinate_seed
from pipeline.vae import to_images, to_pixels
from pipeline.vae_init import anchored_autoencoder

CHANNELS, LATENT_CHANNELS = (16, 32, 128), 6
BETA, NOISE = 3e-3, 0.15
PERCEPTUAL, ADVERSARIAL = 0.1, 0.01
SHARP = 0.6  # share of the training after which these two losses are added
LR, WARMUP, DECAY = 2e-3, 0.02, 0.5
HALFLIFE = 2_000  # of the averaged weights, in images
SOLIDS, SOLIDS_SIZE, SOLIDS_BATCH = 20_000, 64, 4
PHOTO_SIZE, PHOTO_BATCH = 32, 16
HELD_OUT = 0.1  # share of the photographs that is not trained on: the same as with `data.heldout: 0.1`
MEASURED = 1_000  # held-out images of each kind for the model card, measured against REFERENCE training images
REFERENCE = 5_000
REPORT_EVERY = 2_000  # steps


class VaeTraining:
    """Trains the autoencoder and keeps the average of its weights."""

    def __init__(self, photos: Path, *, steps: int, seed: int) -> None:
        torch.manual_seed(coordinate_seed("vae", seed))
        trained, held_out = split(ImageFiles(str(photos), image_size=PHOTO_SIZE), HELD_OUT)
        solids, unseen = (
            Solids(count=count, seed=seed + number, image_size=SOLIDS_SIZE)
            for number, count in ((1, SOLIDS), (2, MEASURED))
        )
        self.solids, self.photos = load(solids), load(trained)
        self.judged = {"solids": Judged(self.solids, load(unseen)), "photographs": Judged(self.photos, load(held_out))}
        self.vae = anchored_autoencoder(CHANNELS, latent_channels=LATENT_CHANNELS).to(memory_format=torch.channels_last)
        self.optimizers = make_optimizers(self.vae, kind="muon", lr=LR, betas=(0.9, 0.99), weight_decay=0)
        self.average = Average(self.vae, partial(halflife_weight, halflife=HALFLIFE))
        self.backbone, self.discriminator = Backbone(), Discriminator()
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9), weight_decay=0
        )
        self.steps, self.seed = steps, seed

    def step(self, number: int) -> None:
        """Update the autoencoder once and, in the last part of the training, the discriminator."""
        progress, size = number / self.steps, SOLIDS_BATCH + PHOTO_BATCH
        draws = torch.Generator().manual_seed(coordinate_seed("vae", self.seed, number))
        set_lr(self.optimizers, self._lr(progress))
        batches = [draw(self.solids, SOLIDS_BATCH, draws), draw(self.photos, PHOTO_BATCH, draws)]
        reconstructions, losses = zip(
            *(reconstruct(self.vae, pixels, progress, draws) for pixels in batches), strict=True
        )
        loss = torch.stack(losses).sum()
        if progress >= SHARP:
            loss = loss + self._sharpness(batches, list(reconstructions))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(images_seen=(number + 1) * size, batch_size=size)

    def _lr(self, progress: float) -> float:
        """Return the learning rate: up over the first WARMUP, and down to 0 over the last DECAY of the training."""
        million = 1_000_000
        return lr_at(
            int(progress * million),
            schedule="trapezoid",
            peak=LR,
            images=million,
            warmup=int(WARMUP * million),
            decay=DECAY,
        )

    def _sharpness(self, batches: list[Tensor], reconstructions: list[Tensor]) -> Tensor:
        """Return the perceptual and adversarial loss of the autoencoder, and update the discriminator once."""
        total, judging = torch.zeros(()), torch.zeros(())
        for pixels, made in zip(batches, reconstructions, strict=True):
            with torch.no_grad():
                real = self.backbone(pixels)
            maps = self.backbone(made)
            judging = judging + self.discriminator.loss(real, maps)
            self.discriminator.requires_grad_(False)
            adversarial = self.discriminator.generator_loss(maps)
            self.discriminator.requires_grad_(True)
            total = total + PERCEPTUAL * perceptual_distance(maps, real) + ADVERSARIAL * adversarial
        judging.backward()
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        return total

    def averaged(self) -> AutoencoderKL:
        """Return the autoencoder with averaged weights."""
        vae = AutoencoderKL.from_config(self.vae.config)
        vae.load_state_dict(self.average.tensors)
        return vae.to(memory_format=torch.channels_last).eval()


def train_vae(photos: Path, to: Path, *, steps: int, seed: int = 0) -> None:
    """Train for `steps` steps and write the model in diffusers' folder format to `to`."""
    training, started = VaeTraining(photos, steps=steps, seed=seed), time.monotonic()
    for number in range(steps):
        training.step(number)
        if (number + 1) % REPORT_EVERY == 0 or number + 1 == steps:
            vae = training.averaged()
            parts = [f"{name}: {judged.report(vae)}" for name, judged in training.judged.items()]
            print(f"step {number + 1}/{steps}  {time.monotonic() - started:.0f} s  {'  '.join(parts)}", flush=True)
    vae = training.averaged()
    held_out = [judged.images for judged in training.judged.values()]
    vae.register_to_config(scaling_factor=1 / latent_std(vae, held_out))
    weights = {name: weight.contiguous() for name, weight in vae.state_dict().items()}
    publish(to / "diffusion_pytorch_model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    publish(to / "config.json", vae.to_json_string().encode())


def reconstruct(vae: AutoencoderKL, pixels: Tensor, progress: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the reconstruction of pixels `B 3 H W`, and the part of its loss that needs no other network."""
    posterior = vae.encode(pixels).latent_dist
    latents = noisy(posterior.sample(draws), draws)
    made = vae.decode(latents).sample
    nats = posterior.kl().mean() / latents[0].numel()
    return made, F.mse_loss(made, pixels) + BETA * min(1.0, 10 * progress) * nats


def noisy(latents: Tensor, draws: torch.Generator) -> Tensor:
    """Add noise to latents `B C h w`, of a random level for each image, relative to the std of each channel."""
    scale = latents.detach().std(dim=(0, 2, 3), keepdim=True)
    level = NOISE * torch.randn(len(latents), 1, 1, 1, generator=draws).abs()
    return latents + level * scale * torch.randn(latents.shape, generator=draws)


@dataclass
class Features:
    """Holds feature vectors `N D` in memory (see `pipeline.evaluation.figures.Features`)."""

    vectors: NDArray[np.float32]

    def __post_init__(self) -> None:
        self.dimension = self.vectors.shape[1]
        self.labels = np.full(len(self.vectors), -1, np.int64)

    def __len__(self) -> int:
        return len(self.vectors)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self.vectors[rows]


class Judged:
    """Measures the reconstructions of held-out images."""

    def __init__(self, trained: Tensor, images: Tensor) -> None:
        self.network = open_network("effnet_lite0", None, torch.device("cpu"))
        self.images = random_subset(images, MEASURED)
        self.reference = self._features(random_subset(trained, REFERENCE))
        self.similarity = mean_similarity(self.reference, self.network.device)

    def report(self, vae: AutoencoderKL) -> str:
        """Return PSNR, KL divergence and kernel distance of the reconstructions as text."""
        psnr, nats = measure(vae, self.images)
        features = self._features(reconstructions(vae, self.images))
        distance = kernel_distance(features, self.reference, self.similarity, self.network.device).value
        return f"{psnr:.2f} dB, {nats:.2f} nats, kernel distance x 1000 {1000 * distance:.1f}"

    def _features(self, images: Tensor) -> Features:
        return Features(self.network.features(images).numpy())


def random_subset(images: Tensor, count: int) -> Tensor:
    """Return `count` of `images`, chosen at random: every n-th of the solids would leave out classes."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


@torch.inference_mode()
def reconstructions(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Reconstruct images uint8 `N H W 3` from the posterior mean; return uint8, too."""
    chunks = (to_pixels(chunk).contiguous(memory_format=torch.channels_last) for chunk in images.split(100))
    return torch.cat([to_images(vae.decode(vae.encode(chunk).latent_dist.mode()).sample) for chunk in chunks])


@torch.inference_mode()
def measure(vae: AutoencoderKL, images: Tensor) -> tuple[float, float]:
    """Return PSNR in dB over all of `images` (uint8 `N H W 3`), and KL divergence in nats per latent dimension."""
    errors, nats = [], []
    for chunk in images.split(100):
        pixels = to_pixels(chunk).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mode()).sample.clamp(-1, 1)
        errors.append(((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)))
        nats.append(posterior.kl().flatten() / posterior.mean[0].numel())
    return -10 * torch.cat(errors).mean().log10().item(), torch.cat(nats).mean().item()


@torch.inference_mode()
def latent_std(vae: AutoencoderKL, sets: list[Tensor]) -> float:
    """Return the std of the posterior means over all channels and images, the inverse of diffusers' scaling factor."""
    chunks = [chunk for images in sets for chunk in images.split(100)]
    means = [vae.encode(to_pixels(chunk)).latent_dist.mode().flatten() for chunk in chunks]
    return torch.cat(means).std().item()


def load(source: Source) -> Tensor:
    """Load all images of a data set, uint8 `N H W 3`."""
    batch = source.load(range(len(source.keys)))
    if batch.failures:
        index, reason = next(iter(batch.failures.items()))
        raise ValueError(f"{source.name}/{source.keys[index]}: {reason}")
    return torch.from_numpy(batch.pixels)


def draw(images: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Draw `count` of `images` at random as pixels; half of them are mirrored."""
    pixels = to_pixels(images[torch.randint(len(images), (count,), generator=draws)])
    mirrored = torch.rand(count, 1, 1, 1, generator=draws) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels).contiguous(memory_format=torch.channels_last)
