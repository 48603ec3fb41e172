"""One training example's way from cached moments to a loss, with all of its randomness from coordinates."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.noise import NoiseProcess


def coordinate_seed(*coordinates: int | str) -> int:
    """63 bits from coordinates such as (seed, step): neighbouring seeds share nothing, as they would if added."""
    return int.from_bytes(hashlib.sha256(repr(coordinates).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Normalization:
    """Latents to zero mean and unit variance a channel, and back; `mean` and `std` have one entry a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, latents: Tensor) -> Tensor:
        """`B C h w` as the VAE has them -> as the model sees them."""
        mean, std = self._columns(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = self._columns(latents)
        return latents * std + mean

    def _columns(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return _columns(tuple(self.mean), tuple(self.std), latents.device)


@functools.cache
def _columns(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as `C 1 1`, kept on the device: a copy to a GPU in every step would wait for it."""
    with torch.inference_mode(False):
        columns = torch.tensor([mean, std], device=device)[:, :, None, None]
    return columns[0], columns[1]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step: drawn for the whole batch and then cut into each process's part, so that they
    do not depend on the number of processes."""

    views: Tensor  # B int64
    posterior: Tensor  # B C h w
    times: Tensor  # B
    noise: Tensor  # B C h w
    dropped: Tensor  # B bool: whose label becomes the null class

    @classmethod
    def at(
        cls,
        noise: NoiseProcess,
        *,
        seed: int,
        step: int,
        shape: tuple[int, ...],
        views: int,
        label_dropout: float,
        device: torch.device,
    ) -> Draws:
        """The draws of `step` for a batch of latents of `shape` (`B C h w`)."""
        generator = torch.Generator(device).manual_seed(coordinate_seed("train", seed, step))
        return cls(
            views=torch.randint(views, shape[:1], generator=generator, device=device),
            posterior=torch.randn(shape, generator=generator, device=device),
            times=noise.draw_times(shape[0], generator),
            noise=torch.randn(shape, generator=generator, device=device),
            dropped=torch.rand(shape[:1], generator=generator, device=device) < label_dropout,
        )

    def part(self, rows: slice) -> Draws:
        """The rows of one process."""
        return Draws(self.views[rows], self.posterior[rows], self.times[rows], self.noise[rows], self.dropped[rows])


def draw_latents(moments: Tensor, draws: Draws, channels: int) -> Tensor:
    """A latent from the posterior of each image's drawn view: `B V 2C h w` (or `C`, means alone) -> `B C h w`."""
    chosen = moments[torch.arange(len(moments), device=moments.device), draws.views].float()
    mean, std = chosen[:, :channels], chosen[:, channels:]
    return mean + std * draws.posterior if std.shape[1] else mean


def diffusion_loss(
    model: nn.Module, noise: NoiseProcess, latents: Tensor, labels: Tensor, draws: Draws, null_class: int
) -> Tensor:
    """Mean squared error of the model's prediction for normalised `latents` `B C h w`."""
    noisy = noise.corrupt(latents, draws.noise, draws.times).contiguous(memory_format=torch.channels_last)
    classes = torch.where(draws.dropped, null_class, labels)
    prediction = model(noisy, draws.times, classes).sample
    return F.mse_loss(prediction.float(), noise.target(latents, draws.noise, draws.times))


def lr_at(images_seen: int, *, peak: float, images: int, warmup: int, decay: float) -> float:
    """A trapezoid: up from 0 over `warmup` images, `peak`, and down to 0 over the last share `decay` of the run."""
    rise = (images_seen + 1) / warmup if warmup else 1.0
    fall = (images - images_seen) / (decay * images) if decay else 1.0
    return peak * max(0.0, min(1.0, rise, fall))
