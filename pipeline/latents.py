"""From cached moments to normalised latents, and the random numbers of one training step."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.noise import NoiseProcess
from pipeline.seeds import coordinate_seed


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
