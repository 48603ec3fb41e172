"""One training example's way from cached moments to a loss, with all of its randomness from coordinates."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.noise import NoiseProcess
from pipeline.unet import LatentUNet, timestep_embedding

_FEATURES = 64  # of a timestep, for the learned weighting


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


class Objective(nn.Module):
    """The model and its loss: the one module that is called in a step, and so wrapped for many processes.

    `weighting` is plain; min_snr (`NoiseProcess.min_snr`); or learned: error / exp(u) + u, where u learns the logarithm
    of the error at each timestep, so that all of them weigh alike (Kendall et al. 2018; Karras et al. 2024, "Analyzing
    and improving the training dynamics of diffusion models", section 2 and appendix A).
    """

    def __init__(
        self,
        model: LatentUNet,
        noise: NoiseProcess,
        weighting: str = "plain",
        direction: float = 0.0,
        contrastive: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.noise, self.weighting = model, noise, weighting
        self.direction, self.contrastive = direction, contrastive
        self.uncertainty = nn.Linear(_FEATURES, 1) if weighting == "learned" else None
        if self.uncertainty is not None:  # u = 0: the plain loss at first
            nn.init.zeros_(self.uncertainty.weight)
            nn.init.zeros_(self.uncertainty.bias)

    def forward(self, latents: Tensor, noise: Tensor, times: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latents and noise `B C h w`, timesteps `B`, classes int64 `B` -> the loss, and each image's mean
        squared error `B`, unweighted and without gradient."""
        noisy = self.noise.corrupt(latents, noise, times).contiguous(memory_format=torch.channels_last)
        prediction = self.model(noisy, times, classes).sample.float()
        target = self.noise.target(latents, noise, times)
        errors = (prediction - target).square().mean(dim=(1, 2, 3))
        loss = self._weigh(errors, times).mean()
        if self.direction:
            cosine = F.cosine_similarity(prediction, target, dim=1).mean()
            loss = loss + self.direction * (1 - cosine)
        if self.contrastive:
            loss = loss - self.contrastive * (prediction - target.roll(1, 0)).square().mean()
        return loss, errors.detach()

    def _weigh(self, errors: Tensor, times: Tensor) -> Tensor:
        if self.weighting == "min_snr":
            return errors * self.noise.min_snr(times)
        if self.uncertainty is not None:
            with torch.autocast(times.device.type, enabled=False):  # which would round the weights of the loss
                logarithm = self.uncertainty(timestep_embedding(times, _FEATURES)).flatten()
            return errors * (-logarithm).exp() + logarithm
        return errors
