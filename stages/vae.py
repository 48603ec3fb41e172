"""Train the small autoencoder that lies in the repository, on solids and a folder of photographs.

Each step sees whole solids and whole photographs; the loss is the mean squared error plus `BETA` times the posterior's
divergence from a unit Gaussian in nats a latent dimension (Kingma and Welling 2014, equation 10).
"""

from __future__ import annotations

import time
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from data.files import ImageFiles
from data.solids import Solids
from data.source import Source
from data.storage import publish
from pipeline.anchor import anchored_autoencoder
from pipeline.vae import to_pixels

BETA = 4e-4
CHANNELS = (16, 32, 64)
LATENT_CHANNELS = 4
LEARNING_RATE = 2e-3
SOLIDS, SOLIDS_SIZE, SOLIDS_BATCH = 20_000, 64, 8
PHOTO_SIZE, PHOTO_BATCH = 32, 32
HELD_OUT = 10  # every tenth photograph is never trained on; the figures of the card are measured on those


def train_vae(photos: Path, to: Path, *, steps: int, seed: int = 0) -> None:
    """Train for `steps` steps and write the model in diffusers' folder format to `to`."""
    torch.manual_seed(seed)
    solids = _load(Solids(count=SOLIDS, seed=seed + 1, image_size=SOLIDS_SIZE), range(SOLIDS))
    folder = ImageFiles(str(photos), image_size=PHOTO_SIZE)
    every = range(len(folder.keys))
    held_out = _load(folder, every[::HELD_OUT])
    trained = _load(folder, [i for i in every if i % HELD_OUT])
    unseen = _load(Solids(count=1000, seed=seed + 2, image_size=SOLIDS_SIZE), range(1000))
    vae = anchored_autoencoder(CHANNELS, latent_channels=LATENT_CHANNELS).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0)
    draws = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for step in range(steps):
        _set_lr(optimizer, step / steps)
        batches = [_draw(solids, SOLIDS_BATCH, draws), _draw(trained, PHOTO_BATCH, draws)]
        beta = BETA * min(1.0, 10 * step / steps)
        loss = torch.stack([_loss(vae, pixels, beta=beta) for pixels in batches]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            parts = [f"{name} {_report(vae, images)}" for name, images in (("solids", unseen), ("photos", held_out))]
            print(f"step {step + 1}/{steps}  {time.monotonic() - started:.0f} s  {'  '.join(parts)}", flush=True)
    vae.register_to_config(scaling_factor=1 / _latent_std(vae, [unseen, held_out]))
    weights = {name: weight.contiguous() for name, weight in vae.state_dict().items()}
    publish(to / "diffusion_pytorch_model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
    publish(to / "config.json", vae.to_json_string().encode())


def measure(vae: AutoencoderKL, images: Tensor) -> tuple[float, float]:
    """PSNR in dB of the mean squared error over all of `images` (uint8 `N H W 3`), and nats a latent dimension."""
    errors, nats = [], []
    with torch.inference_mode():
        for chunk in images.split(100):
            pixels = to_pixels(chunk).contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.mode()).sample.clamp(-1, 1)
            errors.append(((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)))
            nats.append(posterior.kl().flatten() / posterior.mean[0].numel())
    return -10 * torch.cat(errors).mean().log10().item(), torch.cat(nats).mean().item()


@torch.inference_mode()
def _latent_std(vae: AutoencoderKL, sets: list[Tensor]) -> float:
    """Standard deviation of the posterior's means over all channels and images: diffusers' scaling factor inverted."""
    chunks = [chunk for images in sets for chunk in images.split(100)]
    means = [vae.encode(to_pixels(chunk)).latent_dist.mode().flatten() for chunk in chunks]
    return torch.cat(means).std().item()


def _report(vae: AutoencoderKL, images: Tensor) -> str:
    psnr, nats = measure(vae, images)
    return f"{psnr:.2f} dB {nats:.2f} nats"


def _load(source: Source, indices: range | list[int]) -> Tensor:
    batch = source.load(indices)
    if batch.failures:
        index, reason = next(iter(batch.failures.items()))
        raise ValueError(f"{source.name}/{source.keys[index]}: {reason}")
    return torch.from_numpy(batch.pixels)


def _draw(images: Tensor, count: int, draws: torch.Generator) -> Tensor:
    pixels = to_pixels(images[torch.randint(len(images), (count,), generator=draws)])
    mirrored = torch.rand(count, 1, 1, 1, generator=draws) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels).contiguous(memory_format=torch.channels_last)


def _loss(vae: AutoencoderKL, pixels: Tensor, *, beta: float) -> Tensor:
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    nats = posterior.kl().mean() / posterior.mean[0].numel()
    return (decoded - pixels).square().mean() + beta * nats


def _set_lr(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """A short warm-up, then constant, then a linear decay to zero over the second half."""
    lr = LEARNING_RATE * min(1.0, progress * 100 + 1e-3, 2 * (1 - progress))
    for group in optimizer.param_groups:
        group["lr"] = lr
