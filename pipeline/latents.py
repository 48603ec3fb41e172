"""Sample and normalise latents from cached moments, and draw the random numbers of a training step."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.noise import NoiseProcess
from pipeline.seeds import coordinate_seed


@dataclass(frozen=True)
class Normalization:
    """Normalises latents to zero mean and unit variance per channel, and back; `mean`, `std` have one entry each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, latents: Tensor) -> Tensor:
        """Convert latents `B C h w` from the scale of the VAE to that of the model."""
        mean, std = self._columns(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Convert latents `B C h w` from the scale of the model back to that of the VAE."""
        mean, std = self._columns(latents)
        return latents * std + mean

    def _columns(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return _columns(tuple(self.mean), tuple(self.std), latents.device)


@functools.cache
def _columns(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std as `C 1 1`, cached on the device: copying them to a GPU in every step would block."""
    with torch.inference_mode(False):
        columns = torch.tensor([mean, std], device=device)[:, :, None, None]
    return columns[0], columns[1]


@dataclass(frozen=True)
class Draws:
    """Holds the random numbers of one step: noise, timesteps, posterior samples, views and dropped labels.

    They are drawn for the whole batch and then split, so that they do not depend on the number of processes.
    """

    views: Tensor  # B int64
    posterior: Tensor  # B C h w
    times: Tensor  # B
    noise: Tensor  # B C h w
    dropped: Tensor  # B bool: True where the label becomes the null class

    @classmethod
    def at(
        cls,
        process: NoiseProcess,
        *,
        seed: int,
        step: int,
        shape: tuple[int, ...],
        views: int,
        label_dropout: float,
        device: torch.device,
    ) -> Draws:
        """Draw the random numbers of `step` for a batch of latents of `shape` (`B C h w`), from (seed, step)."""
        generator = torch.Generator(device).manual_seed(coordinate_seed("train", seed, step))
        return cls(
            views=torch.randint(views, shape[:1], generator=generator, device=device),
            posterior=torch.randn(shape, generator=generator, device=device),
            times=process.draw_timesteps(shape[0], generator),
            noise=torch.randn(shape, generator=generator, device=device),
            dropped=torch.rand(shape[:1], generator=generator, device=device) < label_dropout,
        )

    def part(self, rows: slice) -> Draws:
        """Return the rows of one process or micro-batch."""
        return Draws(self.views[rows], self.posterior[rows], self.times[rows], self.noise[rows], self.dropped[rows])


def draw_latents(moments: Tensor, draws: Draws, channels: int) -> Tensor:
    """Sample latents from the posterior of each image's chosen view: `B V 2C h w` (or `C`: only means) -> `B C h w`."""
    chosen = moments[torch.arange(len(moments), device=moments.device), draws.views].float()
    mean, std = chosen[:, :channels], chosen[:, channels:]
    return mean + std * draws.posterior if std.shape[1] else mean
